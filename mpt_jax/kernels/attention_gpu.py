"""Attention for NVIDIA GPUs: three Pallas Triton kernels that compute the ALiBi bias.

FlashAttention 2 (Dao 2023, arXiv 2307.08691): the forward and dq visit blocks of keys
for one block of queries, dk and dv blocks of queries for one block of keys, so that
nothing is summed in memory. What ALiBi changes: a softmax does not see a bias that its
row shares, so that -slope |i - j| becomes slope (j - first column), the same for every
row and block: one fused multiply-add per logit, precise at any length. What a block of
keys has less, slope (first column - first row), shifts the running maximum. And each
head visits only the blocks that ``kernels.skip`` could not prove erased.

jax deprecated Pallas Triton in 0.11 (a DeprecationWarning where a kernel is lowered)
and says that a later release removes it; 0.12 still has it. Its replacement is Pallas
Mosaic GPU, which reaches back to Ampere since 0.11 and so needs Python 3.12. Triton is
used in this file alone; where jax has none, "auto" attention runs in XLA.

Dims beside the usual ones: G = H // K query heads per KV head; P is D padded to a power
of 2, Triton's only sizes; Q rows and T columns of one block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import RESIDUAL_NAMES, Operands, Rule
from mpt_jax.kernels.blocks import pad_to
from mpt_jax.kernels.tiles import GpuTile, GpuTiles, gpu_tiles

try:
    from jax.experimental.pallas import triton
except ImportError as error:  # a jax without it: "auto" goes on to XLA
    raise NotImplementedError("this jax has no Pallas Triton") from error

_LOG2E = math.log2(math.e)
# Where a running maximum starts: finite, so that hidden logits (-inf) weigh 0 and make
# no NaN even while a row has seen nothing. Real logits lie far above it.
_FLOOR = -1e30
_MIN_BLOCK = 16  # the smallest matmul of the tensor cores
_SKIP_UNIT = 512  # the blocks in which skip counts whether a row is worth its norms
_DECODE_COLUMNS = 128  # the blocks of kernels.decode, whose norms these are
_DECODE_PROGRAMS = 264  # two for each core of an H100

_Carry = TypeVar("_Carry")
_Refs = Mapping[str, Any]  # what a kernel reads, by name; the batch dim is gone


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the rule, the tiles, and whether to interpret the kernels."""

    rule: Rule
    n_columns: int
    head_dim: int
    padded_dim: int
    group: int
    tiles: GpuTiles
    interpret: bool


class _Bounds(NamedTuple):
    """Loop bounds of each kernel, (B, H, blocks, 4): first, full_first, full_end, end.

    Those from full_first to full_end hide nothing by position.
    """

    forward: jax.Array
    dq: jax.Array
    dkv: jax.Array


def attention_gpu(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *,
    tiles: GpuTiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention in O(L + S) memory on an NVIDIA GPU, forward and backward.

    Args: as kernels.attention.attention; tiles: block sizes and warps, by default what
      suits the device; interpret: run the kernels anywhere as plain JAX, slowly.
    Raises: NotImplementedError: dropout, float64, or no NVIDIA GPU.
    Numerics: logits and sums in float32, matmuls in the dtype of q, in full precision
      for float32 (not TF32). exp2 is the hardware's, good to 2 units in the last place.
      The softmax and its gradient are rounded to the dtype of q before a matmul.
    Source: Dao 2023; Press et al. 2022 (arXiv 2108.12409).
    """
    plan = _plan(q_BLHD, k_BSKD, rule, tiles, interpret)
    bounds = _bounds(plan, q_BLHD, k_BSKD, operands)
    return _flash(plan, q_BLHD, k_BSKD, v_BSKD, operands, bounds)


def gradients_gpu(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    rule: Rule,
    operands: Operands,
    *out_lse_dout_dlse: jax.Array,
    tiles: GpuTiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As kernels.attention.gradients."""
    plan = _plan(q_BLHD, k_BSKD, rule, tiles, interpret)
    bounds = _bounds(plan, q_BLHD, k_BSKD, operands)
    saved = q_BLHD, k_BSKD, v_BSKD, operands, bounds, *out_lse_dout_dlse[:2]
    return _flash_backward(plan, saved, out_lse_dout_dlse[2:])[:3]


def _plan(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    rule: Rule,
    tiles: GpuTiles | None,
    interpret: bool,
) -> _Plan:
    if rule.dropout_rate:
        raise NotImplementedError("the GPU kernel has no dropout; use 'auto' or 'xla'")
    if q_BLHD.dtype == jnp.float64:
        raise NotImplementedError("the GPU kernel has no float64; use 'auto' or 'xla'")
    (_, L, H, D), (_, S, K, _) = q_BLHD.shape, k_BSKD.shape
    kind, padded_dim = _device_kind(interpret), max(_MIN_BLOCK, pl.next_power_of_2(D))
    crowded = H != K or rule.logit_softcap is not None
    tiles = tiles or gpu_tiles(kind, q_BLHD.dtype.itemsize, padded_dim, crowded=crowded)
    tiles = tiles.fitted(L, S, _MIN_BLOCK)
    return _Plan(rule, S, D, padded_dim, H // K, tiles, interpret)


def _device_kind(interpret: bool) -> str:
    """Of the GPU that is compiled for, which need not be the machine's."""
    target = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if target.platform not in ("cuda", "gpu") and not interpret:
        kind = f"{target.platform}:{target.device_kind}"
        raise NotImplementedError(f"the GPU kernel needs an NVIDIA GPU, got {kind}")
    return target.device_kind


def _bounds(plan: _Plan, q: jax.Array, k: jax.Array, x: Operands) -> _Bounds:
    q, k = lax.stop_gradient((q, k))
    (B, L, H, _), rule = q.shape, plan.rule

    def of(tile: GpuTile, ranges: Callable[..., skip.Ranges]) -> jax.Array:
        sizes = {"block_q": tile.rows, "block_k": tile.columns}
        eps = skip.skip_eps(rule, math.ceil(plan.n_columns / _SKIP_UNIT))
        lower_BHI = skip.lower_key_blocks(q, k, rule, x, eps=eps, **sizes)
        some, full = skip.block_visibility(L, plan.n_columns, rule, x, **sizes)
        first, end, full_first, full_end = (
            jnp.broadcast_to(a if a.ndim == 3 else a[..., None, :], (B, H, a.shape[-1]))
            for a in map(_at_least_2d, ranges(some, full, lower_BHI))
        )
        end = jnp.maximum(first, end)
        full_first, full_end = (jnp.clip(a, first, end) for a in (full_first, full_end))
        # An empty run of full blocks lies where a kernel without a window has a loop
        # on its other side: keys have one after it, queries one before it.
        aside = first if ranges is skip.key_ranges else end
        empty = full_first >= full_end
        full_first, full_end = (
            jnp.where(empty, aside, a) for a in (full_first, full_end)
        )
        return jnp.stack([first, full_first, full_end, end], -1)

    t = plan.tiles
    return _Bounds(
        forward=of(t.forward, skip.key_ranges),
        dq=of(t.dq, skip.key_ranges),
        dkv=of(t.dkv, skip.query_ranges),
    )


def _at_least_2d(a: jax.Array) -> jax.Array:
    return a if a.ndim > 1 else a[None]


# The kernels. ``x`` holds what the call has of q, k, v, dout (rows or columns, heads,
# D), lse, delta (H, rows), bounds, slope (H,), offset (1,), q_ids, kv_ids and prefix.


def _forward_kernel(x: _Refs, out_ref, lse_ref, *, plan: _Plan) -> None:
    tile, i, h = plan.tiles.forward, _last_first(), pl.program_id(1)
    rows = _rows(x, tile, i, axis=0)
    q = _load(plan, x["q"], i, tile.rows, h)

    def block(j, carry, *, full):
        acc, top, total = carry
        k = _load(plan, x["k"], j, tile.columns, lax.div(h, plan.group))
        columns = _columns(x, tile, j, axis=1)
        s, base, _ = _logits(plan, x, _dot(q, k.T), h, rows, columns, full=full)
        new_top = jnp.maximum(top, s.max(1) + base)
        p = _exp2(plan, s - (new_top - base)[:, None])
        shrink = _exp2(plan, top - new_top)
        total = total * shrink + p.sum(1)
        v = _load(plan, x["v"], j, tile.columns, lax.div(h, plan.group))
        acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), v)
        return acc, new_top, total

    acc = jnp.zeros((tile.rows, plan.padded_dim), jnp.float32)
    total = jnp.zeros((tile.rows,), jnp.float32)
    start = acc, total + _FLOOR, total
    acc, top, total = _over_keys(plan, x, h, i, block, start)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    _store(plan, out_ref, i, tile.rows, h, acc / total[:, None])
    lse = jnp.where(seen, top + jnp.log2(total), -jnp.inf)
    lse_ref[h, pl.ds(i * tile.rows, tile.rows)] = lse


def _dq_kernel(x: _Refs, dq_ref, *, plan: _Plan) -> None:
    tile, i, h = plan.tiles.dq, _last_first(), pl.program_id(1)
    rows = _rows(x, tile, i, axis=0)
    q = _load(plan, x["q"], i, tile.rows, h)
    dout = _load(plan, x["dout"], i, tile.rows, h)
    at = pl.ds(i * tile.rows, tile.rows)
    lse, delta = x["lse"][h, at][:, None], x["delta"][h, at][:, None]

    def block(j, dq, *, full):
        k = _load(plan, x["k"], j, tile.columns, lax.div(h, plan.group))
        v = _load(plan, x["v"], j, tile.columns, lax.div(h, plan.group))
        columns = _columns(x, tile, j, axis=1)
        s, base, tanh = _logits(plan, x, _dot(q, k.T), h, rows, columns, full=full)
        p = _exp2(plan, s - (lse - base))
        ds = _logit_gradient(p, _dot(dout, v.T), delta, tanh)
        return dq + _dot(ds.astype(k.dtype), k)

    dq = jnp.zeros((tile.rows, plan.padded_dim), jnp.float32)
    dq = _over_keys(plan, x, h, i, block, dq)
    _store(plan, dq_ref, i, tile.rows, h, dq * plan.rule.softmax_scale)


def _dkv_kernel(x: _Refs, dk_ref, dv_ref, *, plan: _Plan) -> None:
    """Logits lie transposed here, T by Q: dk and dv contract over the rows."""
    tile, j, kv_head = plan.tiles.dkv, pl.program_id(0), pl.program_id(1)
    k = _load(plan, x["k"], j, tile.columns, kv_head)
    v = _load(plan, x["v"], j, tile.columns, kv_head)
    columns = _columns(x, tile, j, axis=0)

    def head(g, carry):
        h = kv_head * plan.group + g

        def block(i, carry, *, full):
            dk, dv = carry
            q = _load(plan, x["q"], i, tile.rows, h)
            dout = _load(plan, x["dout"], i, tile.rows, h)
            at = pl.ds(i * tile.rows, tile.rows)
            rows = _rows(x, tile, i, axis=1)
            s, _, tanh = _logits(
                plan, x, _dot(k, q.T), h, rows, columns, full=full, transposed=True
            )
            p = _exp2(plan, s - x["lse"][h, at][None, :])
            dv = dv + _dot(p.astype(dout.dtype), dout)  # here, to free the registers
            delta = x["delta"][h, at][None, :]
            ds = _logit_gradient(p, _dot(v, dout.T), delta, tanh)
            return dk + _dot(ds.astype(q.dtype), q), dv

        return _over_queries(plan, x, h, j, block, carry)

    zeros = jnp.zeros((tile.columns, plan.padded_dim), jnp.float32)
    start = zeros, zeros
    once = plan.group == 1  # then no loop is around the loops
    dk, dv = head(0, start) if once else lax.fori_loop(0, plan.group, head, start)
    _store(plan, dk_ref, j, tile.columns, kv_head, dk * plan.rule.softmax_scale)
    _store(plan, dv_ref, j, tile.columns, kv_head, dv)


class _Rows(NamedTuple):
    """Of one block: the column that its first row stands at, 0 to Q - 1, segments."""

    start: jax.Array
    count: jax.Array
    ids: jax.Array | None


class _Columns(NamedTuple):
    """Of one block: its first column, 0 to T - 1, segments, and what all may see."""

    start: jax.Array
    count: jax.Array
    ids: jax.Array | None
    prefix: jax.Array | None


def _rows(x: _Refs, tile: GpuTile, i: jax.Array, *, axis: int) -> _Rows:
    start = i * tile.rows
    count = jnp.expand_dims(jnp.arange(tile.rows, dtype=jnp.int32), 1 - axis)
    ids = _marks(x, "q_ids", pl.ds(start, tile.rows), axis)
    return _Rows(x["offset"][0] + start, count, ids)


def _columns(x: _Refs, tile: GpuTile, j: jax.Array, *, axis: int) -> _Columns:
    start = j * tile.columns
    count = jnp.expand_dims(jnp.arange(tile.columns, dtype=jnp.int32), 1 - axis)
    at = pl.ds(start, tile.columns)
    marks = (_marks(x, name, at, axis) for name in ("kv_ids", "prefix"))
    return _Columns(start, count, *marks)


def _marks(x: _Refs, name: str, at: Any, axis: int) -> jax.Array | None:
    return jnp.expand_dims(x[name][at], 1 - axis) if name in x else None


def _logits(
    plan: _Plan,
    x: _Refs,
    qk: jax.Array,
    h: jax.Array,
    rows: _Rows,
    columns: _Columns,
    *,
    full: bool,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(s, base, tanh): base-2 logits are s + base - slope * row, the last left out.

    Hidden ones are -inf; tanh is the soft-cap's. With rows and columns counted within
    their blocks and gap = first column - first row, -slope |i - j| + slope i is base =
    slope gap plus slope j for keys behind, slope (2 i - 2 gap - j) for keys ahead.
    """
    rule, tanh = plan.rule, None
    s, factor = qk, rule.softmax_scale * _LOG2E
    if rule.logit_softcap is not None:
        s = tanh = jnp.tanh(qk * (rule.softmax_scale / rule.logit_softcap))
        factor = rule.logit_softcap * _LOG2E

    gap, i, j = columns.start - rows.start, rows.count, columns.count
    if "slope" in x:
        slope = x["slope"][h]
        behind = rule.causal and (full or columns.prefix is None)
        distance = j if behind else jnp.minimum(j, 2 * (i - gap) - j)
        base = slope * gap.astype(jnp.float32)
        bias = slope * distance.astype(jnp.float32)
        if transposed:  # a thread has few keys and many queries: the cheaper side
            bias, base = bias + base, jnp.float32(0)
        s = _multiply_add(plan, s, factor, bias)
    else:
        s, base = s * factor, jnp.float32(0)

    visible = []
    if not full and rule.causal:
        past = j <= i - gap
        visible.append(past if columns.prefix is None else past | (columns.prefix != 0))
    if not full and rule.window is not None:
        visible.append(jnp.abs(i - gap - j) <= rule.window)
    if not full and x["k"].shape[0] != plan.n_columns:  # columns that are padding
        visible.append(j < plan.n_columns - columns.start)
    if rows.ids is not None:
        visible.append(rows.ids == columns.ids)
    for mask in visible:
        s = jnp.where(mask, s, -jnp.inf)
    return s, base, tanh


def _logit_gradient(
    p: jax.Array, dp: jax.Array, delta: jax.Array, tanh: jax.Array | None
) -> jax.Array:
    """ds = p (dp - delta), through the cap; delta = do . out - dlse."""
    ds = p * (dp - delta)
    return ds if tanh is None else ds * (1 - tanh * tanh)


def _over_keys(
    plan: _Plan, x: _Refs, h: Any, i: Any, block: Callable[..., _Carry], carry: _Carry
) -> _Carry:
    """Over the blocks of keys; before the full ones only a window hides any."""
    first, full_first, full_end, end = (x["bounds"][h, i, n] for n in range(4))
    some, full = (functools.partial(block, full=full) for full in (False, True))
    if plan.rule.window is None:
        full_first = first
    else:
        carry = lax.fori_loop(first, full_first, some, carry)
    carry = lax.fori_loop(full_first, full_end, full, carry)
    return lax.fori_loop(full_end, end, some, carry)


def _over_queries(
    plan: _Plan, x: _Refs, h: Any, j: Any, block: Callable[..., _Carry], carry: _Carry
) -> _Carry:
    """Over the blocks of queries; after the full ones only a window hides any."""
    first, full_first, full_end, end = (x["bounds"][h, j, n] for n in range(4))
    some, full = (functools.partial(block, full=full) for full in (False, True))
    carry = lax.fori_loop(first, full_first, some, carry)
    carry = lax.fori_loop(full_first, full_end, full, carry)
    if plan.rule.window is not None:
        carry = lax.fori_loop(full_end, end, some, carry)
    return carry


def _last_first() -> jax.Array:
    """The block of rows of this program. The last rows see most keys: they start."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _load(plan: _Plan, ref: Any, block: Any, size: int, head: Any) -> jax.Array:
    at = ref.at[pl.ds(block * size, size), head, :]
    if plan.head_dim == plan.padded_dim:
        return at[...]
    return triton.load(at, mask=_exists(plan, size), other=0)


def _store(
    plan: _Plan, ref: Any, block: Any, size: int, head: Any, a: jax.Array
) -> None:
    at = ref.at[pl.ds(block * size, size), head, :]
    mask = None if plan.head_dim == plan.padded_dim else _exists(plan, size)
    triton.store(at, a.astype(ref.dtype), mask=mask)


def _exists(plan: _Plan, size: int) -> jax.Array:
    columns = lax.broadcasted_iota(jnp.int32, (size, plan.padded_dim), 1)
    return columns < plan.head_dim


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


# XLA's Triton neither contracts a * b + c nor flushes denormals in exp2: written as
# assembly the forward has 25 to 35% fewer instructions. Only a GPU can run assembly.


def _exp2(plan: _Plan, a: jax.Array) -> jax.Array:
    if plan.interpret:
        return jnp.exp2(a)
    return _assembly("ex2.approx.ftz.f32 $0, $1;", a)


def _multiply_add(
    plan: _Plan, a: jax.Array, factor: float, bias: jax.Array
) -> jax.Array:
    if plan.interpret:
        return a * factor + bias
    factor, bias = (jnp.broadcast_to(y, a.shape) for y in (jnp.float32(factor), bias))
    return _assembly("fma.rn.ftz.f32 $0, $1, $2, $3;", a, factor, bias)


def _assembly(instruction: str, *args: jax.Array) -> jax.Array:
    [result] = triton.elementwise_inline_asm(
        instruction,
        args=args,
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result


# Around the kernels.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    plan: _Plan,
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    x: Operands,
    bounds: _Bounds,
) -> tuple[jax.Array, jax.Array]:
    return _forward(plan, q_BLHD, k_BSKD, v_BSKD, x, bounds)


# The jit is for jax 0.10, which drops an unused call to a function (when a remat policy
# saved its results) but not an unused pallas_call.
@functools.partial(jax.jit, static_argnums=0)
def _forward(
    plan: _Plan,
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    x: Operands,
    bounds: _Bounds,
) -> tuple[jax.Array, jax.Array]:
    (B, L, H, D), tile = q_BLHD.shape, plan.tiles.forward
    refs = _inputs(plan, tile, x, bounds.forward, q=q_BLHD, k=k_BSKD, v=v_BSKD)
    rows = refs["q"].shape[1]
    outputs = [
        jax.ShapeDtypeStruct((B, rows, H, D), q_BLHD.dtype),
        jax.ShapeDtypeStruct((B, H, rows), jnp.float32),
    ]
    out, lse_BHL = _call(plan, _forward_kernel, tile, refs, outputs, rows // tile.rows)
    lse_BHL = (lse_BHL - _row_bias(x, tile, rows)) / _LOG2E
    return out[:, :L], lse_BHL[..., :L].swapaxes(1, 2)


def _flash_forward(plan, q_BLHD, k_BSKD, v_BSKD, x, bounds):
    results = _forward(plan, q_BLHD, k_BSKD, v_BSKD, x, bounds)
    out_BLHD, lse_BLH = map(checkpoint_name, results, RESIDUAL_NAMES)
    residuals = q_BLHD, k_BSKD, v_BSKD, x, bounds, out_BLHD, lse_BLH
    return (out_BLHD, lse_BLH), residuals


def _flash_backward(plan, residuals, cotangents):
    q, k, v, x, bounds, out_BLHD, lse_BLH = residuals
    dout_BLHD, dlse_BLH = cotangents
    B, L, H, D = q.shape
    S, K = k.shape[1:3]
    products = dout_BLHD.astype(jnp.float32) * out_BLHD.astype(jnp.float32)
    delta_BLH = jnp.where(lse_BLH == -jnp.inf, 0, products.sum(-1) - dlse_BLH)
    rows = {"lse": lse_BLH, "delta": delta_BLH}
    rows = {name: a.swapaxes(1, 2) for name, a in rows.items()}
    tensors = {"q": q, "k": k, "v": v, "dout": dout_BLHD}

    tile = plan.tiles.dq
    refs = _inputs(plan, tile, x, bounds.dq, **tensors, **rows)
    length = refs["q"].shape[1]
    outputs = [jax.ShapeDtypeStruct((B, length, H, D), q.dtype)]
    [dq] = _call(plan, _dq_kernel, tile, refs, outputs, length // tile.rows)

    tile = plan.tiles.dkv
    refs = _inputs(plan, tile, x, bounds.dkv, **tensors, **rows)
    length = refs["k"].shape[1]
    outputs = [jax.ShapeDtypeStruct((B, length, K, D), k.dtype)] * 2
    dk, dv = _call(plan, _dkv_kernel, tile, refs, outputs, length // tile.columns)
    return dq[:, :L], dk[:, :S], dv[:, :S], None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _inputs(
    plan: _Plan, tile: GpuTile, x: Operands, bounds: jax.Array, **arrays: jax.Array
) -> dict[str, jax.Array]:
    """What a kernel reads, by name, rows and columns padded to whole blocks."""
    refs = {n: a for n, a in arrays.items() if n not in ("lse", "delta")}
    refs["bounds"] = bounds
    # Read by the kernel even where it is known: as a constant it saves no instruction
    # and makes the H100's dkv of packed rows spill 8 bytes.
    offset = jnp.asarray(x.q_offset, jnp.int32) - x.kv_offset
    refs["offset"] = offset.reshape(1)
    if x.slopes_H is not None:
        refs["slope"] = lax.stop_gradient(x.slopes_H).astype(jnp.float32) * _LOG2E
    if x.q_segment_ids_BL is not None:
        # Padding sees nobody: as a query it is of another segment than as a key.
        ids_BL = x.q_segment_ids_BL.astype(jnp.int32)
        refs["q_ids"] = jnp.where(ids_BL == 0, jnp.iinfo(jnp.int32).min, ids_BL)
        refs["kv_ids"] = x.kv_segment_ids_BS.astype(jnp.int32)
    if x.prefix_mask_BS is not None:
        refs["prefix"] = x.prefix_mask_BS.astype(jnp.int32)
    if "lse" in arrays:
        L = arrays["lse"].shape[-1]
        lse = arrays["lse"] * _LOG2E + _row_bias(x, tile, L)
        # A row that sees nothing weighs nothing: with lse +inf all of p is 0.
        lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
        refs["lse"] = pad_to(lse, tile.rows, axis=2, fill=jnp.inf)
        refs["delta"] = pad_to(arrays["delta"], tile.rows, axis=2)
    for names, block in (
        (("q", "dout", "q_ids"), tile.rows),
        (("k", "v", "kv_ids", "prefix"), tile.columns),
    ):
        refs |= {n: pad_to(refs[n], block) for n in names if n in refs}
    return refs


def _row_bias(x: Operands, tile: GpuTile, length: int) -> jax.Array:
    """slope * row within its block: what the kernels' logits leave out."""
    if x.slopes_H is None:
        return jnp.zeros((1, 1, 1), jnp.float32)
    slopes_H = lax.stop_gradient(x.slopes_H).astype(jnp.float32) * _LOG2E
    rows_L = jnp.arange(length, dtype=jnp.int32) % tile.rows
    return (slopes_H[:, None] * rows_L.astype(jnp.float32)[None, :])[None]


def _call(
    plan: _Plan,
    kernel: Callable[..., None],
    tile: GpuTile,
    refs: dict[str, jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    n_blocks: int,
) -> list[jax.Array]:
    """One program per block, head of the first output, and batch row."""

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in ("slope", "offset"):
            return pl.BlockSpec(shape, lambda block, head, row: (0,))
        if name in ("q", "k", "v", "dout"):
            shape = (*shape[:-1], plan.padded_dim)
        rest = (0,) * (len(shape) - 1)
        return pl.BlockSpec((None, *shape[1:]), lambda block, head, row: (row, *rest))

    tensor_name = {4: "q", 3: "lse"}
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(n_blocks, outputs[0].shape[2], outputs[0].shape[0]),
        in_specs=[{name: spec(name, a.shape) for name, a in refs.items()}],
        out_specs=[spec(tensor_name[len(o.shape)], o.shape) for o in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(refs)


# Decoding: a program takes every splits-th block of keys of one KV head and row.


def decode_gpu(
    q_BLHD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    lengths_B: jax.Array,
    slopes_H: jax.Array | None,
    first_BK: jax.Array,
    rule: Rule,
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """kernels.decode.decode_attention, reading the blocks from first_BK on only.

    Args: as there; first_BK in blocks of NORM_BLOCK keys; splits: programs per row and
      KV head, by default enough to fill the GPU.
    Raises: NotImplementedError: float64, or no NVIDIA GPU.
    """
    if q_BLHD.dtype == jnp.float64:
        raise NotImplementedError("the GPU kernel has no float64; use 'auto' or 'xla'")
    _device_kind(interpret)
    (B, L, H, D), (_, K, S, _) = q_BLHD.shape, k_BKSD.shape
    G, n_rows = H // K, max(_MIN_BLOCK, pl.next_power_of_2(H // K * L))
    enough = math.ceil(_DECODE_PROGRAMS / (B * K))
    splits = splits or max(1, min(enough, math.ceil(S / _DECODE_COLUMNS)))
    padded_dim = max(_MIN_BLOCK, pl.next_power_of_2(D))
    tile = GpuTile(n_rows, _DECODE_COLUMNS, 4, 2)
    plan = _Plan(rule, S, D, padded_dim, G, GpuTiles(tile, tile, tile), interpret)

    q_BKRD = q_BLHD.swapaxes(1, 2).reshape(B, K, G * L, D)
    position_BL = lengths_B[:, None] - L + jnp.arange(L, dtype=jnp.int32)[None, :]
    slopes_H = jnp.zeros((H,)) if slopes_H is None else lax.stop_gradient(slopes_H)
    slopes_KR = jnp.repeat(slopes_H.astype(jnp.float32).reshape(K, G), L, axis=1)
    refs = {
        "q": pad_to(q_BKRD, n_rows, axis=2),
        "k": k_BKSD,
        "v": v_BKSD,
        "position": pad_to(jnp.tile(position_BL, (1, G)), n_rows, fill=-1),
        "slope": pad_to(slopes_KR * _LOG2E, n_rows),
        "first": first_BK.astype(jnp.int32),
        "length": lengths_B.astype(jnp.int32)[:, None],
    }
    shapes = {name: a.shape for name, a in refs.items()}
    shapes |= {"out": (B, splits, K, n_rows, D), "lse": (B, splits, K, n_rows)}

    def spec(name: str) -> pl.BlockSpec:
        shape = shapes[name]
        if name == "slope":
            return pl.BlockSpec(shape, lambda split, head, row: (0, 0))
        if name in ("q", "k", "v", "out"):
            shape = (*shape[:-1], padded_dim)
        rest = (0,) * (len(shape) - 1)
        return pl.BlockSpec((None, *shape[1:]), lambda split, head, row: (row, *rest))

    out, lse = pl.pallas_call(
        functools.partial(_decode_kernel, plan=plan, splits=splits),
        grid=(splits, K, B),
        in_specs=[{name: spec(name) for name in refs}],
        out_specs=[spec("out"), spec("lse")],
        out_shape=[
            jax.ShapeDtypeStruct(shapes[n], jnp.float32) for n in ("out", "lse")
        ],
        compiler_params=triton.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=interpret,
        name="decode_kernel",
    )(refs)
    top = jnp.maximum(lse.max(1, keepdims=True), _FLOOR)
    weights = jnp.exp2(lse - top)
    total = weights.sum(1)[..., None]
    merged = (weights[..., None] * out).sum(1) / jnp.where(total == 0, 1, total)
    out_BHLD = merged[:, :, : G * L].reshape(B, H, L, D)
    return out_BHLD.swapaxes(1, 2).astype(q_BLHD.dtype)


def _decode_kernel(x: _Refs, out_ref, lse_ref, *, plan: _Plan, splits: int) -> None:
    rule, (n_rows, n_columns, *_) = plan.rule, plan.tiles.forward
    split, head = pl.program_id(0), pl.program_id(1)
    dims = lax.broadcasted_iota(jnp.int32, (1, plan.padded_dim), 1) < plan.head_dim

    def load(ref, start, size, live):
        at = ref.at[head, pl.ds(start, size), :]
        return triton.load(at, mask=live & dims, other=0)

    q = load(x["q"], 0, n_rows, lax.broadcasted_iota(jnp.int32, (n_rows, 1), 0) >= 0)
    length, position = x["length"][0], x["position"][...][:, None]
    slope = x["slope"][head, :][:, None]

    def block(step, carry):
        acc, top, total = carry
        start = (x["first"][head] + split + step * splits) * n_columns
        column = start + jnp.arange(n_columns, dtype=jnp.int32)
        live = (column < length)[:, None]
        k, v = (load(x[name], start, n_columns, live) for name in ("k", "v"))
        s, factor = _dot(q, k.T), rule.softmax_scale * _LOG2E
        if rule.logit_softcap is not None:
            s = jnp.tanh(s * (rule.softmax_scale / rule.logit_softcap))
            factor = rule.logit_softcap * _LOG2E
        away = position - column[None, :]
        s = _multiply_add(plan, s, factor, -slope * away.astype(jnp.float32))
        seen = away >= 0
        if rule.window is not None:
            seen = seen & (away <= rule.window)
        s = jnp.where(seen, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(1))
        p, shrink = _exp2(plan, s - new_top[:, None]), _exp2(plan, top - new_top)
        acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), v)
        return acc, new_top, total * shrink + p.sum(1)

    blocks = lax.div(length + n_columns - 1, n_columns) - x["first"][head] - split
    steps = lax.div(jnp.maximum(blocks, 0) + splits - 1, splits)
    total = jnp.zeros((n_rows,), jnp.float32)
    acc = jnp.zeros((n_rows, plan.padded_dim), jnp.float32)
    acc, top, total = lax.fori_loop(0, steps, block, (acc, total + _FLOOR, total))
    seen = total > 0
    total = jnp.where(seen, total, 1)
    triton.store(out_ref.at[split, head, :, :], acc / total[:, None], mask=dims)
    lse_ref[split, head, :] = jnp.where(seen, top + jnp.log2(total), -jnp.inf)
