"""The compiler's figures of generation: a chunk of a prompt, or one token per slot."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax import partitioning
from mpt_jax.config import ModelConfig, TrainConfig
from mpt_jax.errors import ConfigError, UserError
from mpt_jax.generation import programs
from mpt_jax.kernels.decode import STEP
from mpt_jax.models import mpt
from mpt_jax.planning import collectives, compiled, hlo, work
from mpt_jax.planning.figures import Figures, Memory, roofline
from mpt_jax.planning.report import Plan
from mpt_jax.planning.topology import Fabric, Topology, make_mesh
from mpt_jax.validate import check_mesh


@dataclasses.dataclass(frozen=True)
class Load:
    """slots: sequences at once; capacity: tokens that each can hold; chunk: of a prompt
    that is read at a time."""

    slots: int = 8
    capacity: int = 2048
    chunk: int = 512


def plan(
    config: TrainConfig,
    topology: Topology,
    what: Literal["prefill", "decode"],
    load: Load,
) -> Plan:
    """Compiles the engine's own program, in bfloat16, at its fullest.

    Raises: ConfigError: another mesh than tensor, or one that does not divide the
      model. UserError: no compiler for these devices.
    """
    if not topology.chip.is_tpu:
        raise UserError(
            f"--what {what}: there is no formula for GPUs; name a TPU slice"
        )
    tensor_only = {"data": 1, "fsdp": 1, "context": 1}
    mesh_config = dataclasses.replace(config.mesh, **tensor_only)
    config = dataclasses.replace(
        config,
        mesh=mesh_config,
        model=dataclasses.replace(config.model, param_dtype="bfloat16"),
    )
    if problems := check_mesh(config, topology.n_devices):
        raise ConfigError(problems, location=topology.name)
    mesh = make_mesh(mesh_config, topology)
    fabric = Fabric(topology.chip, dict(mesh.shape), mesh.devices.flat, topology.shape)
    detail = f"{load.slots} slots of {load.capacity:,} tokens"
    detail += f", {load.chunk} tokens of a prompt" if what == "prefill" else ""
    with partitioning.use(mesh, batch=(), length=(), kv_length=()):
        try:
            figures = _compile(config.model, mesh, what, load)
        except compiled.TooBig as error:
            return Plan(what, config, topology, needed=error.needed, detail=detail)
    return Plan(
        what,
        config,
        topology,
        needed=figures.memory.peak,
        figures=figures,
        roofline=roofline(figures, fabric),
        detail=detail,
    )


def _compile(cfg: ModelConfig, mesh: Mesh, what: str, load: Load) -> Figures:
    params, state = _params(cfg, mesh), _state(cfg, mesh, load)
    whole = NamedSharding(mesh, PartitionSpec())

    def number(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

    if what == "decode":
        tokens, reach = load.slots, float(load.capacity)
        args = cfg, cfg.vocab_size, 1, params, state, number(load.slots)
        traced = programs.decode.trace(*args)
    else:
        tokens, reach = load.chunk, load.capacity - load.chunk / 2
        args = cfg, cfg.vocab_size, load.capacity, params, state
        rest = number(load.chunk), *(number() for _ in range(4))
        traced = programs.prefill.trace(*args, *rest)
    rounds = -(-load.capacity // STEP)  # over the keys of full slots
    begin = time.monotonic()
    try:
        executable = traced.lower().compile()
    except Exception as error:
        raise (compiled.too_big(error, time.monotonic() - begin) or error) from None
    seconds = time.monotonic() - begin
    module = hlo.parse(executable.as_text())
    attention = 4 * cfg.n_layers * cfg.n_heads * cfg.d_head * reach
    flops = tokens * (2.0 * mpt.count_params(cfg) + attention)
    return Figures(
        source="compiled",
        mesh=dict(mesh.shape),
        tokens=tokens,
        memory=Memory(
            parameters=partitioning.placement(params).device_bytes,
            optimizer=0,
            batch=0,
            cache=partitioning.placement(state.cache).device_bytes,
            peak=executable.memory_analysis().peak_memory_in_bytes,
        ),
        model_flops=flops,
        causal_flops=flops,
        executed_flops=work.matmul_flops(traced.jaxpr.jaxpr, rounds=rounds),
        hbm_bytes=work.hbm_bytes(module, rounds=rounds),
        collectives=collectives.find(module, dict(mesh.shape)),
        compile_seconds=seconds,
    )


def _params(cfg: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """What models.weights.unstack gives, as ShapeDtypeStructs with shardings."""

    def place(stacked: bool) -> Any:
        def leaf(spec: mpt.ParamSpec) -> jax.ShapeDtypeStruct:
            shape, axes = spec.shape[stacked:], spec.axes[stacked:]
            sharding = partitioning.sharding(mesh, axes, shape)
            return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding)

        return leaf

    specs = mpt.param_specs(cfg)
    layer = jax.tree.map(place(stacked=True), specs.pop("blocks"))
    rest = jax.tree.map(place(stacked=False), specs)
    return {**rest, "blocks": (layer,) * cfg.n_layers}


def _state(cfg: ModelConfig, mesh: Mesh, load: Load) -> programs.State:
    """The engine's, as ShapeDtypeStructs: the cache's heads over tensor, the rest on
    every device."""
    state = jax.eval_shape(lambda: programs.make_state(cfg, load.slots, load.capacity))
    heads = "act_heads" if cfg.n_kv_heads > 1 else None

    def place(axes: tuple[str | None, ...]) -> Any:
        def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            named = (*axes, *(None,) * (x.ndim - len(axes)))
            sharding = partitioning.sharding(mesh, named, x.shape)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return leaf

    return state._replace(
        cache=jax.tree.map(place((None, heads)), state.cache),
        rows=jax.tree.map(place(()), state.rows),
        token_B=place(())(state.token_B),
    )
