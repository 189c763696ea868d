"""What the engine runs on the devices, compiled once per shape.

Every program takes the State and gives it back, updated in place.

Dims as elsewhere; B here is the rows of a batch, the first of the cache's slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpt_jax.config import ModelConfig
from mpt_jax.generation import sampling
from mpt_jax.generation.sampling import Drawn, Rows
from mpt_jax.models import cache as kv
from mpt_jax.models import mpt
from mpt_jax.partitioning import shard

SCORED_AT_ONCE = 32  # prompt tokens whose logits exist together: 6 MB of GPT-NeoX's


class State(NamedTuple):
    """All that a slot is on the devices. token_B: the last drawn, not in the cache."""

    cache: kv.Cache
    rows: Rows
    token_B: jax.Array


def make_state(cfg: ModelConfig, n_slots: int, columns: int) -> State:
    rows = jax.jit(sampling.make_rows, static_argnums=(0, 1))(n_slots, cfg.vocab_size)
    token_B = jnp.zeros(n_slots, jnp.int32)
    return _placed(State(kv.make(cfg, n_slots, columns), rows, token_B))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def prefill(
    cfg: ModelConfig,
    vocab_size: int,
    reach: int,
    params: mpt.Params,
    state: State,
    tokens_L: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    n: jax.Array,
    total: jax.Array,
) -> tuple[jax.Array, Drawn, State]:
    """Reads ``n`` tokens (and padding) from position ``start`` on into a slot.

    total: the prompt's length. The chunk that reaches it draws the first new token.
    Returns: the chunk's states x_LE, what was drawn (B = 1) as by decode, the state.
    """
    n_prefix = total if cfg.attn_config.prefix_lm else None
    x_LE, cache = mpt.prefill(
        cfg, params, state.cache, tokens_L, slot=slot, start=start, reach=reach,
        n_prefix=n_prefix,
    )  # fmt: skip
    x_1LE = lax.dynamic_slice_in_dim(x_LE, n - 1, 1)[None]
    logits_1V = _whole(mpt.logits(cfg, params, x_1LE)[:, 0])
    slots_1, end_1 = slot[None], (start + n)[None]
    drawn, rows = sampling.draw(
        logits_1V, state.rows, slots_B=slots_1, position_B=end_1,
        live_B=end_1 == total, vocab_size=vocab_size,
    )  # fmt: skip
    token_B = state.token_B.at[slots_1].set(drawn.id_B)
    drawn = jax.tree.map(lambda a: a[None], drawn)
    return x_LE, drawn, _placed(State(cache, rows, token_B))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    cfg: ModelConfig,
    vocab_size: int,
    n: int,
    params: mpt.Params,
    state: State,
    lengths_B: jax.Array,
) -> tuple[Drawn, State]:
    """``n`` times: appends each slot's last token and draws the next.

    lengths_B: what a slot holds; -1: not this one. Returns: what was drawn, with a
    leading dim n; the state.
    """
    slots_B, live_B = jnp.arange(lengths_B.shape[0]), lengths_B >= 0

    def one(state: State, i: jax.Array) -> tuple[State, Drawn]:
        token_B = state.token_B[: len(slots_B)]
        at_B = jnp.where(live_B, lengths_B + i, -1)
        x_B1E, cache = mpt.decode(
            cfg, params, state.cache, jnp.where(live_B, token_B, 0)[:, None], at_B
        )
        logits_BV = _whole(mpt.logits(cfg, params, x_B1E)[:, 0])
        drawn, rows = sampling.draw(
            logits_BV, state.rows, slots_B=slots_B, position_B=at_B + 1,
            live_B=live_B, vocab_size=vocab_size,
        )  # fmt: skip
        token_B = state.token_B.at[slots_B].set(jnp.where(live_B, drawn.id_B, token_B))
        return _placed(State(cache, rows, token_B)), drawn

    state, drawn = lax.scan(one, state, jnp.arange(n, dtype=jnp.int32))
    return drawn, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    cfg: ModelConfig,
    vocab_size: int,
    params: mpt.Params,
    x_LE: jax.Array,
    targets_L: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log P of the token after each state, and the likeliest: see sampling.score."""

    def one(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_E, target = pair
        logits_1V = mpt.logits(cfg, params, x_E[None, None])[0]
        found = sampling.score(_whole(logits_1V), target[None], vocab_size=vocab_size)
        return tuple(a[0] for a in found)

    return lax.map(one, (x_LE, targets_L), batch_size=SCORED_AT_ONCE)


@functools.partial(jax.jit, donate_argnums=0)
def set_row(state: State, slot: jax.Array, row: Rows) -> State:
    """What a slot's new request asks for."""
    rows = jax.tree.map(lambda a, one: a.at[slot].set(one), state.rows, row)
    return _placed(state._replace(rows=rows))


@functools.partial(jax.jit, donate_argnums=0)
def copy_slot(state: State, source: jax.Array, target: jax.Array) -> State:
    """The keys and values of one slot also in another."""
    return state._replace(cache=kv.copy_slot(state.cache, source, target))


@functools.partial(jax.jit, donate_argnums=0)
def clear(state: State, slot: jax.Array) -> State:
    """Zeros in a slot that held what is not finite, which no mask can hide."""
    cache = jax.tree.map(lambda a: a.at[slot].set(0), state.cache)
    return state._replace(cache=cache)


@functools.partial(jax.jit, static_argnums=(0, 2))
def grow(cfg: ModelConfig, cache: kv.Cache, columns: int) -> kv.Cache:
    return kv.grow(cache, columns)


def _whole(logits_BV: jax.Array) -> jax.Array:
    """On every device: a draw looks at all of a row."""
    return shard(logits_BV, None, None)


def _placed(state: State) -> State:
    """All but the cache whole on every device, in and out alike."""
    whole = lambda a: shard(a, *(None,) * a.ndim)  # noqa: E731
    return state._replace(rows=jax.tree.map(whole, state.rows),
                          token_B=whole(state.token_B))  # fmt: skip
