"""Parameters as decoding wants them: each layer's own arrays, packed if asked.

mpt.prefill, mpt.decode and mpt.logits take them in place of those of mpt.init.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.models.mpt import Params
from mpt_jax.models.packed import Int8, Joint, Packed, ThreePass

# Every linear map of a block, and how many of its dims are inputs.
_LINEARS = {
    "attn": {"Wq": 1, "Wk": 1, "Wv": 1, "out_proj": 2},
    "ffn": {"up_proj": 1, "gate_proj": 1, "down_proj": 1},
}
_ALIGNED = 64  # bytes: as XLA wants an array, to use it where it lies
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def unstack(params: Params, *, consume: bool = False) -> Params:
    """``params`` with blocks as a tuple of one tree per layer.

    A decoding step reads every weight once; one that must be cut out of a stacked array
    is read, written and read again.

    Args: consume: delete each stacked array as soon as its layers are copied, so that
      at most one of them is in memory twice.
    """
    leaves, treedef = jax.tree.flatten(params["blocks"])
    split = []
    for leaf in leaves:
        split.append(jax.block_until_ready(list(leaf)))
        if consume and isinstance(leaf, jax.Array):
            leaf.delete()
    layers = tuple(treedef.unflatten(one) for one in zip(*split, strict=True))
    return {**params, "blocks": layers}


def quantize(params: Params) -> Params:
    """Unstacked ``params`` with every matrix as int8: half the bytes of bfloat16.

    Norms, biases and learned positions stay. Numerics: see packed.Int8.
    """
    return _packed(params, Int8.of, Int8.of)


def three_pass(params: Params) -> Params:
    """Unstacked ``params`` whose matrices are bfloat16 with every one as a
    packed.ThreePass, for float32 arithmetic where has_bfloat16_tiles()."""

    def joined(layer: Params) -> Params:
        """q, k and v in the place of q: one product is faster than three."""
        three = {name: dict(layer["attn"][name]) for name in ("Wq", "Wk", "Wv")}
        ws = [_outputs_first(p.pop("weight"), n_in=1) for p in three.values()]
        three["Wq"]["weight"] = Joint.of(*ws, n_out=2)
        return {**layer, "attn": {**layer["attn"], **three}}

    params = {**params, "blocks": tuple(map(joined, params["blocks"]))}
    return _packed(params, ThreePass.of, lambda w, n_out: ThreePass((w,), n_out))


def settle(params: Params) -> Params:
    """``params`` on a CPU moved to huge pages, for use to the end of the process.

    Reading all weights for every token misses the translation of many an address:
    decoding of 125M takes 5 % less where Linux gives huge pages, and elsewhere the
    same. Arrays elsewhere, or on several devices, stay where they are; all others are
    deleted one by one as they are copied.
    """
    leaves, treedef = jax.tree.flatten(params)
    ours = [a.nbytes if _is_on_one_cpu(a) else 0 for a in leaves]
    starts = np.cumsum([0, *(-(-n // _ALIGNED) * _ALIGNED for n in ours)])
    if not starts[-1] or not hasattr(mmap, "MADV_HUGEPAGE"):
        return params
    pages = mmap.mmap(-1, int(starts[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    for i, (leaf, n, start) in enumerate(zip(leaves, ours, starts[:-1], strict=True)):
        if n:
            room = np.frombuffer(pages, leaf.dtype, leaf.size, int(start))
            room = room.reshape(leaf.shape)
            room[...] = leaf
            leaves[i] = jax.device_put(room, leaf.device, may_alias=True)
            leaf.delete()
    return treedef.unflatten(leaves)


def _is_on_one_cpu(a: jax.Array) -> bool:
    devices = a.devices()
    return len(devices) == 1 and all(d.platform == "cpu" for d in devices)


@functools.cache
def has_bfloat16_tiles() -> bool:
    """Whether this machine runs on a CPU that multiplies bfloat16 tiles (AMX)."""
    if jax.default_backend() != "cpu" or not _CPUINFO.exists():
        return False
    return re.search(r"\bamx_bf16\b", _CPUINFO.read_text()) is not None


def _outputs_first(w: jax.Array, *, n_in: int) -> jax.Array:
    return jnp.moveaxis(w, range(n_in), range(w.ndim - n_in, w.ndim))


Pack = Callable[[jax.Array, int], Packed]


def _packed(params: Params, pack: Pack, pack_table: Pack) -> Params:
    """pack(w, n_out) for each output-major matrix w; what is packed stays."""

    def linear(p: Params, n_in: int) -> Params:
        w = p.get("weight")
        if not isinstance(w, jax.Array):
            return p
        return {**p, "weight": pack(_outputs_first(w, n_in=n_in), w.ndim - n_in)}

    out = dict(params)
    for table in ("wte", "lm_head"):
        if table in params:
            out[table] = {"weight": pack_table(params[table]["weight"], 1)}
    out["blocks"] = tuple(
        {
            **layer,
            **{
                module: {
                    name: linear(p, linears[name]) if name in linears else p
                    for name, p in layer[module].items()
                }
                for module, linears in _LINEARS.items()
            },
        }
        for layer in params["blocks"]
    )
    return out
