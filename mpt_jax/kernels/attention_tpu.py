"""Attention for TPUs: a Pallas (Mosaic) forward, and a backward in one pass.

Forward: one program per block of queries walks the blocks of keys with the online
softmax of FlashAttention (Dao et al. 2022, arXiv 2205.14135). Backward: one program per
block of keys walks the blocks of queries and makes dq, dk and dv of five products; dq
waits in VMEM. Keys and values (forward) or queries and their gradient (backward) of a
whole row stay in VMEM where they fit, so that they are read once; longer rows come in
chunks. Which tiles a program visits is computed outside (``skip.py``) and arrives by
scalar prefetch, with the slopes.

The bias of a tile is ``slope * (j - o)`` with o the position of its first query: a
vector of one row, exact in float32 at any length. A row's constant ``slope * (i - o)``
cancels in the softmax and is given back to the log-sum-exp. Logits are in base 2.

Dims beside the usual ones: T rows and U columns of a tile; C chunks; programs I over
queries and J over keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import RESIDUAL_NAMES, Operands, Rule
from mpt_jax.kernels.blocks import pad_to
from mpt_jax.kernels.tiles import TPU, TpuTiles

_LANES = 128
_LOG2E = math.log2(math.e)
_HIDDEN = -3e38  # below any running maximum, so that exp2 gives 0 without NaNs
_NO_MAXIMUM = -1e30
_EVERYWHERE = 2**30
_BLIND = 1e30  # log-sum-exp of a row that sees nothing, as backward wants it


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the rule, and how rows and columns are cut."""

    rule: Rule
    n_rows: int
    n_columns: int
    shift: int | None  # q_offset - kv_offset, None where it is traced
    biased: bool
    tiles: TpuTiles
    interpret: bool

    def of(self, tile: tuple[int, int], rest_bytes: int, by: int) -> _Cut:
        """Tiles of this size, in chunks of rows (by 0) or columns (by 1) that fit."""
        lengths = self.n_rows, self.n_columns
        T, U = (_even(n, size) for n, size in zip(lengths, tile, strict=True))
        nq, nk = math.ceil(self.n_rows / T), math.ceil(self.n_columns / U)
        count, size = ((nq, T), (nk, U))[by]
        fits = max(1, self.tiles.resident_bytes // (rest_bytes * size))
        n_chunks = math.ceil(count / fits)
        return _Cut(T, U, nq, nk, n_chunks, math.ceil(count / n_chunks))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """T x U tiles, nq by nk of them; n_chunks chunks of ``chunk`` tiles."""

    T: int
    U: int
    nq: int
    nk: int
    n_chunks: int
    chunk: int


def attention_tpu(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *,
    tiles: TpuTiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fused attention on one TPU core; under a mesh, inside jax.shard_map.

    Args: as kernels.attention.attention; tiles: by default those of the device that
      the code is compiled for; interpret: run on any platform, slowly, to test.

    Raises: NotImplementedError: the target is no TPU of tiles.TPU, or the case is not
      covered: dropout, float16, float64.
    Numerics: as kernels.attention.attention; the softmax is rounded to the dtype of v
      before it meets v. rule.skip leaves out keys as skip.lower_key_blocks says.
    """
    plan = _plan(q_BLHD, k_BSKD, rule, operands, tiles, interpret)
    return _flash(plan, q_BLHD, k_BSKD, v_BSKD, operands)


def gradients_tpu(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *out_lse_dout_dlse: jax.Array,
    tiles: TpuTiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As kernels.attention.gradients."""
    plan = _plan(q_BLHD, k_BSKD, rule, operands, tiles, interpret)
    return _backward(plan, q_BLHD, k_BSKD, v_BSKD, operands, *out_lse_dout_dlse)


def _plan(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    tiles: TpuTiles | None,
    interpret: bool,
) -> _Plan:
    if rule.dropout_rate:
        raise NotImplementedError("the TPU kernel has no dropout; use 'xla'")
    if q_BLHD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the TPU kernel has no {q_BLHD.dtype}; use 'xla'")
    tiles = tiles or _tiles_of_target()
    L, S = q_BLHD.shape[1], k_BSKD.shape[1]
    offsets = operands.q_offset, operands.kv_offset
    known = all(isinstance(offset, int) for offset in offsets)
    shift = offsets[0] - offsets[1] if known else None
    biased = operands.slopes_H is not None
    return _Plan(rule, L, S, shift, biased, tiles, interpret)


def _tiles_of_target() -> TpuTiles:
    """Of the TPU that is compiled for: the ambient mesh's, else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    if kind not in TPU:
        raise NotImplementedError(
            f"implementation='tpu': the device is {kind!r}, expected one of "
            f"{sorted(TPU)}; use 'auto' or 'xla'"
        )
    return TPU[kind]


def _even(length: int, largest: int) -> int:
    """Tile size that cuts length into few, equal tiles of whole vector registers."""
    share = math.ceil(length / math.ceil(length / largest))
    return min(largest, _LANES * math.ceil(share / _LANES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    plan: _Plan, q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array]:
    return _forward(plan, q_BLHD, k_BSKD, v_BSKD, x)


def _flash_forward(plan, q_BLHD, k_BSKD, v_BSKD, x):
    results = _forward(plan, q_BLHD, k_BSKD, v_BSKD, x)
    out_BLHD, lse_BLH = map(checkpoint_name, results, RESIDUAL_NAMES)
    return (out_BLHD, lse_BLH), (q_BLHD, k_BSKD, v_BSKD, x, out_BLHD, lse_BLH)


def _flash_backward(plan, residuals, cotangents):
    return *_backward(plan, *residuals, *cotangents), None


_flash.defvjp(_flash_forward, _flash_backward)


# The forward.


# The jit is for jax 0.10, which drops an unused call to a function (when a remat policy
# saved its results) but not an unused pallas_call.
@functools.partial(jax.jit, static_argnums=0)
def _forward(
    plan: _Plan, q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, x: Operands
) -> tuple[jax.Array, jax.Array]:
    B, L, H, D = q_BLHD.shape
    G = H // k_BSKD.shape[2]
    # Per key: k and v, and up to two rows of 8 sublanes, all with a second buffer.
    cut = plan.of(plan.tiles.forward, 4 * _lane_bytes(D, k_BSKD.dtype) + 4 * 32, by=1)
    T, U, width = cut.T, cut.U, cut.chunk * cut.U
    prefetch = _scalars(plan, cut, q_BLHD, k_BSKD, x, skip.key_ranges)

    def chunk_of(b, h, i, c, first, end, *_):
        """A chunk that is not visited is not fetched: its neighbour stays."""
        at = (b * H + h) * cut.nq + i
        low = lax.div(first[at], cut.chunk)
        high = lax.div(jnp.maximum(end[at] - 1, 0), cut.chunk)
        return jnp.minimum(jnp.maximum(c, low), jnp.maximum(high, 0))

    def rows(b, h, i, c, *_):
        return b, h, i, 0

    def keys(b, h, i, c, *scalars):
        return b, lax.div(h, G), chunk_of(b, h, i, c, *scalars), 0

    def key_row(b, h, i, c, *scalars):
        return b, 0, chunk_of(b, h, i, c, *scalars)

    block = {
        "q": pl.BlockSpec((None, None, T, D), rows),
        "k": pl.BlockSpec((None, None, width, D), keys),
        "v": pl.BlockSpec((None, None, width, D), keys),
        "q_ids": pl.BlockSpec((None, 1, T), lambda b, h, i, c, *_: (b, 0, i)),
        "kv_ids": pl.BlockSpec((None, 1, width), key_row),
        "reach": pl.BlockSpec((None, 1, width), key_row),
    }
    arrays = {"q": _heads_first(q_BLHD, T)}
    arrays |= {"k": _heads_first(k_BSKD, U), "v": _heads_first(v_BSKD, U)}
    arrays |= _token_rows(x, T, U)
    n = cut.nq * T
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan, cut, tuple(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(B, H, cut.nq, cut.n_chunks),
            in_specs=[block[name] for name in arrays],
            out_specs=[
                block["q"],
                pl.BlockSpec((None, None, 1, T), lambda b, h, i, c, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((T, D), jnp.float32),
                pltpu.VMEM((T, _LANES), jnp.float32),
                pltpu.VMEM((T, _LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, n, D), q_BLHD.dtype),
            jax.ShapeDtypeStruct((B, H, 1, n), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.tiles.vmem_bytes,
        ),
        interpret=plan.interpret,
        name="attention_forward",
    )(*prefetch, *arrays.values())
    return out[:, :, :L].swapaxes(1, 2), lse[:, :, 0, :L].swapaxes(1, 2)


def _forward_kernel(plan: _Plan, cut: _Cut, names: tuple[str, ...], *refs) -> None:
    scalars, refs = refs[: len(_Scalars._fields)], refs[len(_Scalars._fields) :]
    ref = dict(zip(names, refs, strict=False))
    out_ref, lse_ref, acc_ref, top_ref, total_ref = refs[len(names) :]
    b, h, i, c = (pl.program_id(axis) for axis in range(4))
    at = (b * pl.num_programs(1) + h) * cut.nq + i
    s = _Scalars(*scalars)
    slope, start = s.slopes[h], s.shift[0] + i * cut.T
    T, U = cut.T, cut.U

    @pl.when(c == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, _NO_MAXIMUM)
        total_ref[...] = jnp.zeros_like(total_ref)

    q_ids = _across(_down(ref["q_ids"][...]), U) if "q_ids" in ref else None

    def tile(j, positional):
        here = pl.ds((j - c * cut.chunk) * U, U)
        k, v = ref["k"][here, :], ref["v"][here, :]
        view = _View(
            first_row=start,
            first_column=j * U,
            slope=slope,
            row_axis=0,
            positional=positional,
            q_ids=q_ids,
            kv_ids=ref["kv_ids"][:, here] if "kv_ids" in ref else None,
            reach=ref["reach"][:, here] if "reach" in ref else None,
        )
        _, logits = _logits(plan, view, _dot(ref["q"][...], k, 1, 1))
        old_top = top_ref[...]
        top = jnp.maximum(old_top, logits.max(1, keepdims=True))
        p = jnp.exp2(logits - _across(top, U))
        shrink = jnp.exp2(old_top - top)
        # One partial sum per lane: lanes are added up once, at the end.
        partial = sum(p[:, n : n + _LANES] for n in range(0, U, _LANES))
        total_ref[...] = total_ref[...] * shrink + partial
        acc = acc_ref[...] * _across(shrink, acc_ref.shape[1])
        acc_ref[...] = acc + _dot(p.astype(v.dtype), v, 1, 0)
        top_ref[...] = top

    chunk = c * cut.chunk, (c + 1) * cut.chunk
    _visit(s, at, i, chunk, tile, leading=plan.rule.window is not None)

    @pl.when(c == cut.n_chunks - 1)
    def _():
        total = total_ref[...].sum(1, keepdims=True)
        safe = jnp.where(total == 0, 1, total)
        out_ref[...] = (acc_ref[...] / safe).astype(out_ref.dtype)
        i_T = lax.broadcasted_iota(jnp.int32, (T, _LANES), 0)
        back = slope * (i_T + (start - _origin(plan, start))).astype(jnp.float32)
        lse = (top_ref[...] - back) / _LOG2E + jnp.log(safe)
        lse = jnp.where(total == 0, -jnp.inf, lse)
        lse_ref[...] = lse.T[:1]


# The backward.


def _backward(
    plan: _Plan,
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    x: Operands,
    out_BLHD: jax.Array,
    lse_BLH: jax.Array,
    dout_BLHD: jax.Array,
    dlse_BLH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ds = p * (dp - delta), dp = do . v, delta = do . out - dlse, as dlse/ds = p."""
    (B, L, H, D), (_, S, K, _) = q_BLHD.shape, k_BSKD.shape
    G = H // K
    # Per query: q, do and dq with a second buffer, dq once in float32, three rows.
    a_row = 6 * _lane_bytes(D, q_BLHD.dtype) + _lane_bytes(D, jnp.float32) + 6 * 32
    cut = plan.of(plan.tiles.backward, a_row, by=0)
    T, U, width = cut.T, cut.U, cut.chunk * cut.T
    prefetch = _scalars(plan, cut, q_BLHD, k_BSKD, x, skip.query_ranges)

    delta_BLH = (dout_BLHD.astype(jnp.float32) * out_BLHD).sum(-1) - dlse_BLH
    rows_L = prefetch.shift + jnp.arange(L, dtype=jnp.int32)
    starts_L = prefetch.shift + jnp.arange(L, dtype=jnp.int32) // T * T
    since_L = (rows_L - _origin(plan, starts_L)).astype(jnp.float32)
    base_2 = lse_BLH * _LOG2E + (since_L[:, None] * prefetch.slopes[None, :])[None]
    base_2 = jnp.where(lse_BLH == -jnp.inf, _BLIND, base_2)

    arrays = {"q": _heads_first(q_BLHD, T), "dout": _heads_first(dout_BLHD, T)}
    arrays |= {"k": _heads_first(k_BSKD, U), "v": _heads_first(v_BSKD, U)}
    arrays |= {"lse": _heads_first(base_2[..., None], T, _BLIND).swapaxes(2, 3)}
    arrays |= {"delta": _heads_first(delta_BLH[..., None], T).swapaxes(2, 3)}
    arrays |= _token_rows(x, T, U)

    # Axes: batch, KV head, its query heads, chunks of queries, blocks of keys.
    rows = pl.BlockSpec(
        (None, None, width, D), lambda b, n, g, c, j, *_: (b, n * G + g, c, 0)
    )
    row = pl.BlockSpec(
        (None, None, 1, width), lambda b, n, g, c, j, *_: (b, n * G + g, 0, c)
    )
    keys = pl.BlockSpec((None, None, U, D), lambda b, n, g, c, j, *_: (b, n, j, 0))
    key_row = pl.BlockSpec((None, 1, U), lambda b, n, g, c, j, *_: (b, 0, j))
    block = {"q": rows, "dout": rows, "k": keys, "v": keys, "lse": row, "delta": row}
    block |= {"kv_ids": key_row, "reach": key_row}
    block["q_ids"] = pl.BlockSpec((None, 1, width), lambda b, n, g, c, j, *_: (b, 0, c))

    once = G * cut.n_chunks == 1  # each block of dk and dv is made by one program
    dkv = jax.ShapeDtypeStruct(arrays["k"].shape, k_BSKD.dtype if once else jnp.float32)
    accumulators = [pltpu.VMEM((U, D), jnp.float32)] * 2
    staging = [pltpu.VMEM((2, U, D), jnp.float32), pltpu.SemaphoreType.DMA((2,))]
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, plan, cut, tuple(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(B, K, G, cut.n_chunks, cut.nk),
            in_specs=[block[name] for name in arrays],
            out_specs=[
                rows,
                *[keys if once else pl.BlockSpec(memory_space=pl.ANY)] * 2,
            ],
            scratch_shapes=[
                pltpu.VMEM((width, D), jnp.float32),
                *accumulators,
                *([] if once else staging),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(arrays["q"].shape, q_BLHD.dtype), dkv, dkv],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=plan.tiles.vmem_bytes,
        ),
        interpret=plan.interpret,
        name="attention_backward",
    )(*prefetch, *arrays.values())
    dk, dv = (a[:, :, :S].swapaxes(1, 2).astype(k_BSKD.dtype) for a in (dk, dv))
    return dq[:, :, :L].swapaxes(1, 2), dk, dv


def _backward_kernel(plan: _Plan, cut: _Cut, names: tuple[str, ...], *refs) -> None:
    """Tiles stand transposed, keys by queries: lse and delta are rows of registers."""
    scalars, refs = refs[: len(_Scalars._fields)], refs[len(_Scalars._fields) :]
    ref = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc, *staging = refs[len(names) :]
    b, n, g, c, j = (pl.program_id(axis) for axis in range(5))
    G = pl.num_programs(2)
    h = n * G + g
    at = (b * pl.num_programs(1) * G + h) * cut.nk + j
    s = _Scalars(*scalars)
    T, scale = cut.T, plan.rule.softmax_scale

    @pl.when(j == 0)
    def _():
        @pl.loop(0, cut.chunk)
        def _(t):
            dq_acc[pl.ds(t * T, T), :] = jnp.zeros((T, dq_acc.shape[1]), jnp.float32)

    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    k, v = ref["k"][...], ref["v"][...]
    kv_ids, reach = (
        _across(_down(ref[name][...]), T) if name in ref else None
        for name in ("kv_ids", "reach")
    )

    def tile(t, positional):
        here = pl.ds((t - c * cut.chunk) * T, T)
        q, dout = ref["q"][here, :], ref["dout"][here, :]
        view = _View(
            first_row=s.shift[0] + t * T,
            first_column=j * cut.U,
            slope=s.slopes[h],
            row_axis=1,
            positional=positional,
            q_ids=ref["q_ids"][:, here] if "q_ids" in ref else None,
            kv_ids=kv_ids,
            reach=reach,
        )
        tanh, logits = _logits(plan, view, _dot(k, q, 1, 1))
        p = jnp.exp2(logits - ref["lse"][:, here])
        ds = p * (_dot(v, dout, 1, 1) - ref["delta"][:, here])
        if plan.rule.logit_softcap is not None:
            ds = ds * (1 - tanh * tanh)
        ds = ds.astype(q.dtype)
        dv_acc[...] += _dot(p.astype(dout.dtype), dout, 1, 0)
        dk_acc[...] += _dot(ds, q, 1, 0)
        dq_acc[here, :] += _dot(ds, k, 0, 0)

    chunk = c * cut.chunk, (c + 1) * cut.chunk
    leading = plan.rule.causal or plan.rule.window is not None
    _visit(s, at, j, chunk, tile, leading=leading)

    if staging:
        where = b, n, pl.ds(j * cut.U, cut.U)
        first = (g == 0) & (c == 0)
        _add_to_hbm(
            dk_ref.at[where], dv_ref.at[where], dk_acc, dv_acc, scale, first, *staging
        )
    else:
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(j == cut.nk - 1)
    def _():
        @pl.loop(0, cut.chunk)
        def _(t):
            here = pl.ds(t * T, T)
            dq_ref[here, :] = (dq_acc[here, :] * scale).astype(dq_ref.dtype)


def _add_to_hbm(
    dk_hbm, dv_hbm, dk_acc, dv_acc, scale, first, stage, semaphores
) -> None:
    """dk and dv in HBM += this program's share; other chunks and heads add theirs."""
    pairs = list(enumerate((dk_hbm, dv_hbm)))

    @pl.when(first)
    def _():
        stage[...] = jnp.zeros_like(stage)

    @pl.when(jnp.logical_not(first))
    def _():
        copies = [
            pltpu.make_async_copy(a, stage.at[n], semaphores.at[n]) for n, a in pairs
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    stage[0] += dk_acc[...] * scale
    stage[1] += dv_acc[...]
    copies = [pltpu.make_async_copy(stage.at[n], a, semaphores.at[n]) for n, a in pairs]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


# What both share.


class _Scalars(NamedTuple):
    """What programs read before they start: flat, as SMEM pads the rows of a matrix."""

    first: jax.Array  # of (batch, head, program)
    end: jax.Array
    full_first: jax.Array  # of (program,)
    full_end: jax.Array
    shift: jax.Array  # (1,): the column at the position of row 0
    slopes: jax.Array  # (H,), in base 2


def _scalars(
    plan: _Plan,
    cut: _Cut,
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    x: Operands,
    ranges_of: Callable[[jax.Array, jax.Array, jax.Array], skip.Ranges],
) -> _Scalars:
    B, L, H, _ = q_BLHD.shape
    rule, sizes = plan.rule, {"block_q": cut.T, "block_k": cut.U}
    if plan.shift is not None:  # jit and vjp made these arrays
        x = x._replace(q_offset=plan.shift, kv_offset=0)
    some, full = skip.block_visibility(L, k_BSKD.shape[1], rule, x, **sizes)
    eps = skip.skip_eps(rule, cut.nk)
    lower_BHI = skip.lower_key_blocks(q_BLHD, k_BSKD, rule, x, eps=eps, **sizes)
    ranges = ranges_of(some, full, lower_BHI)
    first, end = (a if a.ndim == 3 else a[:, None] for a in ranges[:2])
    shape = B, H, first.shape[-1]
    first, end = (jnp.broadcast_to(a, shape).reshape(-1) for a in (first, end))
    shift = jnp.asarray(x.q_offset, jnp.int32) - x.kv_offset
    slopes_H = jnp.zeros(H) if x.slopes_H is None else x.slopes_H
    slopes_H = lax.stop_gradient(jnp.asarray(slopes_H, jnp.float32)) * _LOG2E
    return _Scalars(first, end, *ranges[2:], shift.reshape(1), slopes_H)


def _token_rows(x: Operands, T: int, U: int) -> dict[str, jax.Array]:
    """The masks, one int32 row per batch element, (B, 1, whole tiles)."""
    rows = {}
    if x.q_segment_ids_BL is not None:
        # Padding equals nothing on the other side.
        q_ids_BL = jnp.where(x.q_segment_ids_BL == 0, -1, x.q_segment_ids_BL)
        rows |= {"q_ids": pad_to(q_ids_BL, T), "kv_ids": pad_to(x.kv_segment_ids_BS, U)}
    if x.prefix_mask_BS is not None:  # how far ahead of a query it may stand
        rows["reach"] = pad_to(x.prefix_mask_BS * _EVERYWHERE, U)
    return {name: row[:, None].astype(jnp.int32) for name, row in rows.items()}


def _visit(
    s: _Scalars,
    at: ArrayLike,
    n: ArrayLike,
    chunk: tuple[ArrayLike, ArrayLike],
    tile: Callable[[ArrayLike, bool], None],
    *,
    leading: bool,
) -> None:
    """tile(t, positional) for the tiles of a chunk that program n visits.

    Tiles that hide nothing by position go two at a time, so that one's vector work
    overlaps the other's products; an odd one out goes with those that hide.
    leading: whether tiles before them may hide.
    """
    low, high = chunk
    first = jnp.clip(s.first[at], low, high)
    end = jnp.clip(s.end[at], first, high)
    full_first = jnp.clip(s.full_first[n], first, end) if leading else first
    full_end = jnp.clip(s.full_end[n], full_first, end)
    if leading:
        pl.loop(first, full_first)(lambda t: tile(t, True))
    pairs = lax.div(full_end - full_first, 2)

    @pl.loop(0, pairs)
    def _(n):
        tile(full_first + 2 * n, False)
        tile(full_first + 2 * n + 1, False)

    pl.loop(full_first + 2 * pairs, end)(lambda t: tile(t, True))


class _View(NamedTuple):
    """Where a tile lies and who may see whom in it; rows run along row_axis.

    first_row, first_column: positions, in columns. positional: False where causality,
    window and length hide nothing. q_ids, kv_ids, reach: along their axis or whole.
    """

    first_row: ArrayLike
    first_column: ArrayLike
    slope: ArrayLike
    row_axis: int
    positional: bool
    q_ids: jax.Array | None
    kv_ids: jax.Array | None
    reach: jax.Array | None


def _logits(plan: _Plan, x: _View, qk: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """The soft-cap's tanh; and the logits with bias and masks, in base 2, each row less
    its own slope * (i - origin)."""
    rule, tanh = plan.rule, None
    if rule.logit_softcap is None:
        s = qk * (rule.softmax_scale * _LOG2E)
    else:
        tanh = jnp.tanh(qk * (rule.softmax_scale / rule.logit_softcap))
        s = tanh * (rule.logit_softcap * _LOG2E)

    def along(axis):
        shape = tuple(n if a == axis else 1 for a, n in enumerate(qk.shape))
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    origin = _origin(plan, x.first_row)
    column = along(1 - x.row_axis) + x.first_column
    whole = (
        lax.broadcasted_iota(jnp.int32, qk.shape, a)
        for a in (1 - x.row_axis, x.row_axis)
    )
    ahead = next(whole) - next(whole) + (x.first_column - x.first_row)
    if plan.biased:
        if rule.causal and not (x.positional and x.reach is not None):
            offset = column - origin
        else:  # keys may lie ahead
            offset = along(x.row_axis) + (x.first_row - origin) - jnp.abs(ahead)
        s = s + x.slope * offset.astype(jnp.float32)

    visible = []
    if x.positional:
        if rule.causal:
            visible.append(ahead <= (0 if x.reach is None else x.reach))
        if rule.window is not None:
            visible.append(jnp.abs(ahead) <= rule.window)
        if plan.n_columns % qk.shape[1 - x.row_axis]:
            visible.append(column < plan.n_columns)
    if x.q_ids is not None:
        visible.append(x.q_ids == x.kv_ids)
    for mask in visible:
        s = jnp.where(mask, s, _HIDDEN)
    return tanh, s


def _origin(plan: _Plan, first_row: ArrayLike) -> jax.Array:
    """What position a tile's bias counts from: its first row, or the key next to it."""
    return jnp.clip(first_row, 0, plan.n_columns - 1)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _down(row_1N: jax.Array) -> jax.Array:
    """A row as a column, (N, lanes)."""
    return jnp.broadcast_to(row_1N, (_LANES, row_1N.shape[1])).T


def _across(a_NX: jax.Array, width: int) -> jax.Array:
    """A column that fills its lanes, repeated to (N, width)."""
    repeats = math.ceil(width / _LANES)
    return jnp.tile(a_NX, (1, repeats))[:, :width]


def _heads_first(a_BLHD: jax.Array, tile: int, fill: float = 0) -> jax.Array:
    return pad_to(a_BLHD, tile, fill=fill).swapaxes(1, 2)


def _lane_bytes(D: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of one row of D numbers in VMEM, which pads it to whole registers."""
    return _LANES * math.ceil(D / _LANES) * jnp.dtype(dtype).itemsize
