"""Attention of one or a few new queries against the KV cache, reading little of it.

Decoding is bound by the bytes of the cache that it reads. Three kinds need no reading:
columns that a row has not reached, columns behind a window, and columns that ALiBi has
erased for a head, which the rule of ``kernels.skip`` proves from norms: the cache keeps
the largest norm of each block of keys (``key_norms``), one number for 128 keys. In XLA
all rows and heads go over the same blocks, from the first that any needs to the last;
on a GPU a Triton kernel reads for every row and KV head its own blocks only.

The cache is K before S, so that a head's keys lie together. Keys carry no position
(ALiBi), so that a cache is never rewritten.

Dims beside the usual ones: G = H // K query heads per KV head; R = G * L query rows per
KV head; J blocks of NORM_BLOCK keys; T columns of one step.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import Rule
from mpt_jax.kernels.blocks import accumulator, einsum

NORM_BLOCK = 128
# A step of the XLA form: large enough that the loop around it costs nothing.
STEP = 256


def key_norms(k_BKSD: jax.Array) -> jax.Array:
    """(B, K, J) float32: the largest norm in each block of keys of a whole cache."""
    return skip.blocks(skip.norms(k_BKSD), NORM_BLOCK).max(-1)


def add_key_norms(
    norms_BKJ: jax.Array, k_BKLD: jax.Array, start_B: jax.Array
) -> jax.Array:
    """key_norms after L new keys were written from column start_B of each row on."""
    B, K, L, _ = k_BKLD.shape
    new_BKL = skip.norms(k_BKLD)
    block_BL = (start_B[:, None] + jnp.arange(L)[None, :]) // NORM_BLOCK
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    return norms_BKJ.at[rows, heads, block_BL[:, None, :]].max(new_BKL)


def decode_attention(
    q_BLHD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    lengths_B: jax.Array,
    slopes_H: jax.Array | None = None,
    *,
    rule: Rule,
    key_norms_BKJ: jax.Array | None = None,
    implementation: Literal["auto", "xla", "gpu"] = "auto",
) -> jax.Array:
    """Causal attention of the last L positions of each row.

    Row b holds lengths_B[b] keys, the new ones included; query l stands at position
    lengths_B[b] - L + l. Queries at negative positions return 0.

    Args:
      k_BKSD, v_BKSD: the cache, which may have more rows than q: the first B count,
        and cutting them out here spares a copy. What lies beyond a row's length is
        never used.
      lengths_B: int32, at most S; 0 for a row without queries.
      rule: causal; softmax_scale, window, logit_softcap and skip count.
      key_norms_BKJ: of the whole cache; without it nothing is skipped for the bias.
      implementation: "auto" takes the GPU kernel on NVIDIA GPUs, else XLA.

    Returns: out_BLHD in the dtype of q.
    Raises: ValueError: a bidirectional rule or dropout. NotImplementedError: "gpu" is
      named and cannot run the case.
    Numerics: logits and softmax in float32, matmuls in the dtype of q. Skipping changes
      the output by at most 2 eps max |v|, eps as in kernels.attention.
    """
    if not rule.causal or rule.dropout_rate:
        raise ValueError(f"rule: got {rule}, expected a causal one without dropout")
    first_BK = first_blocks(
        q_BLHD, k_BKSD, lengths_B, slopes_H, rule=rule, key_norms_BKJ=key_norms_BKJ
    )
    call = q_BLHD, k_BKSD, v_BKSD, lengths_B, slopes_H, first_BK, rule
    if implementation == "xla":
        return _decode_xla(*call)
    try:
        from mpt_jax.kernels.attention_gpu import decode_gpu

        return decode_gpu(*call)
    except NotImplementedError:
        if implementation == "gpu":
            raise
        return _decode_xla(*call)


def first_blocks(
    q_BLHD: jax.Array,
    k_BKSD: jax.Array,
    lengths_B: jax.Array,
    slopes_H: jax.Array | None,
    *,
    rule: Rule,
    key_norms_BKJ: jax.Array | None,
) -> jax.Array:
    """The first block of NORM_BLOCK keys that any query of each KV head needs.

    As skip.lower_key_blocks: blocks are passed over from the left while the bounds of
    their softmax mass, relative to a query's own key, sum to at most eps.

    Args, raises: as decode_attention. Returns: int32 (B, K).
    """
    (B, L, H, _), K = q_BLHD.shape, k_BKSD.shape[1]
    first_B = jnp.zeros((B,), jnp.int32)
    if rule.window is not None:
        oldest_B = lengths_B - L - rule.window
        first_B = jnp.maximum(oldest_B, 0).astype(jnp.int32) // NORM_BLOCK
    first_BK = jnp.broadcast_to(first_B[:, None], (B, K))
    eps = skip.skip_eps(rule)
    if slopes_H is None or key_norms_BKJ is None or not eps:
        return first_BK

    position_BL = lengths_B[:, None] - L + jnp.arange(L)[None, :]
    rows_B11, heads_1K1 = jnp.ogrid[:B, :K, :1][:2]
    own_BKLD = k_BKSD[rows_B11, heads_1K1, jnp.clip(position_BL, 0)[:, None]]
    own_BKLD = own_BKLD.astype(jnp.float32)
    q_BKGLD = _by_kv_head(q_BLHD, K).astype(jnp.float32)
    q_norms, own_norms = skip.norms(q_BKGLD), skip.norms(own_BKLD)
    rounding = skip.NORM_MARGIN * q_norms * own_norms[:, :, None]
    own = (q_BKGLD * own_BKLD[:, :, None]).sum(-1) * rule.softmax_scale
    least = rule.capped(own - abs(rule.softmax_scale) * rounding)
    top = q_norms[..., None] * key_norms_BKJ[:B, :, None, None]
    most = rule.capped(abs(rule.softmax_scale) * (1 + skip.NORM_MARGIN) * top)

    last_J = (jnp.arange(key_norms_BKJ.shape[-1], dtype=jnp.int32) + 1) * NORM_BLOCK - 1
    gap_BLJ = position_BL[..., None] - last_J[None, None, :]
    slopes_KG = lax.stop_gradient(slopes_H).astype(jnp.float32).reshape(K, H // K)
    slopes = slopes_KG[None, :, :, None, None]
    safe = jnp.where(slopes > 0, slopes, 1)
    sums = jnp.expm1(-safe * NORM_BLOCK) / jnp.expm1(-safe)  # of exp(-slope t)
    ratio = sums * jnp.exp(most - slopes * gap_BLJ[:, None, None] - least[..., None])
    provable = (gap_BLJ > 0)[:, None, None] & (slopes > 0)
    mass = jnp.cumsum(jnp.where(provable, ratio, jnp.inf), axis=-1)
    erased = (mass <= eps * skip.MASS_MARGIN).sum(
        -1, dtype=jnp.int32
    )  # NaN counts as not
    return jnp.maximum(first_BK, erased.min((2, 3)))


def keys_read(first_BK: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """(B, K): how many keys the GPU kernel reads of each row and KV head."""
    return jnp.maximum(lengths_B[:, None] - first_BK * NORM_BLOCK, 0)


def _decode_xla(
    q_BLHD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    lengths_B: jax.Array,
    slopes_H: jax.Array | None,
    first_BK: jax.Array,
    rule: Rule,
) -> jax.Array:
    (B, L, H, D), (_, K, S, _) = q_BLHD.shape, k_BKSD.shape
    G, step = H // K, min(STEP, S)
    q_BKRD = _by_kv_head(q_BLHD, K).reshape(B, K, G * L, D)
    acc_dtype = accumulator(q_BLHD)
    position_BL = lengths_B[:, None] - L + jnp.arange(L, dtype=jnp.int32)[None, :]
    position_BR = jnp.tile(position_BL, (1, G))
    bias_slope_KR = jnp.zeros((K, G * L), acc_dtype)
    if slopes_H is not None:
        slopes_KG = lax.stop_gradient(slopes_H).astype(acc_dtype).reshape(K, G)
        bias_slope_KR = jnp.repeat(slopes_KG, L, axis=1)

    # XLA's CPU back end leaves a product of one row to one thread.
    alone = G * L == 1 and jax.default_backend() == "cpu"

    def product(spec, rows_BKR, cache):
        if alone:
            return einsum(spec, jnp.repeat(rows_BKR, 2, axis=2), cache)[:, :, :1]
        return einsum(spec, rows_BKR, cache)

    def block(n, carry):
        acc, top, total = carry
        # The last step is moved back to end with the cache, and leaves out its overlap.
        start = jnp.minimum(n * step, S - step)
        k, v = (
            lax.dynamic_slice(a, (0, 0, start, 0), (B, K, step, D))
            for a in (k_BKSD, v_BKSD)
        )
        column_T = start + jnp.arange(step, dtype=jnp.int32)
        s = product("bkrd,bktd->bkrt", q_BKRD, k) * rule.softmax_scale
        s = rule.capped(s)
        away_BRT = position_BR[..., None] - column_T[None, None, :]
        s -= bias_slope_KR[None, :, :, None] * away_BRT[:, None].astype(acc_dtype)
        seen_BRT = (away_BRT >= 0) & (column_T >= n * step)[None, None]
        if rule.window is not None:
            seen_BRT &= away_BRT <= rule.window
        s = jnp.where(seen_BRT[:, None], s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(-1, keepdims=True))
        p, shrink = jnp.exp(s - new_top), jnp.exp(top - new_top)
        # What a cache holds beyond its length may be anything, even NaN.
        live_BT = column_T[None, :] < lengths_B[:, None]
        v = jnp.where(live_BT[:, None, :, None], v, 0)
        acc = acc * shrink + product("bkrt,bktd->bkrd", p.astype(v.dtype), v)
        return acc, new_top, total * shrink + p.sum(-1, keepdims=True)

    zeros = jnp.zeros((B, K, G * L, 1), acc_dtype)
    floor = jnp.full_like(zeros, jnp.finfo(acc_dtype).min)  # finite: no NaN from -inf
    carry = jnp.zeros((B, K, G * L, D), acc_dtype), floor, zeros
    first = first_BK.min() * NORM_BLOCK // step
    end = (lengths_B.max() + step - 1) // step
    steps = math.ceil(S / step)
    end = jnp.minimum(end, steps).astype(first.dtype)
    acc, _, total = (
        block(0, carry) if steps == 1 else lax.fori_loop(first, end, block, carry)
    )
    out = (acc / jnp.where(total == 0, 1, total)).astype(q_BLHD.dtype)
    return out.reshape(B, H, L, D).swapaxes(1, 2)


def _by_kv_head(q_BLHD: jax.Array, n_kv_heads: int) -> jax.Array:
    """(B, K, G, L, D)"""
    B, L, H, D = q_BLHD.shape
    return q_BLHD.swapaxes(1, 2).reshape(B, n_kv_heads, H // n_kv_heads, L, D)
