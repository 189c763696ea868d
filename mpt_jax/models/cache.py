"""The key-value cache of generation: one layout for every backend and every layer.

A row of the cache is a slot, which holds the keys and values of one sequence from
column 0 on. ALiBi puts no position into a key, so that what a slot holds stays right
whatever comes after it, and two prompts may share the cache of their common beginning.

Dims: B slots; S columns (the capacity), a multiple of NORM_BLOCK; K, D as elsewhere;
J = S / NORM_BLOCK.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpt_jax.config import ModelConfig
from mpt_jax.kernels import skip
from mpt_jax.kernels.decode import NORM_BLOCK, add_key_norms
from mpt_jax.partitioning import shard


class LayerCache(NamedTuple):
    """One layer's: k and v in the compute dtype; the largest norm of each block of
    keys in float32, from which kernels.decode proves what need not be read."""

    k_BKSD: jax.Array
    v_BKSD: jax.Array
    norms_BKJ: jax.Array


Cache = tuple[LayerCache, ...]


def make(cfg: ModelConfig, n_slots: int, capacity: int) -> Cache:
    """An empty cache; under partitioning.use(mesh) its heads are sharded as the model.

    Raises: ValueError: a capacity that is no multiple of NORM_BLOCK.
    """
    if capacity < 1 or capacity % NORM_BLOCK:
        raise ValueError(
            f"capacity: got {capacity}, expected a multiple of {NORM_BLOCK}"
        )

    @jax.jit
    def zeros() -> Cache:
        shape = n_slots, cfg.n_kv_heads, capacity, cfg.d_head
        kv = jnp.zeros(shape, jnp.dtype(cfg.compute_dtype))
        norms = jnp.zeros((*shape[:2], capacity // NORM_BLOCK), jnp.float32)
        return tuple(_sharded(cfg, kv, kv, norms) for _ in range(cfg.n_layers))

    return zeros()


def n_bytes(cfg: ModelConfig, n_slots: int, capacity: int) -> int:
    """What make() allocates, over all devices."""
    heads = cfg.n_layers * n_slots * cfg.n_kv_heads
    item = jnp.dtype(cfg.compute_dtype).itemsize
    return heads * (2 * capacity * cfg.d_head * item + 4 * (capacity // NORM_BLOCK))


def capacity(cache: Cache) -> int:
    return cache[0].k_BKSD.shape[2]


def grow(cache: Cache, capacity: int) -> Cache:
    """The same sequences in a larger cache."""

    def grown(a: jax.Array, axis: int, size: int) -> jax.Array:
        widths = [(0, 0)] * a.ndim
        widths[axis] = (0, size - a.shape[axis])
        return jnp.pad(a, widths)

    return tuple(
        LayerCache(
            grown(layer.k_BKSD, 2, capacity),
            grown(layer.v_BKSD, 2, capacity),
            grown(layer.norms_BKJ, 2, capacity // NORM_BLOCK),
        )
        for layer in cache
    )


def copy_slot(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """Slot ``target`` holds what ``source`` does; both may be traced."""

    def copied(a: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(
            a, lax.dynamic_index_in_dim(a, source, keepdims=False), target, 0
        )

    return jax.tree.map(copied, cache)


def write_chunk(
    cfg: ModelConfig,
    layer: LayerCache,
    k_LKD: jax.Array,
    v_LKD: jax.Array,
    *,
    slot: jax.Array,
    start: jax.Array,
) -> LayerCache:
    """Writes L columns of one slot from ``start`` on, where they must fit.

    The norms of later columns are forgotten: what they held is not reachable any more.
    """
    at = slot, 0, start, 0
    k = lax.dynamic_update_slice(layer.k_BKSD, k_LKD.swapaxes(0, 1)[None], at)
    v = lax.dynamic_update_slice(layer.v_BKSD, v_LKD.swapaxes(0, 1)[None], at)
    _, K, J = layer.norms_BKJ.shape
    kept_1KJ = lax.dynamic_slice(layer.norms_BKJ, (slot, 0, 0), (1, K, J))
    kept_1KJ = jnp.where(jnp.arange(J) * NORM_BLOCK < start, kept_1KJ, 0)
    new_1KJ = add_key_norms(kept_1KJ, k_LKD.swapaxes(0, 1)[None], start[None])
    norms = lax.dynamic_update_slice(layer.norms_BKJ, new_1KJ, (slot, 0, 0))
    return _sharded(cfg, k, v, norms)


def write_tokens(
    cfg: ModelConfig,
    layer: LayerCache,
    k_BLKD: jax.Array,
    v_BLKD: jax.Array,
    lengths_B: jax.Array,
) -> LayerCache:
    """Appends L columns to each of the first B slots, which hold lengths_B; a slot of
    negative length stays as it is, and so does what does not fit."""
    B, L = k_BLKD.shape[:2]
    S = layer.k_BKSD.shape[2]
    column_BL = lengths_B[:, None] + jnp.arange(L)[None]
    column_BL = jnp.where(lengths_B[:, None] < 0, S, column_BL)  # S is dropped
    rows_B1 = jnp.arange(B)[:, None]
    k = layer.k_BKSD.at[rows_B1, :, column_BL].set(k_BLKD, mode="drop")
    v = layer.v_BKSD.at[rows_B1, :, column_BL].set(v_BLKD, mode="drop")
    block_BL = column_BL // NORM_BLOCK
    norms_BLK = skip.norms(k_BLKD)
    norms = layer.norms_BKJ.at[rows_B1, :, block_BL].max(norms_BLK, mode="drop")
    # Else XLA puts the update into each of its readers, on a copy of the whole cache.
    k, v, norms = lax.optimization_barrier((k, v, norms))
    return _sharded(cfg, k, v, norms)


def read_slot(
    layer: LayerCache, slot: jax.Array, reach: int
) -> tuple[jax.Array, jax.Array]:
    """The first ``reach`` keys and values of one slot, as (1, reach, K, D)."""
    _, K, _, D = layer.k_BKSD.shape
    k, v = (
        lax.dynamic_slice(a, (slot, 0, 0, 0), (1, K, reach, D)).swapaxes(1, 2)
        for a in (layer.k_BKSD, layer.v_BKSD)
    )
    return k, v


def _sharded(
    cfg: ModelConfig, k: jax.Array, v: jax.Array, norms: jax.Array
) -> LayerCache:
    heads = "act_heads" if cfg.n_kv_heads > 1 else None
    return LayerCache(
        shard(k, None, heads, None, None),
        shard(v, None, heads, None, None),
        shard(norms, None, heads, None),
    )
