"""The compiler's figures: compiles the very step that train.py runs."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

from mpt_jax import partitioning
from mpt_jax.config import TrainConfig
from mpt_jax.errors import ConfigError
from mpt_jax.models import mpt
from mpt_jax.planning import collectives, hlo, work
from mpt_jax.planning.chips import GIB
from mpt_jax.planning.figures import Figures, Memory
from mpt_jax.planning.topology import Fabric, Topology, make_mesh
from mpt_jax.training.metrics import flops_per_token
from mpt_jax.training.step import make_program
from mpt_jax.validate import check_mesh


class TooBig(Exception):
    """The compiler found no way to fit the program into memory; ``needed`` bytes."""

    def __init__(self, needed: int, message: str, seconds: float):
        super().__init__(message)
        self.needed, self.seconds = needed, seconds


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step with what it was compiled from; ``text`` is its HLO."""

    figures: Figures
    fabric: Fabric
    text: str


def train_step(config: TrainConfig, topology: Topology) -> Step:
    """Compiles the training step of ``config`` for ``topology``.

    Raises: ConfigError: the mesh does not fit. UserError: no compiler for these
      devices. TooBig: it needs more memory than a device has.
    """
    if problems := check_mesh(config, topology.n_devices):
        raise ConfigError(problems, location=topology.name)
    mesh = make_mesh(config.mesh, topology)
    return compile_step(config, mesh, Fabric(
        topology.chip, dict(mesh.shape), mesh.devices.flat, topology.shape
    ))  # fmt: skip


def compile_step(config: TrainConfig, mesh: Any, fabric: Fabric) -> Step:
    """As train_step, for any mesh: of this machine's devices, too."""
    with partitioning.use(mesh):
        program = make_program(config, mesh)
        traced = program.step.trace(program.struct, program.batch_struct(config))
        lowered = traced.lower()
        begin = time.monotonic()
        try:
            executable = lowered.compile()
        except Exception as error:
            seconds = time.monotonic() - begin
            raise (too_big(error, seconds) or error) from None
        seconds = time.monotonic() - begin
    text = executable.as_text()
    module = hlo.parse(text)
    flops = flops_per_token(
        config.model, config.seq_len, mpt.count_params(config.model)
    )
    struct, tokens = program.struct, config.tokens_per_step
    memory = executable.memory_analysis()
    host = memory.host_temp_size_in_bytes
    batch = partitioning.placement(program.batch_struct(config)).device_bytes
    figures = Figures(
        source="compiled",
        mesh=dict(mesh.shape),
        tokens=tokens,
        memory=Memory(
            parameters=partitioning.placement(struct.params).device_bytes,
            optimizer=partitioning.placement(struct.opt_state).device_bytes,
            batch=batch,
            peak=memory.peak_memory_in_bytes,
            host=host,
        ),
        model_flops=tokens * flops.full,
        causal_flops=tokens * flops.causal,
        executed_flops=work.matmul_flops(traced.jaxpr.jaxpr),
        hbm_bytes=work.hbm_bytes(module),
        collectives=collectives.find(module, dict(mesh.shape)),
        host_bytes=2 * host * config.microbatches,  # there and back
        compile_seconds=seconds,
    )
    return Step(figures, fabric, text)


def too_big(error: Exception, seconds: float) -> TooBig | None:
    """What the compiler says when memory is short, read; None for other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    used = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", text) or re.search(
        r"temporaries \(([\d.]+)([GMK])\)", text
    )
    if used is None:
        return None
    scale = {"G": GIB, "M": 2**20, "K": 2**10}[used[2]]
    return TooBig(int(float(used[1]) * scale), text.splitlines()[0], seconds)
