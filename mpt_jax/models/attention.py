"""MPT's attention layer around the attention op.

Order: project, clip, qk norm; scale, soft-cap, ALiBi, masks, softmax; project.
Source: llm-foundry@8c8dd48:llmfoundry/models/layers/attention.py:GroupedQueryAttention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpt_jax.config import ModelConfig
from mpt_jax.kernels.attention import Rule, attention
from mpt_jax.kernels.decode import decode_attention
from mpt_jax.kernels.sharded import Layout, sharded_attention
from mpt_jax.kernels.sharded_decode import sharded_decode
from mpt_jax.models.cache import LayerCache, read_slot, write_chunk, write_tokens
from mpt_jax.models.heads import slopes
from mpt_jax.models.init import Fans
from mpt_jax.models.layers import Linear, Norm
from mpt_jax.models.packed import Joint
from mpt_jax.partitioning import current_mesh, rule, shard

# MosaicML builds q_ln and k_ln without passing norm_type on: always its default.
QK_NORM = {"kind": "low_precision_layernorm", "eps": 1e-5}


@dataclasses.dataclass(frozen=True)
class Masks:
    """What restricts attention beside causality; None restricts nothing.

    segment_ids_BL: int32 document of each token, 0 for padding, which nobody sees;
    prefix_mask_BL: bool, tokens that everyone in the segment may see.
    """

    segment_ids_BL: jax.Array | None = None
    prefix_mask_BL: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Where the tokens of a prefill stand: columns ``start`` on of row ``slot`` of the
    cache, of which the first ``reach`` (static) are read. n_prefix: with prefix_lm, how
    many columns everyone sees."""

    slot: jax.Array
    start: jax.Array
    reach: int
    n_prefix: jax.Array | None = None


class Attention(nnx.Module):
    """Multi-head, multi-query or grouped-query attention with ALiBi."""

    def __init__(self, cfg: ModelConfig):
        self.cfg, a = cfg, cfg.attn_config
        embed = ((cfg.d_model, "embed"),)
        head_dim = (cfg.d_head, "head_dim")
        heads = ((cfg.n_heads, "heads"), head_dim)
        # One KV head cannot be split: it is replicated over the tensor axis.
        kv_axis = "kv_heads" if cfg.n_kv_heads > 1 else None
        kv_heads = ((cfg.n_kv_heads, kv_axis), head_dim)
        # MosaicML initialises each head's slice of the fused matrix on its own.
        fans = Fans(fan_in=cfg.d_model, fan_out=cfg.d_head)
        self.Wq = Linear(cfg, embed, heads, fans=fans, use_bias=cfg.qkv_bias)
        self.Wk = Linear(cfg, embed, kv_heads, fans=fans, use_bias=cfg.qkv_bias)
        self.Wv = Linear(cfg, embed, kv_heads, fans=fans, use_bias=cfg.qkv_bias)
        normed = a.qk_ln or a.qk_gn
        per_head = (head_dim,)
        self.q_ln = (
            Norm(cfg, per_head if a.qk_gn else heads, **QK_NORM) if normed else None
        )
        self.k_ln = (
            Norm(cfg, per_head if a.qk_gn else kv_heads, **QK_NORM) if normed else None
        )
        fans = Fans(cfg.n_heads * cfg.d_head, cfg.d_model, residual=True)
        self.out_proj = Linear(cfg, heads, embed, fans=fans, use_bias=not cfg.no_bias)

    def __call__(
        self, x_BLE: jax.Array, masks: Masks, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        cfg, a = self.cfg, self.cfg.attn_config
        q, k, v = self._project(x_BLE)
        kv_axis = "act_heads" if cfg.n_kv_heads > 1 else None
        q_BLHD = shard(q, "batch", "length", "act_heads", None)
        k_BSKD = shard(k, "batch", "kv_length", kv_axis, None)
        v_BSKD = shard(v, "batch", "kv_length", kv_axis, None)
        segments = masks.segment_ids_BL
        if segments is not None and not a.attn_uses_sequence_id:
            segments = (segments != 0).astype(jnp.int32)  # documents see each other
        dropout: dict[str, Any] = {}
        if a.attn_pdrop and dropout_key is not None:
            dropout = {"dropout_rate": a.attn_pdrop, "dropout_key": dropout_key}
        out_BLHD = _op(cfg, whole=bool(dropout))(
            q_BLHD,
            k_BSKD,
            v_BSKD,
            self._slopes(),
            **self._rule(),
            q_segment_ids_BL=segments,
            kv_segment_ids_BS=segments,
            prefix_mask_BS=masks.prefix_mask_BL if a.prefix_lm else None,
            **dropout,
            implementation=cfg.attention,
        )
        out_BLHD = shard(out_BLHD, "batch", "length", "act_heads", None)
        return self.out_proj(out_BLHD)

    def prefill(
        self, x_1LE: jax.Array, cache: LayerCache, chunk: Chunk
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of one slot's next chunk to all that the slot then holds."""
        q_1LHD, k_1LKD, v_1LKD = self._project(x_1LE)
        cache = write_chunk(
            self.cfg, cache, k_1LKD[0], v_1LKD[0], slot=chunk.slot, start=chunk.start
        )
        k_1SKD, v_1SKD = read_slot(cache, chunk.slot, chunk.reach)
        prefix_mask = None
        if chunk.n_prefix is not None:
            prefix_mask = (jnp.arange(chunk.reach) < chunk.n_prefix)[None]
        out_1LHD = _op(self.cfg, whole=False)(
            shard(q_1LHD, "batch", "length", "act_heads", None),
            k_1SKD,
            v_1SKD,
            self._slopes(),
            **self._rule(),
            prefix_mask_BS=prefix_mask,
            q_offset=chunk.start,
            implementation=self.cfg.attention,
        )
        return self.out_proj(out_1LHD), cache

    def decode(
        self, x_BLE: jax.Array, cache: LayerCache, lengths_B: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of each slot's next tokens; lengths_B as in cache.write_tokens."""
        q_BLHD, k_BLKD, v_BLKD = self._project(x_BLE)
        cache = write_tokens(self.cfg, cache, k_BLKD, v_BLKD, lengths_B)
        implementation = self.cfg.attention
        attend = decode_attention
        if (mesh := current_mesh()) is not None:
            layout = _layout(self.cfg)._replace(batch=(), length=(), kv_length=())
            attend = functools.partial(sharded_decode, mesh=mesh, layout=layout)
        out_BLHD = attend(
            q_BLHD,
            cache.k_BKSD,
            cache.v_BKSD,
            jnp.where(lengths_B < 0, 0, lengths_B + x_BLE.shape[1]),
            self._slopes(),
            rule=Rule(**self._rule()),
            key_norms_BKJ=cache.norms_BKJ,
            # The other names have no decoding kernel of their own.
            implementation=implementation if implementation == "gpu" else "auto",
        )
        return self.out_proj(out_BLHD), cache

    def _project(self, x_BLE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q_BLHD, k_BLKD, v_BLKD, as attention takes them."""
        a = self.cfg.attn_config
        maps, weight = (self.Wq, self.Wk, self.Wv), self.Wq.weight.get_value()
        if isinstance(weight, Joint):
            products = weight.matmul(x_BLE)
            q, k, v = (m.add_bias(y) for m, y in zip(maps, products, strict=True))
        else:
            q, k, v = (m(x_BLE) for m in maps)
        if a.clip_qkv:
            q, k, v = (jnp.clip(t, -a.clip_qkv, a.clip_qkv) for t in (q, k, v))
        if self.q_ln is not None:
            q, k = self.q_ln(q), self.k_ln(k)
        return q, k, v

    def _slopes(self) -> np.ndarray | None:
        return slopes(self.cfg)

    def _rule(self) -> dict[str, Any]:
        a = self.cfg.attn_config
        return {
            "softmax_scale": self.cfg.softmax_scale,
            "window": a.sliding_window_size if a.sliding_window_size >= 0 else None,
            "logit_softcap": a.attn_logit_softcapping,
            "skip": self.cfg.attention_skip,
        }


def _op(cfg: ModelConfig, *, whole: bool) -> Callable[..., jax.Array]:
    """The attention op, on each device's own rows and heads where there is a mesh.

    whole: leave the cutting to XLA, as dropout wants, whose mask would otherwise depend
      on the mesh; only the XLA backend can be cut so.
    """
    mesh = current_mesh()
    if mesh is None or whole:
        return attention
    return functools.partial(sharded_attention, mesh=mesh, layout=_layout(cfg))


def _layout(cfg: ModelConfig) -> Layout:
    """Which mesh axes cut rows, queries and heads, and keys and their heads."""
    heads = rule("act_heads")
    kv_heads = heads if cfg.n_kv_heads > 1 else ()
    return Layout(rule("batch"), rule("length"), heads, kv_heads, rule("length"))
