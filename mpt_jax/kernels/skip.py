"""Which blocks of the S x S attention matrix need no visit, computed beside the kernel.

Two reasons to pass a block of keys over. Nobody in the block of queries may see it:
exact, whatever the numbers (``block_visibility``). Or ALiBi has erased it: what a head
of slope m gives to keys at distance d falls like exp(-m d), and norms bound the rest
(``lower_key_blocks``), so that most of a long row is provably below float32's
resolution. Both become small int32 arrays that a kernel reads as its loop bounds.

Dims beside the usual ones: G = H // K query heads per KV head; I blocks of queries and
J blocks of keys, "nq" and "nk" of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mpt_jax.kernels.attention import Operands, Rule
from mpt_jax.kernels.blocks import pad_to

# The softmax of a row, rounded to float32, does not see a mass smaller than this.
DEFAULT_EPS = 2.0**-24
# The norms read q and k once more. On a TPU v5e that is about a sixth of the forward's
# time at 4 blocks of 512 keys, where MPT-7B's slopes skip an eighth; a twelfth at 8,
# where they skip a third.
_SHORT_ROW = 8
# Covers the rounding of norms and self logits: sums of at most 512 float32 products.
NORM_MARGIN = 2.0**-14
# Covers the rounding of exponents and of the cumulative sum.
MASS_MARGIN = 0.99


class Ranges(NamedTuple):
    """Loop bounds over blocks: visit first <= n < end; full_first <= n < full_end of
    them are visible to every row and column, as far as positions tell."""

    first: jax.Array
    end: jax.Array
    full_first: jax.Array
    full_end: jax.Array


def skip_eps(rule: Rule, n_key_blocks: int | None = None) -> float:
    """The softmax mass that ``rule.skip`` allows to be left out of a row; 0: none.

    n_key_blocks: given, "auto" leaves rows alone that are too short for it to pay.
    """
    if rule.skip == "auto":
        short = n_key_blocks is not None and n_key_blocks < _SHORT_ROW
        return 0.0 if short else DEFAULT_EPS
    return 0.0 if rule.skip == "off" else float(rule.skip)


def lower_key_blocks(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *,
    block_q: int,
    block_k: int,
    eps: float = DEFAULT_EPS,
) -> jax.Array:
    """The first block of keys that may matter to each head and block of queries.

    For row i of block I and a key j before that block, with c the soft-cap,

        logit_ij <= c(scale max_I |q| max_J |k|) - slope (i - j),

    and the row's softmax is divided by at least exp(logit) of the key nearest to i,
    which for self-attention is key i itself. Blocks are passed over from the left while
    the sum of these ratios is at most eps: for every row, any q and k, no tuning. Where
    the nearest key is hidden, or a number is not finite, or there are no slopes, only
    blocks that nobody may see are passed over.

    Args:
      q_BLHD, k_BSKD, rule, operands: as a backend gets them.
      block_q, block_k: rows and columns per block; the last block may be short.
      eps: softmax mass per row that may be left out; 0 leaves out nothing that counts.

    Returns: int32 (B, H, nq), from 0 to nk. The output is off by at most 2 eps max |v|.
    Numerics: float32, with margins for its rounding.
    """
    (B, L, H, _), S = q_BLHD.shape, k_BSKD.shape[1]
    nq, nk = math.ceil(L / block_q), math.ceil(S / block_k)
    some, _ = block_visibility(L, S, rule, operands, block_q=block_q, block_k=block_k)
    unseen_BIJ = jnp.cumsum(some, axis=-1) == 0  # neither this block nor one before
    unseen = unseen_BIJ.sum(-1, dtype=jnp.int32)
    unseen_BHI = jnp.broadcast_to(unseen[:, None], (B, H, nq))
    if operands.slopes_H is None or not eps:
        return unseen_BHI
    constants = lax.stop_gradient((q_BLHD, k_BSKD))
    ratio_BHIJ = _mass_ratios(*constants, rule, operands, block_q, block_k)
    mass_BHIJ = jnp.cumsum(jnp.where(unseen_BIJ[:, None], 0, ratio_BHIJ), axis=-1)
    # NaN compares false: not erased. The masses grow with J, so that this is a count.
    erased_BHI = (mass_BHIJ <= eps * MASS_MARGIN).sum(-1, dtype=jnp.int32)
    return jnp.clip(erased_BHI, unseen_BHI, nk)


def upper_query_blocks(lower_BHI: jax.Array, n_key_blocks: int) -> jax.Array:
    """One past the last block of queries that reads each block of keys.

    Args: lower_BHI: of lower_key_blocks. Returns: int32 (B, H, n_key_blocks).
    """
    shape = *lower_BHI.shape, n_key_blocks
    reads_BHIJ = lower_BHI[..., None] <= lax.broadcasted_iota(jnp.int32, shape, 3)
    return _end(reads_BHIJ.swapaxes(-1, -2))


def block_visibility(
    L: int, S: int, rule: Rule, operands: Operands, *, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Which pairs of blocks have a visible pair, and which hide nothing by position.

    Returns: bool (B or 1, nq, nk): some row may see some column, never wrongly False;
      bool (nq, nk): causality, window and length hide none of the block's columns from
      any of its rows, segments aside.
    """
    start, end = _edges(L, block_q)
    first_row, last_row = (_row_in_columns(operands, a)[:, None] for a in (start, end))
    first_column, last_column = (a[None, :] for a in _edges(S, block_k))
    least, most = first_column - last_row, last_column - first_row  # of j - i
    some, full = jnp.full((1, *least.shape), True), jnp.full(least.shape, True)
    if rule.causal:
        some, full = (least <= 0)[None], most <= 0
        if operands.prefix_mask_BS is not None:
            prefix_BJ = blocks(operands.prefix_mask_BS, block_k, False).any(-1)
            some = some | prefix_BJ[:, None, :]
    if rule.window is not None:
        some = some & ((least <= rule.window) & (most >= -rule.window))[None]
        full = full & (jnp.maximum(most, -least) <= rule.window)
    if operands.q_segment_ids_BL is not None:
        q_least, q_most = _segment_span(operands.q_segment_ids_BL, block_q)
        k_least, k_most = _segment_span(operands.kv_segment_ids_BS, block_k)
        some = some & (q_least[:, :, None] <= k_most[:, None, :])
        some = some & (k_least[:, None, :] <= q_most[:, :, None])
    # A short last block holds columns that do not exist.
    whole = (np.arange(full.shape[1]) + 1) * block_k <= S
    return some, full & whole[None, :]


def key_ranges(some: jax.Array, full: jax.Array, lower_BHI: jax.Array) -> Ranges:
    """The blocks of keys that each block of queries visits.

    Args: some, full: of block_visibility; lower_BHI: of lower_key_blocks.
    Returns: first (B, H, nq), end (B or 1, nq), full_first and full_end (nq,), int32.
    """
    return Ranges(lower_BHI, _end(some), *_run(full))


def query_ranges(some: jax.Array, full: jax.Array, lower_BHI: jax.Array) -> Ranges:
    """The blocks of queries that each block of keys visits.

    Args: as key_ranges. Returns: first (B or 1, nk), end (B, H, nk), full_first and
      full_end (nk,), int32.
    """
    some, full = some.swapaxes(-1, -2), full.swapaxes(-1, -2)
    upper = upper_query_blocks(lower_BHI, some.shape[-2])
    end = jnp.minimum(upper, _end(some)[:, None])
    return Ranges(_first(some), end, *_run(full))


def head_order(slopes_H: np.ndarray, n_shards: int, *, group: int = 1) -> np.ndarray:
    """An order of heads in which contiguous shards have the same work.

    Skipping leaves a head about 1 / slope of each row, so that contiguous heads make
    one shard do all the work. Sorted by work and dealt in turns that go forth and back
    (a snake), every shard gets as many long heads as short ones.

    Args:
      slopes_H: ALiBi slopes. n_shards: divides H / group.
      group: heads that share a KV head and stay together, in their order.

    Returns: int (H,): which head stands at each place.
    Raises: ValueError: the heads do not divide.
    """
    n_groups, rest = divmod(len(slopes_H), group)
    if rest or n_groups % n_shards:
        raise ValueError(
            f"n_shards: got {n_shards}, expected a divisor of {n_groups} groups of "
            f"{group} of the {len(slopes_H)} heads"
        )
    work = (1 / np.asarray(slopes_H, np.float64)).reshape(n_groups, group).sum(1)
    turns = np.argsort(work, kind="stable").reshape(-1, n_shards)
    turns[1::2] = turns[1::2, ::-1]
    groups = turns.T.reshape(-1)
    return (groups[:, None] * group + np.arange(group)).reshape(-1)


def _mass_ratios(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    rule: Rule,
    x: Operands,
    block_q: int,
    block_k: int,
) -> jax.Array:
    """Bound on what block J adds to the softmax of any row of block I: (B, H, nq, nk).

    +inf where J is not wholly before I: there distance proves nothing.
    """
    L, H, S, K = *q_BLHD.shape[1:3], *k_BSKD.shape[1:3]
    slopes_H = lax.stop_gradient(jnp.asarray(x.slopes_H, jnp.float32))
    q_norms_BHL, k_norms_BKS = (norms(a).swapaxes(1, 2) for a in (q_BLHD, k_BSKD))

    first_row, _ = _edges(L, block_q)
    _, last_column = _edges(S, block_k)
    gap_IJ = _row_in_columns(x, first_row)[:, None] - last_column[None, :]

    q_top_BHI = blocks(q_norms_BHL, block_q, 0).max(-1)
    k_top_BHJ = jnp.repeat(blocks(k_norms_BKS, block_k, 0).max(-1), H // K, axis=1)
    dot_BHIJ = q_top_BHI[..., None] * k_top_BHJ[..., None, :]
    most_BHIJ = rule.capped(abs(rule.softmax_scale) * dot_BHIJ * (1 + NORM_MARGIN))

    # sum_{t < block_k} exp(-slope t), and its limit at slope 0.
    safe_H = jnp.where(slopes_H > 0, slopes_H, 1)
    sums_H = jnp.expm1(-safe_H * block_k) / jnp.expm1(-safe_H)
    sums_H = jnp.where(slopes_H > 0, sums_H, block_k)

    least_BHI = _row_floors(q_BLHD, k_BSKD, q_norms_BHL, k_norms_BKS, rule, x, block_q)
    bias_HIJ = slopes_H[:, None, None] * gap_IJ[None].astype(jnp.float32)
    exponent = most_BHIJ - bias_HIJ[None] - least_BHI[..., None]
    ratio_BHIJ = sums_H[None, :, None, None] * jnp.exp(exponent)
    provable = (gap_IJ > 0)[None] & (slopes_H >= 0)[:, None, None]
    return jnp.where(provable[None], ratio_BHIJ, jnp.inf)


def _row_floors(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    q_norms_BHL: jax.Array,
    k_norms_BKS: jax.Array,
    rule: Rule,
    x: Operands,
    block_q: int,
) -> jax.Array:
    """min over rows of block I of log(softmax denominator) + slope (i - first row).

    The slope term is there because a row's distance to every earlier block grows with
    it. (B, H, nq); -inf where some row sees no nearest key, +inf where none sees any.
    """
    (B, L, H, _), (_, S, K, _) = q_BLHD.shape, k_BSKD.shape
    rows_L = np.arange(L, dtype=np.int32)
    wanted_L = _row_in_columns(x, rows_L)
    nearest_L = jnp.clip(wanted_L, 0, S - 1)
    ahead_L = nearest_L - wanted_L
    visible_BL = jnp.full((1, L), True)
    if rule.causal:
        visible_BL = (ahead_L <= 0)[None]
    if rule.window is not None:
        visible_BL = visible_BL & (jnp.abs(ahead_L) <= rule.window)[None]
    if x.q_segment_ids_BL is not None:
        of_nearest = _take(x.kv_segment_ids_BS, nearest_L, x)
        visible_BL = visible_BL & (x.q_segment_ids_BL == of_nearest)

    near_BLKD = _take(k_BSKD, nearest_L, x)
    q_BLKGD = q_BLHD.reshape(B, L, K, H // K, -1).astype(jnp.float32)
    dot = (q_BLKGD * near_BLKD[:, :, :, None].astype(jnp.float32)).sum(-1)
    dot_BHL = dot.reshape(B, L, H).swapaxes(1, 2)
    near_norms_BKL = _take(k_norms_BKS.swapaxes(1, 2), nearest_L, x).swapaxes(1, 2)
    rounding = NORM_MARGIN * q_norms_BHL * jnp.repeat(near_norms_BKL, H // K, axis=1)
    logit_BHL = rule.capped(
        rule.softmax_scale * dot_BHL - abs(rule.softmax_scale) * rounding,
    )
    slopes_H1 = lax.stop_gradient(jnp.asarray(x.slopes_H, jnp.float32))[:, None]
    within_L = (rows_L % block_q).astype(np.float32)
    away_HL = slopes_H1 * jnp.abs(ahead_L).astype(jnp.float32)[None]
    floor_BHL = logit_BHL + (slopes_H1 * within_L[None] - away_HL)[None]
    floor_BHL = jnp.where(visible_BL[:, None], floor_BHL, -jnp.inf)
    if x.q_segment_ids_BL is not None:
        padding_BL = x.q_segment_ids_BL == 0
        floor_BHL = jnp.where(padding_BL[:, None], jnp.inf, floor_BHL)
    return blocks(floor_BHL, block_q, jnp.inf).min(-1)


def norms(a: jax.Array) -> jax.Array:
    """Of vectors along the last dim, in float32."""
    return jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum(-1))


def _take(a: jax.Array, nearest_L: jax.Array, x: Operands) -> jax.Array:
    """a[:, nearest_L]; a itself in self-attention, where a gather would cost."""
    static = isinstance(x.q_offset, int) and isinstance(x.kv_offset, int)
    if static and x.q_offset == x.kv_offset and a.shape[1] == len(nearest_L):
        return a
    return jnp.take(a, nearest_L, axis=1)


def _row_in_columns(x: Operands, rows: ArrayLike) -> jax.Array:
    """The column at the position of each row; may lie outside the keys."""
    return jnp.asarray(x.q_offset, jnp.int32) - x.kv_offset + rows


def _edges(length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last index of every block."""
    first = np.arange(0, length, block, dtype=np.int32)
    return first, np.minimum(first + block, length).astype(np.int32) - 1


def blocks(a: jax.Array, block: int, fill: ArrayLike = 0) -> jax.Array:
    """The last dim cut into (blocks, block)."""
    a = pad_to(a, block, axis=a.ndim - 1, fill=fill)
    return a.reshape(*a.shape[:-1], -1, block)


def _segment_span(ids_BL: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest id of each block, padding aside; greatest < least: none."""
    limits = jnp.iinfo(ids_BL.dtype)
    least = blocks(jnp.where(ids_BL == 0, limits.max, ids_BL), block, limits.max)
    most = blocks(jnp.where(ids_BL == 0, limits.min, ids_BL), block, limits.min)
    return least.min(-1), most.max(-1)


def _first(mask: jax.Array) -> jax.Array:
    """Index of the first True along the last dim; its length where there is none."""
    none_yet = jnp.cumsum(mask, axis=-1) == 0
    return none_yet.sum(-1, dtype=jnp.int32)


def _end(mask: jax.Array) -> jax.Array:
    """One past the last True along the last dim; 0 where there is none."""
    after = lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1) + 1
    return jnp.where(mask, after, 0).max(-1)


def _run(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _first(mask), _end(mask)
