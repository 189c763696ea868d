"""Looks for the mesh, the microbatches and the remat policy that make a step shortest.

Every combination is judged by formula first; the compiler then has the last word on
the best few.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from mpt_jax.config import MeshConfig, TrainConfig
from mpt_jax.errors import ConfigError
from mpt_jax.planning import analytic, compiled
from mpt_jax.planning.chips import GIB
from mpt_jax.planning.figures import Figures, roofline
from mpt_jax.planning.report import FORMULA_ERROR, Plan
from mpt_jax.planning.topology import Fabric, Topology, make_mesh
from mpt_jax.validate import check_mesh

# From the one that computes least to the one that keeps least.
REMAT = ("none", "dots", "attention", "full", "offload")
MAX_TENSOR = 16  # heads of one layer on so many devices is where matmuls get thin
MIN_PART = (
    4096  # tokens of a sequence on a device: below, a ring sends more than it does
)


def plan(config: TrainConfig, topology: Topology, *, estimate: bool = False) -> Plan:
    """The plan of ``config`` itself: compiled for a TPU, by formula for GPUs or with
    ``estimate``.

    Raises: ConfigError: the mesh does not fit. UserError: no compiler for the chip.
    """
    if estimate or not topology.chip.is_tpu:
        figures = _estimate(config, topology)
        fabric = fabric_of(topology, figures.mesh)
        return _plan(config, topology, figures, fabric)
    try:
        step = compiled.train_step(config, topology)
    except compiled.TooBig as error:
        return Plan("train", config, topology, needed=error.needed)
    compiled_plan = _plan(config, topology, step.figures, step.fabric)
    estimate = _estimate(config, topology).memory.peak
    return dataclasses.replace(compiled_plan, estimate=estimate)


def _estimate(config: TrainConfig, topology: Topology) -> Figures:
    return analytic.train_step(config, topology.n_devices, lanes=topology.chip.lanes)


def _plan(
    config: TrainConfig, topology: Topology, figures: Figures, fabric: Fabric
) -> Plan:
    return Plan(
        "train",
        config,
        topology,
        needed=figures.memory.peak,
        figures=figures,
        roofline=roofline(figures, fabric),
    )


def fabric_of(topology: Topology, mesh: dict[str, int]) -> Fabric:
    """The network under a mesh, laid out as make_mesh would."""
    placed: Any = None
    if topology.chip.is_tpu:
        sizes = MeshConfig(**mesh)
        placed = make_mesh(sizes, topology).devices.flat
    return Fabric(topology.chip, mesh, placed, topology.shape)


# ------------------------------------------------------------------------------ search


def search(config: TrainConfig, topology: Topology, *, compile_best: int) -> list[Plan]:
    """Plans that fit, the shortest step first (of those within a percent, the one that
    needs least memory); on a TPU the first ones are compiled.

    Args: compile_best: how many to compile; they come before those that were not.
    """
    found = [p for p in estimates(config, topology) if p.safe]
    found.sort(key=_rank)
    if not topology.chip.is_tpu:
        return found
    best: list[Plan] = []
    tried = 0
    for candidate in found:
        if tried == compile_best:
            break
        tried += 1
        result = plan(candidate.config, topology)
        if result.fits:
            best.append(result)
    return sorted(best, key=_rank) + found[tried:]


def estimates(config: TrainConfig, topology: Topology) -> Iterator[Plan]:
    """Every valid combination of mesh, microbatches and remat policy, by formula."""
    for mesh in _meshes(topology.n_devices, config.seq_len):
        try:
            fabric = fabric_of(topology, mesh)
        except ConfigError:
            continue  # it cannot lie on the slice
        for parts, remat in itertools.product(_parts(config, mesh), REMAT):
            candidate = change(config, mesh=mesh, microbatches=parts, remat=remat)
            if check_mesh(candidate, topology.n_devices):
                continue
            figures = _estimate(candidate, topology)
            yield _plan(candidate, topology, figures, fabric)


def change(
    config: TrainConfig, *, mesh: dict[str, int], microbatches: int, remat: str
) -> TrainConfig:
    """``config`` with the three knobs of the search set."""
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        microbatches=microbatches,
        model=dataclasses.replace(config.model, remat=remat),
    )


def nearest(config: TrainConfig, result: Plan) -> Plan | None:
    """The change of fewest knobs, and then of least cost, after which it fits.

    By formula, scaled by what the compiler found for ``config`` itself; None where
    nothing helps.
    """
    topology = result.topology
    here = _estimate(config, topology)
    # What the formula missed here it will miss nearby; without a compiler all it may.
    scale = max(result.needed / here.memory.peak, 1.0)
    if result.figures is not None and result.figures.source == "analytic":
        scale = 1 + FORMULA_ERROR
    limit = topology.chip.hbm_gib * GIB / scale
    fitting = [p for p in estimates(config, topology) if p.needed <= limit]
    return min(
        fitting, key=lambda p: (*_distance(config, here, p), *_rank(p)), default=None
    )


def _distance(config: TrainConfig, here: Figures, other: Plan) -> tuple[int, int]:
    """Knobs that differ; a mesh, which moves every array, and the host's memory, which
    is far, count twice."""
    mesh = 2 * (other.figures.mesh != here.mesh)
    remat = int(other.config.model.remat != config.model.remat)
    remat *= 2 if other.config.model.remat == "offload" else 1
    parts = other.config.microbatches != config.microbatches
    return mesh + remat + parts, int(parts)


def describe(config: TrainConfig, other: Plan) -> str:
    """The flags that turn ``config`` into ``other``.

    Only those that differ: --mesh, --config.microbatches, --config.model.remat.
    """
    flags = []
    here = analytic.mesh_sizes(config.mesh, other.topology.n_devices)
    if other.figures.mesh != here:
        sizes = ",".join(f"{k}={v}" for k, v in other.figures.mesh.items())
        flags.append(f"--mesh {sizes}")
    if other.config.microbatches != config.microbatches:
        flags.append(f"--config.microbatches={other.config.microbatches}")
    if other.config.model.remat != config.model.remat:
        flags.append(f"--config.model.remat={other.config.model.remat}")
    return " ".join(flags) or "as it is"


def _rank(plan: Plan) -> tuple[float, int]:
    """The shorter step; of those within a percent, the one that needs less memory."""
    return round(math.log(plan.roofline.exposed), 2), plan.needed


def _meshes(n: int, seq_len: int) -> Iterator[dict[str, int]]:
    """data x fsdp x tensor x context over ``n`` devices."""
    for tensor, context in itertools.product(_divisors(n), _divisors(n)):
        long = context == 1 or seq_len // context >= MIN_PART
        if tensor > MAX_TENSOR or n % (tensor * context) or not long:
            continue
        rest = n // (tensor * context)
        for fsdp in _divisors(rest):
            yield {
                "data": rest // fsdp,
                "fsdp": fsdp,
                "tensor": tensor,
                "context": context,
            }


def _parts(config: TrainConfig, mesh: dict[str, int]) -> list[int]:
    """Microbatch counts that divide the rows of a device."""
    rows, rest = divmod(config.global_batch_size, mesh["data"] * mesh["fsdp"])
    return [] if rest or not rows else _divisors(rows)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
