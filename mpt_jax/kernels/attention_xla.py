"""Attention in plain XLA: the definition, and a form that needs no S x S memory.

``_logits`` says what a logit is and who sees whom; both forms call it.
``attention_reference`` takes all of them at once: the specification, and the oracle of
every kernel's tests. ``attention_blocked`` runs everywhere: online softmax over blocks
of keys (Milakov and Gimelshein 2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv
2112.05682) and the backward of FlashAttention (Dao et al. 2022, arXiv 2205.14135),
which keeps one log-sum-exp per row and computes each block again. Blocks that no query
may see are not visited.

Dims beside the usual ones: G = H // K query heads per KV head; Q rows and T columns of
one block, of which i and j count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from mpt_jax.kernels.attention import RESIDUAL_NAMES, Operands, Rule
from mpt_jax.kernels.blocks import accumulator, einsum, pad_to

# A block is B * H * Q * T logits. On a CPU it must stay near the cache: at B * H = 48
# and L = 512 blocks of 128 x 128 (3 MiB) ran twice as fast as 512 x 512; at B * H = 4
# and L = 8192 256 and 512 were alike and 128 slower. Accelerators want large matmuls.
_CPU_BLOCK_LOGITS = 2**20
_BLOCK_SIZES = (512, 256, 128)

_Carry = TypeVar("_Carry")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the rule, and how rows and columns are cut into blocks."""

    rule: Rule
    n_rows: int
    n_columns: int
    block_q: int
    block_k: int

    @property
    def row_blocks(self) -> int:
        return math.ceil(self.n_rows / self.block_q)

    @property
    def column_blocks(self) -> int:
        return math.ceil(self.n_columns / self.block_k)


def attention_reference(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
) -> tuple[jax.Array, jax.Array]:
    """The definition: all L x S logits at once, differentiated by JAX.

    Args, returns: as kernels.attention.attention.
    Numerics: everything in float32 (float64 for float64 inputs), full precision.
    """
    B, L, H, D = q_BLHD.shape
    S, K = k_BSKD.shape[1:3]
    plan = _Plan(rule, L, S, block_q=L, block_k=S)
    q, k, v = (x.astype(accumulator(x)) for x in (q_BLHD, k_BSKD, v_BSKD))
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    qk = exact("bqkgd,btkd->bkgqt", q.reshape(B, L, K, H // K, D), k)
    _, s = _logits(plan, operands, qk, 0, 0)
    top = lax.stop_gradient(_finite(s.max(-1, keepdims=True)))
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    kept = p / _nonzero(total) * _dropout(plan, operands, p, 0, 0)
    out = exact("bkgqt,btkd->bqkgd", kept, v)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(_nonzero(total)))
    lse_BLH = lse[..., 0].transpose(0, 3, 1, 2).reshape(B, L, H)
    return out.reshape(B, L, H, D).astype(q_BLHD.dtype), lse_BLH


def attention_blocked(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention in O(L + S) memory, forward and backward.

    Batch and heads stay whole in every contraction, so that arrays sharded over them
    need no communication. Dropout draws each block's mask from the key folded with
    (i, j), which the backward repeats: other block sizes drop other weights.

    Args: as kernels.attention.attention; block_q, block_k: rows and columns per block,
      by default the largest that suit the machine.
    Numerics: logits and sums in float32 (float64 for float64 inputs); the softmax is
      rounded to the dtype of v before it meets v, as the matrix units want it.
    """
    plan = _blocked_plan(q_BLHD, k_BSKD, rule, block_q, block_k)
    return _flash(plan, q_BLHD, k_BSKD, v_BSKD, operands)


def gradients_blocked(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *out_lse_dout_dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As kernels.attention.gradients; rule without dropout."""
    plan = _blocked_plan(q_BLHD, k_BSKD, rule)
    residuals = q_BLHD, k_BSKD, v_BSKD, operands, *out_lse_dout_dlse[:2]
    return _flash_backward(plan, residuals, out_lse_dout_dlse[2:])[:3]


def _blocked_plan(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    rule: Rule,
    block_q: int | None = None,
    block_k: int | None = None,
) -> _Plan:
    (B, L, H, _), S = q_BLHD.shape, k_BSKD.shape[1]
    largest = _largest_block(B * H)
    return _Plan(rule, L, S, _even(L, block_q or largest), _even(S, block_k or largest))


def _largest_block(batch_times_heads: int) -> int:
    if jax.default_backend() != "cpu":
        return _BLOCK_SIZES[0]
    fits = (n for n in _BLOCK_SIZES if batch_times_heads * n * n <= _CPU_BLOCK_LOGITS)
    return next(fits, _BLOCK_SIZES[-1])


def _even(length: int, largest: int) -> int:
    """Block size that cuts length into few, equal blocks, so that padding is small."""
    if length <= largest:
        return length
    share = math.ceil(length / math.ceil(length / largest))
    return min(largest, 8 * math.ceil(share / 8))  # 8: whole vector registers


# The logits: what both forms share.


def _logits(
    plan: _Plan, x: Operands, qk_BKGQT: jax.Array, i: ArrayLike, j: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Logits of block (i, j): scaled and capped; and these with bias and mask.

    The bias is -slope * |distance| of exact integers: a key far enough away for the
    product to round has no weight, unlike in the usual slope * column (off by 1e-3 at
    65k columns). Hidden keys get -inf.
    """
    rule = plan.rule
    capped = rule.capped(qk_BKGQT * rule.softmax_scale)

    rows_Q = i * plan.block_q + jnp.arange(plan.block_q, dtype=jnp.int32)
    columns_T = j * plan.block_k + jnp.arange(plan.block_k, dtype=jnp.int32)
    ahead_QT = (x.kv_offset + columns_T)[None, :] - (x.q_offset + rows_Q)[:, None]
    distance_QT = jnp.abs(ahead_QT)

    s = capped
    if x.slopes_H is not None:
        slopes_KG = lax.stop_gradient(x.slopes_H).reshape(s.shape[1:3]).astype(s.dtype)
        s -= slopes_KG[None, :, :, None, None] * distance_QT[None, None, None]

    visible = []  # masks of B or 1, Q or 1, T
    if rule.causal:
        past = (ahead_QT <= 0)[None]
        if x.prefix_mask_BS is not None:
            past |= _cut(x.prefix_mask_BS, j, plan.block_k)[:, None, :]
        visible.append(past)
    if rule.window is not None:
        visible.append((distance_QT <= rule.window)[None])
    if x.q_segment_ids_BL is not None:
        of_q = _cut(x.q_segment_ids_BL, i, plan.block_q)[:, :, None]
        of_key = _cut(x.kv_segment_ids_BS, j, plan.block_k)[:, None, :]
        visible += [of_q == of_key, of_key != 0]
    if plan.n_columns % plan.block_k:
        visible.append((columns_T < plan.n_columns)[None, None, :])
    for mask in visible:
        s = jnp.where(mask[:, None, None], s, -jnp.inf)
    return capped, s


def _dropout(
    plan: _Plan, x: Operands, p: jax.Array, i: ArrayLike, j: ArrayLike
) -> ArrayLike:
    """What dropout multiplies block (i, j) of the softmax by: 0 or 1 / (1 - rate)."""
    rate = plan.rule.dropout_rate
    if not rate:
        return 1.0
    key = jax.random.fold_in(jax.random.fold_in(x.dropout_key, i), j)
    return jax.random.bernoulli(key, 1 - rate, p.shape).astype(p.dtype) / (1 - rate)


# The blocked form.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    plan: _Plan, q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array]:
    K, L = k_BSKD.shape[2], q_BLHD.shape[1]
    acc_dtype = accumulator(q_BLHD)
    q_BKGLD = _rows_by_head(plan, q_BLHD, K)
    k_BKSD, v_BKSD, x = _columns_by_head(plan, k_BSKD, v_BSKD, x)

    def row_block(i, outputs):
        q_BKGQD = _cut(q_BKGLD, i, plan.block_q, axis=3)

        def column_block(j, state):
            top, total, acc = state
            k_BKTD = _cut(k_BKSD, j, plan.block_k, axis=2)
            v_BKTD = _cut(v_BKSD, j, plan.block_k, axis=2)
            qk = einsum("bkgqd,bktd->bkgqt", q_BKGQD, k_BKTD)
            _, s = _logits(plan, x, qk, i, j)
            new_top = jnp.maximum(top, s.max(-1, keepdims=True))
            shift = _finite(new_top)
            p, shrink = jnp.exp(s - shift), jnp.exp(top - shift)
            total = total * shrink + p.sum(-1, keepdims=True)
            kept = (p * _dropout(plan, x, p, i, j)).astype(v_BKTD.dtype)
            acc = acc * shrink + einsum("bkgqt,bktd->bkgqd", kept, v_BKTD)
            return new_top, total, acc

        zeros = jnp.zeros((*q_BKGQD.shape[:-1], 1), acc_dtype)
        start = zeros - jnp.inf, zeros, jnp.zeros(q_BKGQD.shape, acc_dtype)
        top, total, acc = _over_columns(plan, x, i, column_block, start)
        out = (acc / _nonzero(total)).astype(q_BLHD.dtype)
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(_nonzero(total)))
        return tuple(
            _put(a, i * plan.block_q, block, axis=3)
            for a, block in zip(outputs, (out, lse), strict=True)
        )

    outputs = jnp.zeros_like(q_BKGLD), jnp.zeros((*q_BKGLD.shape[:4], 1), acc_dtype)
    out, lse = _loop(0, plan.row_blocks, plan.row_blocks, row_block, outputs)
    return _rows_by_position(out, L), _rows_by_position(lse, L)[..., 0]


def _flash_forward(plan, q_BLHD, k_BSKD, v_BSKD, x):
    results = _flash(plan, q_BLHD, k_BSKD, v_BSKD, x)
    out_BLHD, lse_BLH = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out_BLHD, lse_BLH), (q_BLHD, k_BSKD, v_BSKD, x, out_BLHD, lse_BLH)


def _flash_backward(plan, residuals, cotangents):
    """dq, dk and dv in one pass over the blocks.

    ds = p * (dp - delta), dp = do . v, delta = do . out - dlse, since dlse/ds = p.
    """
    q_BLHD, k_BSKD, v_BSKD, x, out_BLHD, lse_BLH = residuals
    dout_BLHD, dlse_BLH = cotangents
    K, L = k_BSKD.shape[2], q_BLHD.shape[1]
    acc_dtype = accumulator(q_BLHD)
    delta_BLH = (dout_BLHD.astype(acc_dtype) * out_BLHD).sum(-1) - dlse_BLH
    # A row that sees nothing, or is padding, has lse +inf here: then p = 0.
    empty = lse_BLH == -jnp.inf
    lse_BLH = jnp.where(empty, jnp.inf, lse_BLH)
    delta_BLH = jnp.where(empty, 0, delta_BLH)

    q, dout = _rows_by_head(plan, q_BLHD, K), _rows_by_head(plan, dout_BLHD, K)
    lse = _rows_by_head(plan, lse_BLH[..., None], K, jnp.inf)
    delta = _rows_by_head(plan, delta_BLH[..., None], K)
    k_BKSD, v_BKSD, x = _columns_by_head(plan, k_BSKD, v_BSKD, x)

    def row_block(i, grads):
        q_BKGQD, dout_BKGQD, lse_i, delta_i = (
            _cut(a, i, plan.block_q, axis=3) for a in (q, dout, lse, delta)
        )

        def column_block(j, state):
            dq, dk, dv = state
            k_BKTD = _cut(k_BKSD, j, plan.block_k, axis=2)
            v_BKTD = _cut(v_BKSD, j, plan.block_k, axis=2)
            qk = einsum("bkgqd,bktd->bkgqt", q_BKGQD, k_BKTD)
            capped, s = _logits(plan, x, qk, i, j)
            p = jnp.exp(s - lse_i)
            drop = _dropout(plan, x, p, i, j)
            dp = einsum("bkgqd,bktd->bkgqt", dout_BKGQD, v_BKTD) * drop
            ds = p * (dp - delta_i) * plan.rule.softmax_scale
            if plan.rule.logit_softcap is not None:
                ds = ds * (1 - (capped / plan.rule.logit_softcap) ** 2)
            kept, ds = (p * drop).astype(dout_BKGQD.dtype), ds.astype(q_BKGQD.dtype)
            dq = dq + einsum("bkgqt,bktd->bkgqd", ds, k_BKTD)
            # This way round XLA transposes q and dout, not the larger ds and p.
            dk_j = einsum("bkgqd,bkgqt->bkdt", q_BKGQD, ds)
            dv_j = einsum("bkgqd,bkgqt->bkdt", dout_BKGQD, kept)
            return dq, _add_columns(plan, dk, j, dk_j), _add_columns(plan, dv, j, dv_j)

        dq, dk, dv = grads
        start = jnp.zeros(q_BKGQD.shape, acc_dtype), dk, dv
        dq_i, dk, dv = _over_columns(plan, x, i, column_block, start)
        dq_i = dq_i.astype(dq.dtype)
        return _put(dq, i * plan.block_q, dq_i, axis=3), dk, dv

    dkv = jnp.zeros_like(k_BKSD.swapaxes(2, 3), acc_dtype)
    grads = jnp.zeros_like(q), dkv, dkv
    dq, dk, dv = _loop(0, plan.row_blocks, plan.row_blocks, row_block, grads)
    dk, dv = (
        a_BKDS[..., : plan.n_columns].transpose(0, 3, 1, 2).astype(k_BSKD.dtype)
        for a_BKDS in (dk, dv)
    )
    return _rows_by_position(dq, L), dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def _over_columns(
    plan: _Plan,
    x: Operands,
    i: ArrayLike,
    column_block: Callable[[ArrayLike, _Carry], _Carry],
    carry: _Carry,
) -> _Carry:
    """Runs column_block over the blocks that some row of block i can see."""
    rule, width = plan.rule, plan.block_k
    first_row = x.q_offset - x.kv_offset + i * plan.block_q  # in columns
    last_row = first_row + plan.block_q - 1
    lowest, highest = 0, plan.n_columns - 1
    if rule.window is not None:
        lowest = jnp.maximum(lowest, first_row - rule.window)
        highest = jnp.minimum(highest, last_row + rule.window)
    if rule.causal:
        visible_end = last_row
        if x.prefix_mask_BS is not None:
            columns = jnp.arange(x.prefix_mask_BS.shape[1], dtype=jnp.int32)
            last_prefix = jnp.where(x.prefix_mask_BS.any(0), columns, -1).max()
            visible_end = jnp.maximum(visible_end, last_prefix)
        highest = jnp.minimum(highest, visible_end)

    def visit(j, carry):
        if x.prefix_mask_BS is None:
            return column_block(j, carry)
        # Above the diagonal only a prefix token can be seen.
        prefix_BT = _cut(x.prefix_mask_BS, j, width)
        seen = (j * width <= last_row) | prefix_BT.any()
        return lax.cond(seen, column_block, lambda j, carry: carry, j, carry)

    low, high = jnp.maximum(lowest, 0) // width, (highest + width) // width
    return _loop(low, high, plan.column_blocks, visit, carry)


def _loop(
    low: ArrayLike,
    high: ArrayLike,
    count: int,
    body: Callable[[ArrayLike, _Carry], _Carry],
    carry: _Carry,
) -> _Carry:
    """body over low..high - 1, all below count; without a loop where count is 1."""
    return body(0, carry) if count == 1 else lax.fori_loop(low, high, body, carry)


# Heads before positions, so that a block is a matrix per head in one piece.


def _rows_by_head(
    plan: _Plan, a_BLHD: jax.Array, n_kv_heads: int, value: float = 0
) -> jax.Array:
    """(B, K, G, padded L, D)"""
    B, L, H, D = a_BLHD.shape
    a_BKGLD = a_BLHD.transpose(0, 2, 1, 3).reshape(B, n_kv_heads, H // n_kv_heads, L, D)
    return pad_to(a_BKGLD, plan.block_q, axis=3, fill=value)


def _rows_by_position(a_BKGLD: jax.Array, length: int) -> jax.Array:
    B, K, G, _, D = a_BKGLD.shape
    a_BLKGD = a_BKGLD[:, :, :, :length].transpose(0, 3, 1, 2, 4)
    return a_BLKGD.reshape(B, length, K * G, D)


def _columns_by_head(
    plan: _Plan, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array, Operands]:
    """k and v as (B, K, padded S, D), and the operands padded alike."""

    def padded(a: jax.Array | None, block: int) -> jax.Array | None:
        return None if a is None else pad_to(a, block)

    k_BKSD, v_BKSD = (
        pad_to(a.transpose(0, 2, 1, 3), plan.block_k, axis=2) for a in (k_BSKD, v_BSKD)
    )
    x = x._replace(
        q_segment_ids_BL=padded(x.q_segment_ids_BL, plan.block_q),
        kv_segment_ids_BS=padded(x.kv_segment_ids_BS, plan.block_k),
        prefix_mask_BS=padded(x.prefix_mask_BS, plan.block_k),
    )
    return k_BKSD, v_BKSD, x


def _add_columns(
    plan: _Plan, a_BKDS: jax.Array, j: ArrayLike, a_BKDT: jax.Array
) -> jax.Array:
    columns = _cut(a_BKDS, j, plan.block_k, axis=3) + a_BKDT
    return _put(a_BKDS, j * plan.block_k, columns, axis=3)


def _cut(a: jax.Array, block: ArrayLike, size: int, axis: int = 1) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, block * size, size, axis=axis)


def _put(a: jax.Array, start: ArrayLike, block: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(a, block, start, axis=axis)


def _finite(a: jax.Array) -> jax.Array:
    return jnp.where(a == -jnp.inf, 0, a)


def _nonzero(a: jax.Array) -> jax.Array:
    return jnp.where(a == 0, 1, a)
