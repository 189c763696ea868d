"""MPT: a decoder-only transformer with pre-norm blocks and ALiBi.

    x = wte[tokens] (+ wpe)
    for each block:  x = x + attn(norm_1(x));  x = x + ffn(norm_2(x))
    logits = norm_f(x) @ wte^T

The world outside ``models/`` sees plain nested dicts: ``init(cfg, rng) -> params`` and
``apply(cfg, params, tokens) -> logits``. Blocks are stored stacked on a leading layer
axis whether they are scanned or not.

Source: llm-foundry@8c8dd48:llmfoundry/models/mpt/modeling_mpt.py.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpt_jax.config import ModelConfig
from mpt_jax.kernels.attention import RESIDUAL_NAMES
from mpt_jax.models.attention import Attention, Masks
from mpt_jax.models.init import Fans, Initializer
from mpt_jax.models.layers import (
    Embedding,
    Linear,
    Norm,
    activation,
    dropout,
    split_key,
)
from mpt_jax.partitioning import Axes, shard

Params = dict[str, Any]


class FFN(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for mptglu."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        embed, mlp = ((cfg.d_model, "embed"),), ((cfg.d_mlp, "mlp"),)
        up, bias = Fans(cfg.d_model, cfg.d_mlp), not cfg.no_bias
        glu = cfg.ffn_config.ffn_type == "mptglu"
        self.up_proj = Linear(cfg, embed, mlp, fans=up, use_bias=bias)
        self.gate_proj = (
            Linear(cfg, embed, mlp, fans=up, use_bias=bias) if glu else None
        )
        down = Fans(cfg.d_mlp, cfg.d_model, residual=True)
        self.down_proj = Linear(cfg, mlp, embed, fans=down, use_bias=bias)

    def __call__(self, x_BLE: jax.Array) -> jax.Array:
        up_BLF = self.up_proj(x_BLE)
        if self.gate_proj is None:
            h_BLF = activation(self.cfg, up_BLF)
        else:
            h_BLF = activation(self.cfg, self.gate_proj(x_BLE)) * up_BLF
        return self.down_proj(shard(h_BLF, "batch", "length", "act_mlp"))


class Block(nnx.Module):
    """x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    def __init__(self, cfg: ModelConfig):
        self.resid_pdrop = cfg.resid_pdrop
        self.norm_1 = Norm(cfg, ((cfg.d_model, "norm"),))
        self.attn = Attention(cfg)
        self.norm_2 = Norm(cfg, ((cfg.d_model, "norm"),))
        self.ffn = FFN(cfg)

    def __call__(
        self, x_BLE: jax.Array, masks: Masks, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        key_attn, key_1, key_2 = split_key(dropout_key, 3)
        a_BLE = self.attn(self.norm_1(x_BLE), masks, dropout_key=key_attn)
        x_BLE = x_BLE + dropout(a_BLE, self.resid_pdrop, key_1)
        f_BLE = self.ffn(self.norm_2(x_BLE))
        x_BLE = x_BLE + dropout(f_BLE, self.resid_pdrop, key_2)
        return shard(x_BLE, "batch", "length", "act_embed")


class MPT(nnx.Module):
    """The whole model as declared; ``blocks`` is one block, stored n_layers times."""

    def __init__(self, cfg: ModelConfig):
        self.wte = Embedding(cfg, (cfg.vocab_size, "vocab"))
        self.wpe = Embedding(cfg, (cfg.max_seq_len, None)) if cfg.has_wpe else None
        self.blocks = Block(cfg)
        self.norm_f = Norm(cfg, ((cfg.d_model, "norm"),))
        self.lm_head = None if cfg.tie_word_embeddings else Head(cfg)


class Head(nnx.Module):
    """The untied head, stored (vocab, embed) like wte and initialised as a linear."""

    def __init__(self, cfg: ModelConfig):
        fans = Fans(cfg.d_model, cfg.vocab_size)
        linear = Linear(
            cfg, ((cfg.vocab_size, "vocab"),), ((cfg.d_model, "embed"),), fans=fans,
            use_bias=False,
        )  # fmt: skip
        self.weight = linear.weight


# ----------------------------------------------------------------- the functional face


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, dtype, logical axes and initialiser (of one layer)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    initializer: Initializer
    stacked: bool

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


@functools.cache
def _flat_specs(cfg: ModelConfig) -> dict[tuple[str, ...], ParamSpec]:
    specs = {}
    for path, variable in nnx.to_flat_state(nnx.state(MPT(cfg), nnx.Param)):
        struct, meta = variable.get_value(), variable.get_metadata()
        stacked = path[0] == "blocks"
        specs[path] = ParamSpec(
            shape=(cfg.n_layers, *struct.shape) if stacked else struct.shape,
            dtype=struct.dtype,
            axes=("layers", *meta["axes"]) if stacked else meta["axes"],
            initializer=meta["initializer"],
            stacked=stacked,
        )
    return specs


def _nested(items: Iterator[tuple[tuple[str, ...], Any]]) -> Params:
    tree: Params = {}
    for path, value in items:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def param_specs(cfg: ModelConfig) -> Params:
    """Nested dict of ParamSpec: the frozen contract of names, shapes and axes."""
    return _nested(iter(_flat_specs(cfg).items()))


def param_axes(cfg: ModelConfig) -> Params:
    """Nested dict of logical axes, one tuple per parameter."""
    return _nested((path, s.axes) for path, s in _flat_specs(cfg).items())


def abstract_params(cfg: ModelConfig) -> Params:
    """Nested dict of ShapeDtypeStruct."""
    return _nested((path, s.struct) for path, s in _flat_specs(cfg).items())


def count_params(cfg: ModelConfig) -> int:
    """Parameters, a tied embedding counted once."""
    return sum(s.struct.size for s in _flat_specs(cfg).values())


def init(cfg: ModelConfig, rng: jax.Array) -> Params:
    """Fresh parameters. A parameter's key depends on its path and layer only.

    Args: rng: a PRNG key. Jit it with out_shardings to create sharded arrays in place.
    """

    def create(path: tuple[str, ...], s: ParamSpec) -> jax.Array:
        key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()))
        if not s.stacked:
            return s.initializer(key, s.shape, s.dtype)
        keys = jax.random.split(key, s.shape[0])
        return jax.vmap(lambda k: s.initializer(k, s.shape[1:], s.dtype))(keys)

    params = _nested((path, create(path, s)) for path, s in _flat_specs(cfg).items())
    if cfg.pad_token_id is not None:  # torch.nn.Embedding(padding_idx)
        params["wte"]["weight"] = params["wte"]["weight"].at[cfg.pad_token_id].set(0)
    return params


def _bind(module: nnx.Module, params: Params) -> Any:
    nnx.update(module, params)
    return module


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    *,
    segment_ids_BL: jax.Array | None = None,
    prefix_mask_BL: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The final normed states, before the head.

    Args:
      tokens_BL: int32 ids; an id outside the vocabulary gives NaN, never a wrong row.
      segment_ids_BL: int32 document of each token, 0 padding (left or right). None:
        no padding. Documents are kept apart only with attn_uses_sequence_id.
      prefix_mask_BL: bool, only with attn_config.prefix_lm.
      dropout_key: a PRNG key switches the configured dropouts on.
    Returns: x_BLE in the compute dtype.
    Raises: ValueError: more tokens than learned positions.
    """
    key_embed, key_blocks = split_key(dropout_key, 2)
    masks = Masks(segment_ids_BL, prefix_mask_BL)
    x_BLE = _embed(cfg, params, tokens_BL, segment_ids_BL)
    x_BLE = dropout(x_BLE, cfg.emb_pdrop, key_embed)
    x_BLE = shard(x_BLE, "batch", "length", "act_embed")

    def block(x_BLE: jax.Array, layer: tuple[Params, jax.Array | None]) -> jax.Array:
        layer_params, key = layer
        module = _bind(Block(cfg), layer_params)
        return module(x_BLE, masks, dropout_key=key).astype(x_BLE.dtype)

    block = _remat(cfg, block)
    keys = None if key_blocks is None else jax.random.split(key_blocks, cfg.n_layers)
    layers = (params["blocks"], keys)
    if cfg.scan_layers:
        x_BLE, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BLE, layers)
    else:
        for layer in _unstack(layers, cfg.n_layers):
            x_BLE = block(x_BLE, layer)
    return _bind(Norm(cfg, ((cfg.d_model, "norm"),)), params["norm_f"])(x_BLE)


def _unstack(layers: Any, n: int) -> Iterator[Any]:
    """Each layer's tree. One split per leaf, whose gradient is one concatenation: that
    of n indexings is n sums over all layers."""
    leaves, treedef = jax.tree.flatten(layers)
    parts = [jax.lax.split(a, (1,) * n) for a in leaves]
    for one in zip(*parts, strict=True):
        yield treedef.unflatten([a[0] for a in one])


def _embed(
    cfg: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    segment_ids_BL: jax.Array | None,
) -> jax.Array:
    dtype = jnp.dtype(cfg.compute_dtype)
    # Cast, then gather the embed axis: half the bytes of gathering float32.
    table_VE = shard(params["wte"]["weight"].astype(dtype), "vocab", "act_embed")
    x_BLE = jnp.take(table_VE, tokens_BL, axis=0)
    if cfg.pad_token_id is not None:
        is_pad = (tokens_BL == cfg.pad_token_id)[..., None]
        x_BLE = jnp.where(is_pad, jax.lax.stop_gradient(x_BLE), x_BLE)
    if cfg.has_wpe:
        length = tokens_BL.shape[1]
        if length > cfg.max_seq_len:
            raise ValueError(
                f"tokens_BL: length {length} is over max_seq_len {cfg.max_seq_len}, "
                "where the learned positions end"
            )
        wpe_SE = params["wpe"]["weight"].astype(dtype)
        if segment_ids_BL is None:
            x_BLE = x_BLE + wpe_SE[None, :length]
        else:  # left padding does not count
            padding_BL = jnp.cumsum(segment_ids_BL == 0, axis=1)
            position_BL = jnp.maximum(jnp.arange(length)[None] - padding_BL, 0)
            x_BLE = x_BLE + wpe_SE[position_BL]
    if cfg.embedding_fraction < 1:  # GLM-130B (arXiv 2210.02414), section 2.2
        f = cfg.embedding_fraction
        x_BLE = x_BLE * f + jax.lax.stop_gradient(x_BLE) * (1 - f)
    return x_BLE


def _remat(
    cfg: ModelConfig, block: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    policies = jax.checkpoint_policies
    if cfg.remat == "none":
        return block
    attention = policies.save_only_these_names(*RESIDUAL_NAMES)
    policy = {
        "full": policies.nothing_saveable,
        "attention": attention,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, attention
        ),
    }[cfg.remat]
    # Inside scan there is no CSE across iterations to prevent.
    return jax.checkpoint(block, policy=policy, prevent_cse=not cfg.scan_layers)


def unembedding(cfg: ModelConfig, params: Params) -> jax.Array:
    """The (vocab, embed) matrix of the head: wte where tied, else lm_head."""
    return params["wte" if cfg.tie_word_embeddings else "lm_head"]["weight"]


def logits(cfg: ModelConfig, params: Params, x_BLE: jax.Array) -> jax.Array:
    """float32 logits_BLV of normed states: head, logit_scale, then the soft-cap."""
    head_VE = shard(unembedding(cfg, params).astype(x_BLE.dtype), "vocab", "act_embed")
    out_BLV = jnp.einsum(
        "ble,ve->blv", x_BLE, head_VE, preferred_element_type=jnp.float32
    )
    out_BLV = out_BLV * cfg.logit_multiplier
    if cfg.final_logit_softcapping is not None:
        cap = cfg.final_logit_softcapping
        out_BLV = cap * jnp.tanh(out_BLV / cap)
    return shard(out_BLV, "batch", "length", "act_vocab")


def apply(
    cfg: ModelConfig, params: Params, tokens_BL: jax.Array, **kwargs: Any
) -> jax.Array:
    """tokens_BL -> float32 logits_BLV; keyword arguments as hidden_states()."""
    return logits(cfg, params, hidden_states(cfg, params, tokens_BL, **kwargs))
