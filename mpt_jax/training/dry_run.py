"""``--dry_run``: what a config would train, and whether it fits, without training."""

from __future__ import annotations

import math

import jax

from mpt_jax import partitioning
from mpt_jax.config import TrainConfig
from mpt_jax.errors import ConfigError
from mpt_jax.models import mpt
from mpt_jax.training.metrics import flops_per_token
from mpt_jax.training.step import Program, make_program
from mpt_jax.validate import check_mesh

GIB = 2**30


def dry_run(config: TrainConfig) -> str:
    """Parameters, shardings, tokens, FLOPs and memory of ``config`` on these devices.

    Compiles the step for the devices at hand, so that "temporaries" is the compiler's
    figure and not an estimate; allocates nothing.
    Raises: ConfigError: the mesh does not fit the devices.
    """
    if problems := check_mesh(config, jax.device_count()):
        raise ConfigError(problems)
    with partitioning.use(partitioning.make_mesh(config.mesh)) as mesh:
        program = make_program(config, mesh)
        return "\n".join(
            [*_parameters(config), "", *_tokens(config), "", *_memory(config, program)]
        )


def _parameters(config: TrainConfig) -> list[str]:
    rows = []
    for path, spec in jax.tree_util.tree_leaves_with_path(
        mpt.param_specs(config.model)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = " x ".join(map(str, spec.shape))
        rows.append((name, shape, str(spec.dtype), str(partitioning.spec(spec.axes))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    total = f"parameters    {mpt.count_params(config.model):,}"
    return [*(line.rstrip() for line in table), "", total]


def _tokens(config: TrainConfig) -> list[str]:
    n_params = mpt.count_params(config.model)
    flops = flops_per_token(config.model, config.seq_len, n_params)
    tokens = config.total_steps * config.tokens_per_step
    return [
        f"tokens        {config.tokens_per_step:,} x {config.total_steps:,} steps "
        f"= {tokens:,} ({tokens / n_params:.1f} per parameter)",
        f"FLOPs         {flops.full:.3g} a token ({flops.causal:.3g} causal), "
        f"{flops.full * tokens:.3g} in all",
    ]


def _memory(config: TrainConfig, program: Program) -> list[str]:
    mesh = " x ".join(f"{n}={s}" for n, s in program.mesh.shape.items())
    params = partitioning.placement(program.struct.params)
    optimizer = partitioning.placement(program.struct.opt_state)
    step = program.step.lower(program.struct, program.batch_struct(config)).compile()
    lines = [
        f"mesh          {mesh}: {math.prod(program.mesh.shape.values())} x "
        f"{jax.devices()[0].device_kind}",
        "per device    "
        f"parameters {params.device_bytes / GIB:.3f} GiB, optimizer "
        f"{optimizer.device_bytes / GIB:.3f} GiB (in all "
        f"{(params.total_bytes + optimizer.total_bytes) / GIB:.3f} GiB)",
    ]
    if (analysis := step.memory_analysis()) is not None:
        state = analysis.argument_size_in_bytes / GIB
        temporary = analysis.temp_size_in_bytes / GIB
        lines.append(
            f"              compiled step: state and batch {state:.3f} GiB + "
            f"temporaries {temporary:.3f} GiB = {state + temporary:.3f} GiB"
        )
    return lines
