"""What training takes on machines that are not here: ``python -m mpt_jax.plan``.

    python -m mpt_jax.plan --config configs/released/mpt_7b.py --topology v5p:4x4x4
    python -m mpt_jax.plan --config configs/mpt_70b.py --topology v5p:4x4x8 \\
        --mesh fsdp=64,tensor=2 --json plan.json
    python -m mpt_jax.plan --config configs/mpt_30b.py --topology h100:64 --search

For a TPU slice (v4, v5e, v5p, v6e; ``2*v5e:16x16`` is two) the real training step is
compiled by the real compiler, which comes with ``pip install -e .[aot]`` and needs no
TPU: memory, collectives and FLOPs are those of the program that would run, the seconds
are the least that the chip's peaks allow. For GPU machines (h100:8, a100-80:64,
a100-40:8) all is by formula, and says so. ``--what decode`` and ``--what prefill`` are
the engine's programs, with the model's heads over all chips.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpt_jax import cli
from mpt_jax.config import TrainConfig
from mpt_jax.errors import EXIT_OK, ConfigError, UserError, run_verb
from mpt_jax.validate import check_mesh

if TYPE_CHECKING:
    from mpt_jax.planning.report import Plan
    from mpt_jax.planning.topology import Topology

_COMPILER_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # of the environment


def main(argv: Sequence[str]) -> int:
    """The verb; exits 0 whether it fits or not, for the verdict is the result."""
    parser = cli.Parser(prog="python -m mpt_jax.plan", description=__doc__)
    add = parser.add_argument
    what = ("train", "prefill", "decode")
    add("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    add("--topology", required=True, help="CHIP:SHAPE, as v5p:4x4x8 or h100:16")
    add("--mesh", default="", help="sizes, as data=1,fsdp=64,tensor=2; for mesh.*")
    add("--what", choices=what, default="train", help="which program; default train")
    add("--slots", type=int, default=8, help="of generation: sequences at once; 8")
    add("--capacity", type=int, default=2048, help="of generation: tokens a slot; 2048")
    add("--chunk", type=int, default=512, help="of prefill: tokens read at a time; 512")
    add("--json", metavar="OUT.json", help="also write the plan there")
    add("--search", action="store_true", help="rank meshes, microbatches and remat")
    add("--compile", type=int, default=3, help="with --search: how many to compile; 3")
    add("--estimate", action="store_true", help="by formula for TPUs, too: seconds")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        from mpt_jax.planning import topology

        topology.prepare_environment()
        place = topology.parse(flags.topology)
        config = cli.load_config(flags.config, overrides | mesh_overrides(flags.mesh))
        if flags.what != "train":
            text, values = _serving(config, place, flags)
        elif flags.search:
            text, values = _search(
                config, place, 0 if flags.estimate else flags.compile
            )
        else:
            text, values = _one(config, place, estimate=flags.estimate)
        print(text)
        if flags.json:
            words = ["python -m mpt_jax.plan", *argv]
            values = {"command": " ".join(words)} | _versions() | values
            pathlib.Path(flags.json).write_text(json.dumps(values, indent=1) + "\n")
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def mesh_overrides(text: str) -> dict[str, str]:
    """``fsdp=64,tensor=2`` as overrides.

    >>> mesh_overrides("fsdp=64,tensor=2")
    {'mesh.fsdp': '64', 'mesh.tensor': '2'}

    Raises: UserError: no AXIS=SIZE.
    """
    overrides = {}
    for word in filter(None, text.split(",")):
        axis, equals, size = word.strip().partition("=")
        if not equals or not size.removeprefix("-").isdigit():
            raise UserError(f"--mesh: expected AXIS=SIZE, got {word!r}")
        overrides[f"mesh.{axis}"] = size
    return overrides


def _one(
    config: TrainConfig, topology: Topology, *, estimate: bool
) -> tuple[str, dict[str, Any]]:
    from mpt_jax.planning import report, search

    if problems := check_mesh(config, topology.n_devices):
        raise ConfigError(problems, location=topology.name)
    plan = search.plan(config, topology, estimate=estimate)
    if not plan.fits:
        better = search.nearest(config, plan)
        advice = "none of mesh, microbatches and remat; take more devices"
        if better:
            needed = f"{better.needed / 2**30:.1f} GiB by formula"
            advice = f"{search.describe(config, better)} ({needed})"
        plan = dataclasses.replace(plan, advice=advice)
    return report.table(plan), report.to_dict(plan)


def _serving(
    config: TrainConfig, topology: Topology, flags: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    from mpt_jax.planning import report, serving

    load = serving.Load(flags.slots, flags.capacity, flags.chunk)
    if not flags.mesh:
        mesh = dataclasses.replace(config.mesh, tensor=topology.n_devices)
        config = dataclasses.replace(config, mesh=mesh)
    plan = serving.plan(config, topology, flags.what, load)
    return report.table(plan), report.to_dict(plan)


def _search(
    config: TrainConfig, topology: Topology, compile_best: int
) -> tuple[str, dict[str, Any]]:
    from mpt_jax.planning import report, search

    found = search.search(config, topology, compile_best=compile_best)
    if not found:
        return "nothing fits", {"plans": []}
    head = f"{'step >=':>11}{'MFU <=':>9}{'peak':>13}  by        flags"
    lines = [_ranked(config, plan) for plan in found[:10]]
    text = "\n".join([head, *lines, "", report.table(found[0])])
    return text, {"plans": [report.to_dict(plan) for plan in found[:10]]}


def _ranked(config: TrainConfig, plan: Plan) -> str:
    from mpt_jax.planning import search

    return (
        f"{plan.roofline.exposed:9.3f} s{plan.roofline.mfu_exposed:9.1%}"
        f"{plan.needed / 2**30:9.2f} GiB  {plan.figures.source:<9} "
        f"{search.describe(config, plan)}"
    )


def _versions() -> dict[str, Any]:
    from importlib import metadata

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = {name: version(name) for name in ("jax", "libtpu")}
    told = {name: os.environ[name] for name in _COMPILER_FLAGS if name in os.environ}
    return {"date": datetime.date.today().isoformat(), "versions": packages, **told}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
