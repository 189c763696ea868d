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
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from mpt_jax.config import ModelConfig
from mpt_jax.kernels.attention import RESIDUAL_NAMES
from mpt_jax.models.attention import Attention, Chunk, Masks
from mpt_jax.models.cache import Cache, LayerCache, capacity
from mpt_jax.models.init import Fans, Initializer
from mpt_jax.models.layers import (
    Embedding,
    Linear,
    Norm,
    activation,
    dropout,
    split_key,
)
from mpt_jax.models.packed import Packed
from mpt_jax.partitioning import Axes, reshard, shard, shards

Params = dict[str, Any]
# What remat calls the residual stream as a block finds it.
BLOCK_INPUT = "block_input"
_WITHIN: Axes = ("batch", "length", "act_embed")  # activations in attention and FFN
CachedOut = tuple[jax.Array, LayerCache]
CachedAttention = Callable[[Attention, jax.Array], CachedOut]


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
        gate_BLF = None if self.gate_proj is None else self.gate_proj(x_BLE)
        return _lean(self.cfg, self._down)(up_BLF, gate_BLF)

    def _down(self, up_BLF: jax.Array, gate_BLF: jax.Array | None) -> jax.Array:
        if gate_BLF is None:
            h_BLF = activation(self.cfg, up_BLF)
        else:
            h_BLF = activation(self.cfg, gate_BLF) * up_BLF
        return self.down_proj(shard(h_BLF, "batch", "length", "act_mlp"))


class Block(nnx.Module):
    """x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.norm_1 = Norm(cfg, ((cfg.d_model, "norm"),))
        self.attn = Attention(cfg)
        self.norm_2 = Norm(cfg, ((cfg.d_model, "norm"),))
        self.ffn = FFN(cfg)

    def __call__(
        self, x_BLE: jax.Array, masks: Masks, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        key_attn, key_1, key_2 = split_key(dropout_key, 3)
        between, pdrop = _between(x_BLE), self.cfg.resid_pdrop
        h_BLE = _lean(self.cfg, self.norm_1)(x_BLE)
        h_BLE = reshard(h_BLE, between, _WITHIN)
        a_BLE = self.attn(h_BLE, masks, dropout_key=key_attn)
        a_BLE = reshard(a_BLE, _WITHIN, between)
        x_BLE = x_BLE + dropout(a_BLE, pdrop, key_1)
        h_BLE = _lean(self.cfg, self.norm_2)(x_BLE)
        f_BLE = self.ffn(reshard(h_BLE, between, _WITHIN))
        f_BLE = reshard(f_BLE, _WITHIN, between)
        x_BLE = x_BLE + dropout(f_BLE, pdrop, key_2)
        return shard(x_BLE, *between)

    def cached(self, x_BLE: jax.Array, attend: CachedAttention) -> CachedOut:
        """The same without dropout, where attention reads and extends a cache."""
        a_BLE, cache = attend(self.attn, self.norm_1(x_BLE))
        x_BLE = x_BLE + a_BLE
        x_BLE = x_BLE + self.ffn(self.norm_2(x_BLE))
        return shard(x_BLE, "batch", "length", "act_embed"), cache


def _lean(cfg: ModelConfig, f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``f``, of whose elementwise steps the backward keeps nothing but their inputs.

    Without it remat "none" keeps three arrays of a norm and two of an activation; with
    any other policy the block as a whole decides.
    """
    if cfg.remat != "none":
        return f
    return jax.checkpoint(f, prevent_cse=not cfg.scan_layers)


def _between(x_BLE: jax.Array) -> Axes:
    """How activations lie between attention and FFN, where no token needs another.

    Their sum over the tensor axis becomes a scatter and a gather of the same bytes, and
    every device norms, adds and keeps only its part of the tokens (Korthikanti et al.
    2022, arXiv 2205.05198). Rows that do not divide stay as they are.
    """
    divides = x_BLE.shape[1] % shards("residual_length") == 0
    return "batch", "residual_length" if divides else "length", "act_embed"


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
      params: of init(); where layers are not scanned, a leaf of blocks may be apart().
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
    x_BLE = _embed(cfg, params, tokens_BL, _positions(cfg, tokens_BL, segment_ids_BL))
    x_BLE = dropout(x_BLE, cfg.emb_pdrop, key_embed)
    x_BLE = shard(x_BLE, *_between(x_BLE))

    def block(x_BLE: jax.Array, layer: tuple[Params, jax.Array | None]) -> jax.Array:
        layer_params, key = layer
        module = _bind(Block(cfg), layer_params)
        x_BLE = checkpoint_name(x_BLE, BLOCK_INPUT)
        return module(x_BLE, masks, dropout_key=key).astype(x_BLE.dtype)

    block = _remat(cfg, block)
    keys = None if key_blocks is None else jax.random.split(key_blocks, cfg.n_layers)
    if cfg.scan_layers:
        layers = (params["blocks"], keys)
        x_BLE, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BLE, layers)
    else:
        for n, layer in enumerate(_layers(params["blocks"])):
            x_BLE = block(x_BLE, (layer, None if keys is None else keys[n]))
    x_BLE = _bind(Norm(cfg, ((cfg.d_model, "norm"),)), params["norm_f"])(x_BLE)
    return reshard(x_BLE, _between(x_BLE), _WITHIN)


def apart(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """A stacked parameter's layers. One split, whose gradient is one concatenation:
    that of n indexings is n sums over all layers."""
    return tuple(a[0] for a in jax.lax.split(leaf, (1,) * len(leaf)))


def _layers(blocks: Params) -> Iterator[Params]:
    """Each layer's tree, of leaves that are stacked or apart."""
    # A packed matrix may be a NamedTuple, which is no leaf.
    leaves, treedef = jax.tree.flatten(blocks, is_leaf=lambda x: type(x) is tuple)
    leaves = [a if type(a) is tuple else apart(a) for a in leaves]
    return map(treedef.unflatten, zip(*leaves, strict=True))


def _positions(
    cfg: ModelConfig, tokens_BL: jax.Array, segment_ids_BL: jax.Array | None
) -> jax.Array | None:
    """Where the learned positions, if any, see each token; None: where it stands."""
    length = tokens_BL.shape[1]
    if cfg.has_wpe and length > cfg.max_seq_len:
        raise ValueError(
            f"tokens_BL: length {length} is over max_seq_len {cfg.max_seq_len}, "
            "where the learned positions end"
        )
    if segment_ids_BL is None:
        return None
    padding_BL = jnp.cumsum(segment_ids_BL == 0, axis=1)  # left padding does not count
    return jnp.maximum(jnp.arange(length)[None] - padding_BL, 0)


def _embed(
    cfg: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    position_BL: jax.Array | None,
) -> jax.Array:
    dtype = jnp.dtype(cfg.compute_dtype)
    table_VE = params["wte"]["weight"]
    if isinstance(table_VE, Packed):
        x_BLE = table_VE.rows(tokens_BL).astype(dtype)
    else:
        # Cast, then gather the embed axis: half the bytes of gathering float32.
        table_VE = shard(table_VE.astype(dtype), "vocab", "act_embed")
        x_BLE = jnp.take(table_VE, tokens_BL, axis=0)
    if cfg.pad_token_id is not None:
        is_pad = (tokens_BL == cfg.pad_token_id)[..., None]
        x_BLE = jnp.where(is_pad, jax.lax.stop_gradient(x_BLE), x_BLE)
    if cfg.has_wpe:
        wpe_SE = params["wpe"]["weight"].astype(dtype)
        if position_BL is None:
            x_BLE = x_BLE + wpe_SE[None, : tokens_BL.shape[1]]
        else:  # NaN beyond the last, not the last once more
            x_BLE = x_BLE + jnp.take(wpe_SE, position_BL, axis=0)
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
    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT, *RESIDUAL_NAMES],
        offload_src="device",
        offload_dst="pinned_host",
    )
    policy = {
        "offload": offload,
        "full": policies.nothing_saveable,
        "attention": attention,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, attention
        ),
    }[cfg.remat]
    # Inside scan there is no CSE across iterations to prevent.
    return jax.checkpoint(block, policy=policy, prevent_cse=not cfg.scan_layers)


# --------------------------------------------------------------------- with a cache


def prefill(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_L: jax.Array,
    *,
    slot: ArrayLike,
    start: ArrayLike,
    reach: int | None = None,
    n_prefix: ArrayLike | None = None,
) -> tuple[jax.Array, Cache]:
    """Reads a chunk of one sequence into its slot of the cache.

    Padding at the right of the real tokens does no harm: what comes next overwrites it,
    and nobody before sees it.

    Args:
      params: of models.weights.unstack().
      slot, start: int32, may be traced. start: how many of the slot's tokens stay; the
        chunk must fit behind them (XLA would move it to the left without a word).
      reach: the columns to read, at least start + L; default all.
      n_prefix: with prefix_lm, the length of the prompt, which must be this one chunk.
    Returns: the chunk's final normed states x_LE, and the cache.
    """
    slot, start = jnp.asarray(slot, jnp.int32), jnp.asarray(start, jnp.int32)
    n_prefix = None if n_prefix is None else jnp.asarray(n_prefix, jnp.int32)
    chunk = Chunk(slot, start, reach or capacity(cache), n_prefix)
    position_1L = start + jnp.arange(tokens_L.shape[0])[None]
    x_1LE, cache = _through_cache(
        cfg, params, cache, tokens_L[None], position_1L,
        lambda attn, x, layer: attn.prefill(x, layer, chunk),
    )  # fmt: skip
    return x_1LE[0], cache


def decode(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BL: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Appends L tokens, mostly one, to each of the first B slots of the cache.

    Args:
      params: of models.weights.unstack().
      lengths_B: int32, how many tokens each slot holds before; -1 leaves a slot alone.
    Returns: final normed states x_BLE (of no meaning for a slot left alone), the cache.
    """
    offset_1L = jnp.arange(tokens_BL.shape[1])[None]
    position_BL = jnp.maximum(lengths_B, 0)[:, None] + offset_1L
    return _through_cache(
        cfg, params, cache, tokens_BL, position_BL,
        lambda attn, x, layer: attn.decode(x, layer, lengths_B),
    )  # fmt: skip


def _through_cache(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BL: jax.Array,
    position_BL: jax.Array,
    attend: Callable[[Attention, jax.Array, LayerCache], CachedOut],
) -> tuple[jax.Array, Cache]:
    x_BLE = _embed(cfg, params, tokens_BL, position_BL)
    x_BLE = shard(x_BLE, "batch", "length", "act_embed")
    layers = []
    for layer_params, layer in zip(params["blocks"], cache, strict=True):
        dtype, block = x_BLE.dtype, _bind(Block(cfg), layer_params)
        x_BLE, layer = block.cached(x_BLE, functools.partial(attend, layer=layer))
        x_BLE = x_BLE.astype(dtype)
        layers.append(layer)
    norm_f = _bind(Norm(cfg, ((cfg.d_model, "norm"),)), params["norm_f"])
    return norm_f(x_BLE), tuple(layers)


# ----------------------------------------------------------------------------- the head


def unembedding(cfg: ModelConfig, params: Params) -> jax.Array:
    """The (vocab, embed) matrix of the head: wte where tied, else lm_head."""
    return params["wte" if cfg.tie_word_embeddings else "lm_head"]["weight"]


def logits(cfg: ModelConfig, params: Params, x_BLE: jax.Array) -> jax.Array:
    """float32 logits_BLV of normed states: head, logit_scale, then the soft-cap."""
    head_VE = unembedding(cfg, params)
    if isinstance(head_VE, Packed):
        out_BLV = head_VE.matmul(x_BLE)
    else:
        head_VE = shard(head_VE.astype(x_BLE.dtype), "vocab", "act_embed")
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
