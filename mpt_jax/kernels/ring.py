"""Attention of rows that are cut over devices: keys and values go round a ring.

Device r of n holds the r-th part of every row, C tokens of it. Parts of keys visit the
devices one after another (Liu et al. 2023, arXiv 2310.01889); each visit is a call of
the attention op with the distance between the two parts, and visits merge exactly by
their log-sum-exps. Nobody ever holds more than two parts. The backward goes round once
more, with the log-sum-exp of the whole row instead of a visit's own, so that it sums up
plain gradients. What travels there is whatever is smaller: queries with their gradient,
or keys with theirs (grouped and multi-query attention).

ALiBi makes most of the way superfluous. How far the keys of a head matter follows from
norms and slopes (``_reach``); heads are cut into groups, and a group's loop ends where
nobody needs its keys any more: after one hop for most heads of a long row, none where
documents are packed shorter than C. All devices agree on the number, as they must.

Causal rows make the last device of a ring work n times as much as the first, and all
wait for it. A group that goes more than half way round is dealt anew: halves of parts,
of which device r holds the r-th from the start and the r-th from the end, so that every
visit is the same two products of halves for everyone (zig-zag, as in Llama 3, arXiv
2407.21783). A group that goes less far is balanced as it lies, all but its first
devices, and would have to send more. Only attention sees the dealing.

Dims beside the usual ones: P pieces (1, or 2 halves) of a part; G groups of heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import (
    RESIDUAL_NAMES,
    Implementation,
    Operands,
    Rule,
    attend,
    check,
    gradients,
)
from mpt_jax.kernels.blocks import accumulator

# Groups of heads whose loops may end at different hops: more send less, but fill a
# device less.
_MOST_GROUPS = 8
# Rows in blocks, as the kernels count them before they skip.
_BLOCK = 512
# Covers the rounding of a distance that float32 computes.
_REACH_MARGIN = 1e-5

_Tree = TypeVar("_Tree")
_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is static. size: devices of the ring; everyone: all axes of the mesh, over
    which the number of hops is agreed; group_heads: KV heads of a group."""

    rule: Rule
    axis: str
    size: int
    everyone: tuple[str, ...]
    implementation: str
    n_groups: int
    eps: float


class _Rows(NamedTuple):
    """Queries and what is theirs, (P, B, L, ...); the last three backward only."""

    q: jax.Array
    ids: jax.Array | None
    dout: jax.Array | None = None
    lse: jax.Array | None = None
    delta: jax.Array | None = None


class _Keys(NamedTuple):
    """(P, B, S, ...)"""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    prefix: jax.Array | None


class _Meeting(NamedTuple):
    """Piece ``row`` of the queries meets piece ``key`` of the keys, which is ``shift``
    before it; only where ``when``."""

    row: ArrayLike
    key: ArrayLike
    shift: ArrayLike
    when: ArrayLike = True


def ring_attention(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    slopes_H: jax.Array | None = None,
    *,
    axis: str,
    everyone: tuple[str, ...],
    implementation: Implementation = "auto",
    return_lse: bool = False,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Self-attention of whole rows, of which each device of ``axis`` has its part.

    Inside jax.shard_map; causal attention with everything the op has but dropout, and,
    always all the way round, prefixes and attention in both directions.

    Args: the op's, of this device's part: as kernels.attention.attention, S = L;
      axis: the mesh axis that cuts rows; everyone: all mesh axes of the shard_map.
    Returns: as the op, of this part.
    Raises: NotImplementedError: dropout, offsets, or a backend without a backward of
      its own ("reference").
    Numerics: as the op's; visits merge in float32 (float64 for float64 inputs), each
      rounded to the dtype of q. rule.skip also bounds what is not sent: the share of a
      row's softmax that keys left at home have together.
    """
    of_rule = {f.name for f in dataclasses.fields(Rule)}
    rule = Rule(**{n: a for n, a in options.items() if n in of_rule})
    operands = {n: a for n, a in options.items() if n not in of_rule}
    x = Operands(slopes_H, **operands)
    check(q_BLHD, k_BSKD, v_BSKD, rule, x)
    if rule.dropout_rate:
        raise NotImplementedError("a ring has no dropout; use one device per row")
    offsets = x.q_offset, x.kv_offset
    if offsets != (0, 0) or q_BLHD.shape[1] != k_BSKD.shape[1]:
        raise NotImplementedError("a ring is of self-attention, without offsets")
    if implementation == "reference":
        raise NotImplementedError("'reference' has no part of a row; use 'xla'")
    size = lax.axis_size(axis)
    blocks = math.ceil(size * q_BLHD.shape[1] / _BLOCK)
    one_way = rule.causal and x.prefix_mask_BS is None
    eps = skip.skip_eps(rule, blocks) if one_way else 0.0
    adaptive = eps and x.slopes_H is not None
    n_groups = _divisor(k_BSKD.shape[2], _MOST_GROUPS) if adaptive else 1
    ring = _Ring(rule, axis, size, everyone, implementation, n_groups, eps)
    out, lse = _ring(ring, q_BLHD, k_BSKD, v_BSKD, x)
    return (out, lse) if return_lse else out


def _divisor(n: int, largest: int) -> int:
    return max(d for d in range(1, largest + 1) if n % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    ring: _Ring, q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array]:
    out, lse, _ = _forward(ring, q_BLHD, k_BSKD, v_BSKD, x)
    return out, lse


def _ring_forward(ring, q_BLHD, k_BSKD, v_BSKD, x):
    *results, hops_G = _forward(ring, q_BLHD, k_BSKD, v_BSKD, x)
    out_BLHD, lse_BLH = map(checkpoint_name, results, RESIDUAL_NAMES)
    residuals = q_BLHD, k_BSKD, v_BSKD, x, hops_G, out_BLHD, lse_BLH
    return (out_BLHD, lse_BLH), residuals


def _ring_backward(ring, residuals, cotangents):
    """ds = p * (dp - delta), delta = do . out - dlse, with the p of the whole row."""
    q_BLHD, k_BSKD, v_BSKD, x, hops_G, out_BLHD, lse_BLH = residuals
    dout_BLHD, dlse_BLH = cotangents
    delta_BLH = (dout_BLHD.astype(lse_BLH.dtype) * out_BLHD).sum(-1) - dlse_BLH
    rows = _Rows(q_BLHD, x.q_segment_ids_BL, dout_BLHD, lse_BLH, delta_BLH)
    keys = _Keys(k_BSKD, v_BSKD, x.kv_segment_ids_BS, x.prefix_mask_BS)
    dq, dk, dv = _by_group(ring, _backward_group, rows, keys, x.slopes_H, hops_G)
    return dq, dk, dv, None


_ring.defvjp(_ring_forward, _ring_backward)


def _forward(
    ring: _Ring, q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array, ArrayLike]:
    hops_G = _hops(ring, q_BLHD, k_BSKD, x)
    rows = _Rows(q_BLHD, x.q_segment_ids_BL)
    keys = _Keys(k_BSKD, v_BSKD, x.kv_segment_ids_BS, x.prefix_mask_BS)
    out, lse = _by_group(ring, _forward_group, rows, keys, x.slopes_H, hops_G)
    return out, lse, hops_G


# How far keys go.


def _hops(ring: _Ring, q_BLHD: jax.Array, k_BSKD: jax.Array, x: Operands) -> ArrayLike:
    """How many parts before its own each group needs at most, the same everywhere.

    An int where it does not depend on the data, else int32 (G,).
    """
    rule, length = ring.rule, q_BLHD.shape[1]
    most = ring.size - 1
    if not rule.causal or x.prefix_mask_BS is not None:
        return most
    if rule.window is not None:
        most = min(most, math.ceil(rule.window / length))
    needed_G = jnp.full(ring.n_groups, most, jnp.int32)
    if most and ring.eps and x.slopes_H is not None:
        reach_H = _reach(ring, q_BLHD, k_BSKD, x)
        # Left at home are keys at least hops * length + 1 away. NaN: all are needed.
        hops_H = jnp.where(reach_H <= most * length, reach_H / length, most)
        hops_H = jnp.ceil(jnp.maximum(hops_H, 0)).astype(jnp.int32)
        needed_G = jnp.minimum(needed_G, hops_H.reshape(ring.n_groups, -1).max(1))
    elif x.q_segment_ids_BL is None:
        return most
    if most and x.q_segment_ids_BL is not None:
        needed_G = jnp.minimum(needed_G, _parts_of_documents(ring, x))
    return lax.pmax(needed_G, ring.everyone)


def _reach(ring: _Ring, q_BLHD: jax.Array, k_BSKD: jax.Array, x: Operands) -> jax.Array:
    """Distance beyond which keys have, all together, at most eps of any local row's
    softmax, for each head: (H,).

    With c the soft-cap and R the most of c(scale |q_i| max |k|) - c(scale q_i . k_i)
    over rows i, keys at distances d >= D have at most the share

        sum_d exp(R - slope d) = exp(R - slope D) / (1 - exp(-slope)).
    """
    rule, scale = ring.rule, abs(ring.rule.softmax_scale)
    q, k = (a.astype(jnp.float32) for a in lax.stop_gradient((q_BLHD, k_BSKD)))
    B, L, H, D = q.shape
    q = q.reshape(B, L, k.shape[2], -1, D)
    q_norms, k_norms = skip.norms(q), skip.norms(k)[..., None]
    top = k_norms.max(1, keepdims=True)
    # Not every machine's max over devices keeps NaNs; infinity stays.
    top = lax.pmax(jnp.where(jnp.isnan(top), jnp.inf, top), ring.axis)
    own = ring.rule.softmax_scale * (q * k[:, :, :, None]).sum(-1)
    rounding = skip.NORM_MARGIN * scale * q_norms
    most = rule.capped(scale * q_norms * top + rounding * top)
    spread = most - rule.capped(own - rounding * k_norms)
    if x.q_segment_ids_BL is not None:  # padding sees nothing
        padding = (x.q_segment_ids_BL == 0)[:, :, None, None]
        spread = jnp.where(padding, -jnp.inf, spread)
    spread_H = spread.max((0, 1)).reshape(H)
    slopes_H = lax.stop_gradient(jnp.asarray(x.slopes_H, jnp.float32))
    tail_H = -jnp.log(-jnp.expm1(-slopes_H) * (ring.eps * skip.MASS_MARGIN))
    reach_H = (spread_H + tail_H) / slopes_H
    return jnp.where(slopes_H > 0, reach_H * (1 + _REACH_MARGIN), jnp.nan)


def _parts_of_documents(ring: _Ring, x: Operands) -> jax.Array:
    """How many parts back the documents of this part may begin."""

    def span(ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        limits = jnp.iinfo(ids_BL.dtype)
        least = jnp.where(ids_BL == 0, limits.max, ids_BL).min(1)
        return least, jnp.where(ids_BL == 0, limits.min, ids_BL).max(1)

    first, last = span(x.q_segment_ids_BL)
    firsts, lasts = lax.all_gather(span(x.kv_segment_ids_BS), ring.axis)
    shared = (firsts <= last[None]) & (lasts >= first[None])
    back = lax.axis_index(ring.axis) - jnp.arange(ring.size, dtype=jnp.int32)
    return jnp.where(shared.any(1), back, 0).max()


# One group of heads after another.


def _by_group(
    ring: _Ring,
    one: Callable[..., tuple[jax.Array, ...]],
    rows: _Rows,
    keys: _Keys,
    slopes_H: jax.Array | None,
    hops_G: ArrayLike,
) -> tuple[jax.Array, ...]:
    """one() of every group of heads, in the layout that suits its hops."""
    in_turn = functools.partial(_in_turn, ring, one)
    if ring.n_groups == 1:
        hops = hops_G if isinstance(hops_G, int) else hops_G[0]
        return in_turn(rows, keys, slopes_H, hops)
    heads = ("q", "dout", "lse", "delta", "k", "v")

    def cut(a: jax.Array, axis: int) -> jax.Array:
        shape = *a.shape[:axis], ring.n_groups, -1, *a.shape[axis + 1 :]
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    cuts = [
        {n: cut(a, 2) for n, a in t._asdict().items() if n in heads and a is not None}
        for t in (rows, keys)
    ]
    hops_G = jnp.broadcast_to(jnp.asarray(hops_G, jnp.int32), ring.n_groups)

    def group(args: Any) -> tuple[jax.Array, ...]:
        of_rows, of_keys, slopes, hops = args
        return in_turn(rows._replace(**of_rows), keys._replace(**of_keys), slopes, hops)

    results = lax.map(group, (*cuts, cut(jnp.asarray(slopes_H), 0), hops_G))
    whole = (jnp.moveaxis(a, 0, 2) for a in results)
    return tuple(a.reshape(*a.shape[:2], -1, *a.shape[4:]) for a in whole)


def _in_turn(
    ring: _Ring,
    one: Callable[..., tuple[jax.Array, ...]],
    rows: _Rows,
    keys: _Keys,
    slopes_H: jax.Array | None,
    hops: ArrayLike,
) -> tuple[jax.Array, ...]:
    """one() of contiguous parts, or of halves dealt so that all work the same."""

    def contiguous(rows: _Rows, keys: _Keys) -> tuple[jax.Array, ...]:
        pieces = jax.tree.map(lambda a: a[None], (rows, keys))
        results = one(ring, _parts, *pieces, slopes_H, hops)
        return tuple(a[0] for a in results)

    def zigzag(rows: _Rows, keys: _Keys) -> tuple[jax.Array, ...]:
        pieces = _deal(ring, (rows, keys))
        return _deal_back(ring, one(ring, _halves, *pieces, slopes_H, ring.size - 1))

    one_way = ring.rule.causal and keys.prefix is None
    if ring.size == 1 or not one_way or rows.q.shape[1] % 2:
        return contiguous(rows, keys)
    far = 2 * hops >= ring.size
    if isinstance(far, bool):
        return (zigzag if far else contiguous)(rows, keys)
    return lax.cond(far, zigzag, contiguous, rows, keys)


class _Visit(NamedTuple):
    """The queries of device ``row_at`` meet the keys of ``key_at``, ``hop`` away."""

    row_at: jax.Array
    key_at: jax.Array
    hop: ArrayLike


def _parts(ring: _Ring, visit: _Visit, length: int, one_way: bool) -> list[_Meeting]:
    """Whole parts meet, unless all keys come after the queries."""
    ahead = visit.row_at - visit.key_at
    return [_Meeting(0, 0, ahead * length, ahead >= 0 if one_way else True)]


def _halves(ring: _Ring, visit: _Visit, length: int, one_way: bool) -> list[_Meeting]:
    """Device r holds halves r and 2n - 1 - r: of four pairs two are causal, of a
    device's own three."""
    ahead, last = visit.row_at - visit.key_at, 2 * ring.size - 1
    late = (ahead <= 0).astype(jnp.int32)
    return [
        _Meeting(1, 0, (last - visit.row_at - visit.key_at) * length),
        _Meeting(late, late, jnp.abs(ahead) * length),
        _Meeting(0, 0, 0, visit.hop == 0),
    ]


def _deal(ring: _Ring, tree: _Tree) -> _Tree:
    """Halves 2r and 2r + 1 of device r -> r and 2n - 1 - r, (2, B, L / 2, ...)."""
    even = lax.axis_index(ring.axis) % 2 == 0

    def dealt(a: jax.Array) -> jax.Array:
        halves = jnp.split(a, 2, axis=1)
        first, second = (
            lax.ppermute(half, ring.axis, _dealing(ring, which))
            for which, half in enumerate(halves)
        )
        return jnp.where(even, jnp.stack([first, second]), jnp.stack([second, first]))

    return jax.tree.map(dealt, tree)


def _deal_back(ring: _Ring, tree: _Tree) -> _Tree:
    even = lax.axis_index(ring.axis) % 2 == 0

    def gathered(a: jax.Array) -> jax.Array:
        halves = jnp.where(even, a, a[::-1])
        back = (
            lax.ppermute(half, ring.axis, [(b, a) for a, b in _dealing(ring, which)])
            for which, half in enumerate(halves)
        )
        return jnp.concatenate(list(back), axis=1)

    return jax.tree.map(gathered, tree)


def _dealing(ring: _Ring, which: int) -> list[tuple[int, int]]:
    """From where to where the first (0) or second (1) halves go."""
    n = ring.size
    halves = range(which, 2 * n, 2)
    return [(r, h if h < n else 2 * n - 1 - h) for r, h in enumerate(halves)]


# Round the ring.


def _forward_group(
    ring: _Ring,
    meetings: Callable[..., list[_Meeting]],
    rows: _Rows,
    keys: _Keys,
    slopes_H: jax.Array | None,
    hops: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """out and lse of one group of heads: keys travel."""
    me = lax.axis_index(ring.axis)
    one_way = ring.rule.causal and keys.prefix is None

    def visit(hop: ArrayLike, keys: _Keys, state: Any) -> Any:
        key_at = (me - hop) % ring.size

        def meet(m: _Meeting, state: Any) -> Any:
            row, key = _piece(rows, m.row), _piece(keys, m.key)
            x = _operands(slopes_H, row, key, m.shift)
            part = attend(ring.implementation, row.q, key.k, key.v, ring.rule, x)
            return _put(state, _merged(_piece(state, m.row), part), m.row)

        for m in meetings(ring, _Visit(me, key_at, hop), rows.q.shape[2], one_way):
            state = _where(m.when, functools.partial(meet, m), state)
        return state

    out = jnp.zeros(rows.q.shape, accumulator(rows.q))
    state = out, jnp.full(rows.q.shape[:-1], -jnp.inf, out.dtype)

    def step(hop: jax.Array, carry: Any) -> Any:
        keys, state = carry
        # The next keys are on their way while these are read.
        return _pass_on(ring, keys, 1), visit(hop, keys, state)

    keys, state = lax.fori_loop(0, hops, step, (keys, state))
    out, lse = visit(hops, keys, state)
    return out.astype(rows.q.dtype), lse


def _merged(
    state: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    lse = jnp.logaddexp(state[1], part[1])
    out = jnp.zeros_like(state[0])
    for out_i, lse_i in (state, part):
        weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse_i - lse))
        out += weight[..., None] * out_i
    return out, lse


def _backward_group(
    ring: _Ring,
    meetings: Callable[..., list[_Meeting]],
    rows: _Rows,
    keys: _Keys,
    slopes_H: jax.Array | None,
    hops: ArrayLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv of one group of heads.

    Either side may travel: it takes its gradient along, and brings it home.
    """
    me = lax.axis_index(ring.axis)
    one_way = ring.rule.causal and keys.prefix is None
    # Per head of each: two tensors, and one or two gradients in float32.
    H, K = rows.q.shape[-2], keys.k.shape[-2]
    size, wide = rows.q.dtype.itemsize, accumulator(rows.q).itemsize
    rows_travel = H * (2 * size + wide) <= K * (2 * size + 2 * wide)
    way = -1 if rows_travel else 1

    def visit(hop: ArrayLike, guest: Any, dguest: Any, dhost: Any) -> Any:
        other = (me - way * hop) % ring.size
        at = (other, me) if rows_travel else (me, other)
        r, k = (guest, keys) if rows_travel else (rows, guest)
        dr, dk = (dguest, dhost) if rows_travel else (dhost, dguest)

        def meet(m: _Meeting, state: Any) -> Any:
            row, key = _piece(r, m.row), _piece(k, m.key)
            x = _operands(slopes_H, row, key, m.shift)
            nothing = jnp.zeros_like(row.dout)  # delta says all of out and dlse
            dq, *dkv = gradients(
                ring.implementation, row.q, key.k, key.v, ring.rule, x,
                nothing, row.lse, row.dout, -row.delta,
            )  # fmt: skip
            dr, dk = state
            return _add(dr, (dq,), m.row), _add(dk, tuple(dkv), m.key)

        for m in meetings(ring, _Visit(*at, hop), rows.q.shape[2], one_way):
            dr, dk = _where(m.when, functools.partial(meet, m), (dr, dk))
        return (dr, dk) if rows_travel else (dk, dr)

    dtype = accumulator(rows.q)
    dr = (jnp.zeros(rows.q.shape, dtype),)
    dk = tuple(jnp.zeros(keys.k.shape, dtype) for _ in range(2))
    guest, dguest, dhost = (rows, dr, dk) if rows_travel else (keys, dk, dr)

    def step(hop: jax.Array, carry: Any) -> Any:
        guest, dguest, dhost = carry
        arriving = _pass_on(ring, guest, way)
        dguest, dhost = visit(hop, guest, dguest, dhost)
        return arriving, _pass_on(ring, dguest, way), dhost

    carry = lax.fori_loop(0, hops, step, (guest, dguest, dhost))
    grads = visit(hops, *carry)
    dguest, dhost = jax.tree.map(lambda a: a.astype(rows.q.dtype), grads)
    dguest = _home(ring, dguest, way, hops)
    return (*dguest, *dhost) if rows_travel else (*dhost, *dguest)


def _home(ring: _Ring, tree: _Tree, way: int, hops: ArrayLike) -> _Tree:
    """From ``hops`` devices away back to where it came from, by the shorter way."""
    on = ring.size - hops
    back_is_shorter = hops <= on
    back = jnp.where(back_is_shorter, hops, 0)
    on = jnp.where(back_is_shorter, 0, on)
    tree = lax.fori_loop(0, back, lambda _, t: _pass_on(ring, t, -way), tree)
    return lax.fori_loop(0, on, lambda _, t: _pass_on(ring, t, way), tree)


def _pass_on(ring: _Ring, tree: _Tree, way: int) -> _Tree:
    pairs = [(r, (r + way) % ring.size) for r in range(ring.size)]
    return jax.tree.map(lambda a: lax.ppermute(a, ring.axis, pairs), tree)


def _operands(
    slopes_H: jax.Array | None, row: _Rows, key: _Keys, shift: ArrayLike
) -> Operands:
    """Only the distance of two pieces counts, so that positions stay small."""
    return Operands(slopes_H, row.ids, key.ids, key.prefix, q_offset=shift)


def _where(
    when: ArrayLike, change: Callable[[_State], _State], state: _State
) -> _State:
    if isinstance(when, bool):
        return change(state) if when else state
    return lax.cond(when, change, lambda state: state, state)


def _piece(tree: _Tree, at: ArrayLike) -> _Tree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, 0, False), tree)


def _put(tree: _Tree, piece: _Tree, at: ArrayLike) -> _Tree:
    put = functools.partial(lax.dynamic_update_index_in_dim, index=at, axis=0)
    return jax.tree.map(put, tree, piece)


def _add(tree: _Tree, piece: _Tree, at: ArrayLike) -> _Tree:
    return _put(tree, jax.tree.map(jnp.add, _piece(tree, at), piece), at)
