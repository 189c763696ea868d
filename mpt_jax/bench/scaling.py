"""What devices send for a token, by mesh: ``python -m mpt_jax.bench.scaling``.

    python -m mpt_jax.bench.scaling --config configs/released/mpt_7b.py \\
        --topology v5p:4x8x8 --config.global_batch_size=1792 --out scaling.json

Compiles the training step for each mesh with the real compiler (``pip install -e
.[aot]``; no TPU needed) and adds up what its collectives receive, loops included: bytes
per token of one device, since a device is what has links. Not a timing: "exposed" and
"overlapped" are the least seconds that the peaks of chip and links allow. The first
mesh, plain FSDP, is what the others are compared with.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from mpt_jax import cli
from mpt_jax.bench.common import provenance, save, table
from mpt_jax.config import MeshConfig, TrainConfig
from mpt_jax.errors import EXIT_OK, UserError, run_verb

# Plain FSDP first; then replicas of it, whose groups span fewer dims of the torus; then
# tensor parallelism, which sends activations and not weights.
MESHES = (
    "fsdp={n}",
    "data={n_64},fsdp=64",
    "data={n_32},fsdp=32",
    "data={n_8},fsdp=8",
    "data={n_4},fsdp=4",
    "data={n_32},fsdp=8,tensor=4",
)
COLUMNS = (
    "mesh", "data", "fsdp", "tensor", "context", "several_axes", "bytes_per_token",
    "of_first", "peak_gib", "overlapped_s", "exposed_s",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m mpt_jax.bench.scaling", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py")
    add("--topology", default="v5p:4x8x8", help="as of the plan verb")
    add("--meshes", default="", help="AXIS=SIZE,... of each, with ; between them")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        from mpt_jax.planning import topology

        topology.prepare_environment()
        place = topology.parse(flags.topology)
        config = cli.load_config(flags.config, overrides)
        texts = [m for m in flags.meshes.split(";") if m] or _meshes(place.n_devices)
        rows = bench(config, place, [_mesh(text) for text in texts])
        print(table(rows, COLUMNS))
        save({**provenance("scaling", argv), "rows": rows}, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def _meshes(n: int) -> list[str]:
    parts = {"n": n} | {f"n_{k}": n // k for k in (4, 8, 32, 64)}
    return [text.format(**parts) for text in MESHES]


def _mesh(text: str) -> MeshConfig:
    """``fsdp=64,tensor=2`` with every other axis at 1."""
    sizes = {f.name: 1 for f in dataclasses.fields(MeshConfig)}
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in sizes or not size.isdigit():
            raise UserError(f"--meshes: expected AXIS=SIZE, got {word!r}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def bench(
    config: TrainConfig, topology: Any, meshes: Sequence[MeshConfig]
) -> list[dict[str, Any]]:
    """A row per mesh; one that needs more memory than there is says so.

    Raises: ConfigError: a mesh does not fit. UserError: no compiler for the chip.
    """
    from mpt_jax.planning import search

    rows: list[dict[str, Any]] = []
    for mesh in meshes:
        plan = search.plan(dataclasses.replace(config, mesh=mesh), topology)
        sizes = dataclasses.asdict(mesh)
        name = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
        row = {"mesh": name, "peak_gib": round(plan.needed / 2**30, 2)}
        if plan.figures is not None:
            row |= _row(plan)
            first = rows[0]["bytes_per_token"] if rows else row["bytes_per_token"]
            row["of_first"] = round(row["bytes_per_token"] / first, 3)
        rows.append(row)
    return rows


def _row(plan: Any) -> dict[str, Any]:
    figures, tokens = plan.figures, plan.figures.tokens / plan.figures.n_devices
    by_axis: dict[str, float] = {}
    for c in figures.collectives:
        name = c.axes[0] if len(c.axes) == 1 else "several_axes"
        by_axis[name] = by_axis.get(name, 0.0) + c.bytes / tokens
    return {
        **{axis: round(n) for axis, n in by_axis.items()},
        "bytes_per_token": round(figures.collective_bytes / tokens),
        "overlapped_s": round(plan.roofline.overlapped, 3),
        "exposed_s": round(plan.roofline.exposed, 3),
        "collectives": [dataclasses.asdict(c) for c in figures.collectives],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
