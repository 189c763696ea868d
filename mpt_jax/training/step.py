"""One training step as a sharded, donated jit program.

    grads = sum over microbatches of d(sum of losses) / (number of learned tokens)
    clip by global norm -> optimizer -> apply, unless loss or norm is not finite

Sums divided once at the end make microbatches weigh by their real tokens, so any number
of them gives the full batch's gradient (Composer's accumulate_train_batch_on_tokens).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax import optim, partitioning, runtime
from mpt_jax.config import LossConfig, ModelConfig, TrainConfig
from mpt_jax.models import heads, mpt
from mpt_jax.objectives import LossSums, next_token_loss
from mpt_jax.partitioning import shard
from mpt_jax.training.layout import Layout

Batch = dict[str, jax.Array]
# (params, batch, dropout_key or None) -> sums; "total" is differentiated.
Objective = Callable[[mpt.Params, Batch, jax.Array | None], LossSums]


class TrainState(NamedTuple):
    """Everything a step changes.

    step: int32, batches seen; skipped: int32, those whose update was not applied.
    """

    step: jax.Array
    skipped: jax.Array
    params: mpt.Params
    opt_state: Any


def pretraining(model: ModelConfig, loss: LossConfig) -> Objective:
    """Next-token prediction over packed rows: tokens, loss_mask, segment_ids (B, L).

    Segments reach the model only where it keeps documents apart: packed rows have no
    padding to hide, and a mask costs time.
    """
    packed = model.attn_config.attn_uses_sequence_id

    def objective(
        params: mpt.Params, batch: Batch, dropout_key: jax.Array | None
    ) -> LossSums:
        hidden_BLE = mpt.hidden_states(
            model,
            params,
            batch["tokens"],
            segment_ids_BL=batch["segment_ids"] if packed else None,
            dropout_key=dropout_key,
        )
        return next_token_loss(
            hidden_BLE,
            mpt.unembedding(model, params),
            batch["tokens"],
            batch["loss_mask"],
            logit_scale=model.logit_multiplier,
            logit_softcap=model.final_logit_softcapping,
            z_loss=loss.z_loss,
            chunk_tokens=loss.chunk_tokens,
        )

    return objective


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled verbs of a run on one mesh.

    init(rng) -> TrainState; step(state, batch) -> (TrainState, metrics), donates state;
    evaluate(params, batch) -> LossSums. ``struct`` is the state as ShapeDtypeStructs
    with shardings: what --dry_run and ahead-of-time compilation take; ``stored`` is it
    in a checkpoint, which may be another form (training/layout.py).

    Both of these take fields of TrainState by name and return them: to_memory what a
    checkpoint holds, giving it up; to_stored what it shall hold, where on_host in host
    memory. Every process calls them.
    """

    mesh: Mesh
    struct: TrainState
    stored: TrainState
    batch_sharding: NamedSharding
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[mpt.Params, Batch], LossSums]
    axes: TrainState
    layout: Layout

    def to_memory(self, items: Mapping[str, Any]) -> dict[str, Any]:
        axes = {name: getattr(self.axes, name) for name in items}
        return self.layout.to_memory(dict(items), axes)

    def to_stored(
        self, items: Mapping[str, Any], *, on_host: bool = False
    ) -> dict[str, Any]:
        axes = {name: getattr(self.axes, name) for name in items}
        return self.layout.to_stored(dict(items), axes, on_host=on_host)

    def batch_struct(self, config: TrainConfig) -> Batch:
        shape = (config.global_batch_size, config.seq_len)
        leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return dict.fromkeys(("tokens", "loss_mask", "segment_ids"), leaf)


def make_program(
    config: TrainConfig, mesh: Mesh, *, objective: Objective | None = None
) -> Program:
    """Builds the step of ``config`` on ``mesh``. Call and use it under use(mesh)."""
    objective = objective or pretraining(config.model, config.loss)
    layout = _layout(config, mesh)
    axes = _state_axes(config)
    stored = _state_struct(config, mesh, axes)
    struct = layout.struct(stored, axes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, struct)
    replicated = NamedSharding(mesh, PartitionSpec())
    # Rows are split over data and fsdp; the sequence over context.
    batch_sharding = NamedSharding(mesh, partitioning.spec(("batch", "length")))
    optimizer = _optimizer(config, struct.params)

    def init(rng: jax.Array) -> TrainState:
        params = layout.arrange(mpt.init(config.model, rng), axes.params)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, params, optimizer.init(params))

    def step(
        state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        with heads.arranged(layout.head_order):
            grads, sums = _gradients(
                objective,
                state.params,
                batch,
                key,
                shardings=shardings.params,
                parts=config.microbatches,
            )
        return _update(config, optimizer, state, grads, sums)

    def evaluate(params: mpt.Params, batch: Batch) -> LossSums:
        with heads.arranged(layout.head_order):
            return objective(params, batch, None)

    return Program(
        mesh=mesh,
        struct=struct,
        stored=stored,
        batch_sharding=batch_sharding,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, replicated),
            compiler_options=runtime.compiler_options(mesh),
        ),
        evaluate=jax.jit(
            evaluate,
            in_shardings=(shardings.params, batch_sharding),
            out_shardings=replicated,
        ),
        axes=axes,
        layout=layout,
    )


def _layout(config: TrainConfig, mesh: Mesh) -> Layout:
    # Adafactor's row and column statistics do not say which of their dims is heads, and
    # it takes the RMS of a leaf: of all layers, whether they are scanned or not.
    if config.optim.name == "adafactor":
        return Layout(None, False)
    order = heads.order(
        config.model, shards=mesh.shape["tensor"], length=config.seq_len
    )
    return Layout(order, not config.model.scan_layers)


def _optimizer(config: TrainConfig, params: Any) -> optax.GradientTransformation:
    return optim.make_optimizer(
        config.optim,
        params,
        total_steps=config.total_steps,
        warmup_steps=config.warmup_steps,
    )


def _abstract_state(config: TrainConfig) -> TrainState:
    params = mpt.abstract_params(config.model)
    opt_state = jax.eval_shape(_optimizer(config, params).init, params)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(counter, counter, params, opt_state)


def _state_axes(config: TrainConfig) -> TrainState:
    """The state with the logical axes of each leaf in its place."""
    axes = mpt.param_axes(config.model)
    opt_state = _abstract_state(config).opt_state
    return TrainState((), (), axes, optim.state_axes(opt_state, axes))


def _state_struct(config: TrainConfig, mesh: Mesh, axes: TrainState) -> TrainState:

    def place(leaf: jax.ShapeDtypeStruct, axes: partitioning.Axes) -> Any:
        named = partitioning.sharding(mesh, axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)

    return jax.tree.map(place, _abstract_state(config), axes)


def _gradients(
    objective: Objective,
    params: mpt.Params,
    batch: Batch,
    key: jax.Array,
    *,
    shardings: Any,
    parts: int,
) -> tuple[mpt.Params, LossSums]:
    """Gradient of the summed loss over ``parts`` microbatches, and the sums."""

    def total(params: mpt.Params, batch: Batch, key: jax.Array) -> Any:
        sums = objective(params, batch, key)
        return sums.total, sums

    def constrain(grads: mpt.Params) -> mpt.Params:
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, shardings)

    grad = jax.grad(total, has_aux=True)
    if parts == 1:
        grads, sums = grad(params, batch, key)
        return constrain(grads), sums

    def split(x_BL: jax.Array) -> jax.Array:
        # Row r goes to part r % parts, so that no row leaves its device.
        x = jnp.swapaxes(x_BL.reshape(-1, parts, *x_BL.shape[1:]), 0, 1)
        return shard(x, None, "batch", "length")

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        grads, sums = grad(params, *part)
        carry = jax.tree.map(jnp.add, carry, (grads, sums))  # in float32
        return (constrain(carry[0]), carry[1]), None

    zeros = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        LossSums(*[jnp.zeros(())] * 4),
    )
    keys = jax.random.split(key, parts)
    (grads, sums), _ = jax.lax.scan(add, zeros, (jax.tree.map(split, batch), keys))
    return grads, sums


def _update(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: mpt.Params,
    sums: LossSums,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies the mean gradient, or leaves params and opt_state as they are."""
    tokens = jnp.maximum(sums.weight, 1)
    grads, grad_norm = optim.clip_by_global_norm(
        grads, config.optim.clip_norm, divisor=tokens
    )
    loss = sums.ce / tokens
    finite = jnp.isfinite(sums.total) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    schedule = optim.learning_rate(
        config.optim, total_steps=config.total_steps, warmup_steps=config.warmup_steps
    )
    metrics = {
        "loss": loss,
        "z": sums.z / tokens,
        "learned_tokens": sums.weight,
        "finite": finite,
        "learning_rate": schedule(state.step - state.skipped),
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(state.params),
        "update_norm": optax.tree.norm(updates),
    }
    new = TrainState(
        state.step + 1,
        state.skipped + jnp.where(finite, 0, 1),
        keep(params, state.params),
        keep(opt_state, state.opt_state),
    )
    return new, metrics
