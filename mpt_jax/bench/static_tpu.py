"""TPU half of bench/attention_static: cycles of the inner loops, from libtpu's dumps.

libtpu schedules every cycle of a TPU core at compile time: a bundle is a cycle. It
writes the bundles of a kernel and, row by row, how much of each unit they use, when
told so by LIBTPU_INIT_ARGS. The flags and the format are undocumented and may change
with libtpu: where the two dumps of a kernel disagree in length, this stops. It comes
with ``pip install -e .[aot]``; measured with libtpu 0.0.42.1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

PACKAGES = ("jax", "libtpu")
COLUMNS = (
    "chip", "kernel", "direction", "case", "tiles", "cycles", "floor", "of_floor",
    "program",
)  # fmt: skip
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# bfloat16 multiplications and additions of all matrix units in one cycle.
OPS_PER_CYCLE = {"v4": 131_072, "v5e": 131_072, "v5p": 131_072, "v6e": 262_144}
TILE = 512
LENGTH, HEADS = 4096, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile. head_dim and what the call has beside q, k and v."""

    name: str
    kernel: str = "ours"
    head_dim: int = 128
    alibi: bool = True
    segments: bool = False


CASES = (
    Case("alibi"),
    Case("no bias", alibi=False),
    Case("alibi, segments", segments=True),
    Case("alibi, head_dim 64", head_dim=64),
    Case("alibi, head_dim 112", head_dim=112),
    Case("no bias", kernel="jax flash", alibi=False),
    Case("no bias", kernel="splash", alibi=False),
    Case("no bias, fused backward", kernel="splash fused", alibi=False),
)


def measure(only: str | None = None) -> list[dict[str, Any]]:
    """One row per inner loop that multiplies matrices, of every case on every chip.

    Raises: RuntimeError: a compile fails, or a dump is not what this file knows.
    """
    rows = []
    for chip in [only] if only else TOPOLOGIES:
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU to fight over
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} "
                "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex="
                "packed-bundles-post-ra|pre-delay",  # else 2,000 files a case
            }
            command = [sys.executable, "-m", "mpt_jax.bench.static_tpu", chip, folder]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{chip}: {done.stderr[-2000:]}")
        rows += [row for line in done.stdout.splitlines() for row in json.loads(line)]
    return rows


def gates(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """On v5e: cycles of a tile that hides nothing, and what the bias adds to them."""

    def cycles(direction: str, case: str) -> float | None:
        found = [
            r["cycles"]
            for r in rows
            if (r["chip"], r["kernel"], r["direction"], r["case"], r["tiles"])
            == ("v5e", "ours", direction, case, "plain")
        ]
        return found[0] if found else None

    results = []
    for direction, limit in (("forward", 1300), ("backward", 2800)):
        ours, without = (cycles(direction, case) for case in ("alibi", "no bias"))
        if ours is None or without is None:
            continue
        overhead = ours / without - 1
        results.append((f"v5e {direction}, cycles per tile", ours, limit))
        results.append((f"v5e {direction}, ALiBi overhead", round(overhead, 4), 0.02))
    return results


@dataclasses.dataclass(frozen=True)
class Loop:
    """Straight-line code with matrix operations: its cycles, and those they need."""

    cycles: int
    floor: float


def loop_bodies(bundles: str, utilization: str) -> list[Loop]:
    """The loop bodies, and parts of them between branches, that multiply matrices.

    Args: bundles: text of ``*packed-bundles-post-ra.txt``, a line per cycle with the
      depth of its loop as ``>>`` and labels where branches land; utilization: of
      ``*pre-delay*utilization.txt``, a row per cycle, its first number the matrix
      units. Later dumps leave out empty cycles and would flatter.

    Raises: ValueError: the two do not have the same number of cycles.
    """
    header, _, table = utilization.partition("== UTILIZATION:\n")
    units_per_cycle = int(header.splitlines()[2].split(",")[0].split()[0])
    busy = [int(row.split()[0]) for row in table.splitlines() if row.strip()]

    places: list[tuple[str | None, int]] = []  # label and depth of each cycle
    for line in bundles.splitlines():
        match = re.match(
            r"\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*(>*)\s*\{", line
        )
        if match:
            empty = "{}" in line and places  # says no depth: that of the one before
            places.append((match[1], places[-1][1] if empty else len(match[2])))
    if len(places) != len(busy):
        raise ValueError(
            f"libtpu dump: {len(places)} bundles but {len(busy)} rows of utilization; "
            "this version of libtpu prints something else"
        )
    starts = [
        n
        for n, (label, depth) in enumerate(places)
        if label or n == 0 or depth != places[n - 1][1]
    ]
    bodies = []
    for start, end in itertools.pairwise([*starts, len(places)]):
        work = sum(busy[start:end]) / units_per_cycle
        if work and places[start][1]:  # depth 0 runs once
            bodies.append(Loop(end - start, work))
    return bodies


# Below: what the child process runs, with libtpu told to dump.


def _child(chip: str, folder: str) -> None:
    """Prints one JSON list of rows per case."""
    for case in CASES:
        for file in pathlib.Path(folder).iterdir():
            file.unlink()
        _compile(chip, case)
        print(json.dumps(list(_rows(chip, case, pathlib.Path(folder)))), flush=True)


def _rows(chip: str, case: Case, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for bundles in sorted(folder.glob("*[0-9]-packed-bundles-post-ra.txt")):
        stem, name = re.match(r"(\d+-(.*?)\.?\d*)-\d+-packed", bundles.name).groups()
        (utilization,) = folder.glob(f"{stem}-*-pre-delay*per-bundle-utilization.txt")
        backward = re.search("backward|bwd|dkv|dq", name) is not None
        depth = 128 * math.ceil(case.head_dim / 128)  # of the matrix units
        products = 10 if backward else 4
        tile_floor = products * TILE * TILE * depth / OPS_PER_CYCLE[chip]
        for loop in loop_bodies(bundles.read_text(), utilization.read_text()):
            tiles = max(1, round(loop.floor / tile_floor))
            plain = case.kernel != "ours" or tiles > 1
            yield {
                "chip": chip,
                "kernel": case.kernel,
                "direction": "backward" if backward else "forward",
                "case": case.name,
                "program": name,
                "tiles": "plain" if plain else "that hide",
                "cycles": round(loop.cycles / tiles),
                "floor": round(loop.floor / tiles),
                "of_floor": round(loop.floor / loop.cycles, 3),
            }


def _compile(chip: str, case: Case) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    ).devices
    mesh = Mesh(np.asarray(devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    attend = {"ours": _ours, "jax flash": _jax_flash}.get(case.kernel, _splash)(case)

    def both(q, k, v, *rest):
        out, pull = jax.vjp(lambda *a: attend(*a, *rest), q, k, v)
        return out, pull(out)

    tensor = array(1, LENGTH, HEADS, case.head_dim)
    slopes, ids = array(HEADS, dtype=jnp.float32), array(1, LENGTH, dtype=jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(both).lower(tensor, tensor, tensor, slopes, ids).compile()


def _ours(case: Case) -> Callable[..., Any]:
    from mpt_jax.kernels.attention import Operands, Rule
    from mpt_jax.kernels.attention_tpu import attention_tpu

    def attend(q, k, v, slopes, ids):
        ids = ids if case.segments else None
        x = Operands(slopes if case.alibi else None, ids, ids)
        # Skipping changes how many tiles are visited, not what one costs.
        return attention_tpu(q, k, v, Rule(case.head_dim**-0.5, skip="off"), x)[0]

    return attend


def _jax_flash(case: Case) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    names = [f.name for f in dataclasses.fields(flash.BlockSizes)]
    sizes = flash.BlockSizes(**dict.fromkeys(names, TILE) | {"block_b": 1})

    def attend(q, k, v, slopes, ids):
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        scale = case.head_dim**-0.5
        return flash.flash_attention(
            q, k, v, causal=True, sm_scale=scale, block_sizes=sizes
        )

    return attend


def _splash(case: Case) -> Callable[..., Any]:
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    fused = case.kernel == "splash fused"
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"]
    names += [] if fused else ["q_dq", "kv_dq"]
    sizes = dict.fromkeys((f"block_{n}" for n in names), TILE)
    mask = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)

    def attend(q, k, v, slopes, ids):
        attend_one = splash.make_splash_mha_single_device(
            mask, block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused)
        )
        q, k, v = (a.swapaxes(1, 2) for a in (q * case.head_dim**-0.5, k, v))
        return jax.vmap(attend_one)(q, k, v)

    return attend


if __name__ == "__main__":
    _child(*sys.argv[1:])
