"""MPT's forward pass and loss in float64 NumPy: what the model must compute.

Written from MosaicML's published definition and the papers, one sequence, one layer
and one head at a time, and sharing nothing with mpt_jax but ModelConfig's fields: its
derived properties (softmax_scale, n_kv_heads ...) are derived again. Dropout is off.

Dims: L length, E embed, H heads, K kv_heads, D head_dim, F mlp, V vocab, N layers.

Source: llm-foundry@8c8dd48:llmfoundry/models/mpt/modeling_mpt.py (order of operations,
loss), models/layers/{attention,ffn,norm,blocks}.py; prefix_lm: the same repository at
v0.6.0. Run beside that PyTorch code in float64, on every case of test_reference.py, the
logits were equal to 4e-15 of their rms (2e-7 at 12 heads, whose slopes MosaicML rounds
to float32; prefix_lm with v0.6.0's mask put into HEAD). Papers (arXiv): ALiBi
2108.12409, multi-query 1911.02150, grouped-query 2305.13245, LayerNorm 1607.06450,
RMSNorm 1910.07467, GLU 2002.05202, GELU 1606.08415, z-loss 2204.02311 (section 5),
embedding_fraction 2210.02414 (section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy.special import erf

from mpt_jax.config import ModelConfig

Array = np.ndarray
Params = dict[str, Any]
QK_NORM_EPS = 1e-5  # MosaicML passes neither norm_type nor norm_eps to q_ln and k_ln

GELU_TANH = math.sqrt(2 / math.pi)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(GELU_TANH * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "tanh": np.tanh,
}


# ------------------------------------------------------------------------ the forward


def alibi_slopes(n_heads: int, bias_max: float) -> list[float]:
    """2^(-bias_max * h / n) for h = 1..n; n is n_heads rounded up to a power of two.

    Where n_heads is not that power, every second slope comes first, then the others.
    """
    n = 1
    while n < n_heads:
        n *= 2
    slopes = [2.0 ** (-bias_max * h / n) for h in range(1, n + 1)]
    return slopes if n == n_heads else (slopes[1::2] + slopes[0::2])[:n_heads]


def dense(x: Array, p: Params) -> Array:
    """Contracts the last dim of x with the first of the weight."""
    return np.tensordot(x, p["weight"], axes=1) + p.get("bias", 0)


def norm(x: Array, p: Params, *, kind: str, eps: float, dims: int = 1) -> Array:
    """Normalises over the last ``dims`` dims. low_precision is a matter of dtype."""
    axes = tuple(range(-dims, 0))
    if kind.endswith("layernorm"):
        x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)
    return x * p["weight"] + p.get("bias", 0)


def softmax(logits: Array, allowed: Array) -> Array:
    """Over the last dim; a row with nothing allowed is all zero."""
    top = np.max(logits, axis=-1, keepdims=True, initial=-np.inf, where=allowed)
    weights = np.where(allowed, np.exp(np.where(allowed, logits - top, 0)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(float).tiny)


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def visible(
    cfg: ModelConfig, length: int, segments_L: Array | None, prefix_L: Array | None
) -> Array:
    """allowed_LL[i, j]: may query i see key j. Padding (segment 0) is never seen."""
    a = cfg.attn_config
    allowed = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(length):
            see = j <= i or (a.prefix_lm and prefix_L is not None and bool(prefix_L[j]))
            if a.sliding_window_size != -1:
                see = see and abs(i - j) <= a.sliding_window_size
            if segments_L is not None:
                see = see and segments_L[j] != 0
                if a.attn_uses_sequence_id:
                    see = see and segments_L[i] == segments_L[j]
            allowed[i, j] = see
    return allowed


def attention(cfg: ModelConfig, p: Params, x_LE: Array, allowed_LL: Array) -> Array:
    """Wq, Wk, Wv -> clip -> qk norm -> heads, each: scale, softcap, ALiBi, softmax."""
    a = cfg.attn_config
    q_LHD, k_LKD, v_LKD = (dense(x_LE, p[name]) for name in ("Wq", "Wk", "Wv"))
    if a.clip_qkv:
        q_LHD, k_LKD, v_LKD = (
            np.clip(t, -a.clip_qkv, a.clip_qkv) for t in (q_LHD, k_LKD, v_LKD)
        )
    if a.qk_ln or a.qk_gn:  # over all heads together, or within each head
        how = {"kind": "layernorm", "eps": QK_NORM_EPS, "dims": 2 if a.qk_ln else 1}
        q_LHD, k_LKD = norm(q_LHD, p["q_ln"], **how), norm(k_LKD, p["k_ln"], **how)
    scale = a.softmax_scale
    if scale is None:
        scale = 1 / math.sqrt(cfg.d_model / cfg.n_heads)  # even if head_dim is given
    slopes = alibi_slopes(cfg.n_heads, a.alibi_bias_max)
    position = np.arange(len(x_LE))
    distance_LL = np.abs(position[:, None] - position[None, :])
    out_LHD = np.zeros_like(q_LHD)
    for h in range(cfg.n_heads):
        group = h // (cfg.n_heads // kv_heads(cfg))
        logits_LL = scale * q_LHD[:, h] @ k_LKD[:, group].T
        logits_LL = softcap(logits_LL, a.attn_logit_softcapping)
        if a.alibi:
            logits_LL = logits_LL - slopes[h] * distance_LL
        out_LHD[:, h] = softmax(logits_LL, allowed_LL) @ v_LKD[:, group]
    out_proj = p["out_proj"]
    return np.tensordot(out_LHD, out_proj["weight"], axes=2) + out_proj.get("bias", 0)


def ffn(cfg: ModelConfig, p: Params, x_LE: Array) -> Array:
    act = cfg.ffn_config.ffn_act_fn
    tanh_gelu = act.name == "gelu" and act.approximate == "tanh"
    f = ACTIVATIONS["gelu_tanh" if tanh_gelu else act.name]
    up_LF = dense(x_LE, p["up_proj"])
    if cfg.ffn_config.ffn_type == "mptglu":
        return dense(f(dense(x_LE, p["gate_proj"])) * up_LF, p["down_proj"])
    return dense(f(up_LF), p["down_proj"])


def forward_row(
    cfg: ModelConfig, params: Params, tokens_L: Array, segments_L: Array | None,
    prefix_L: Array | None,
) -> Array:  # fmt: skip
    """logits_LV of one sequence. embedding_fraction only changes the gradient."""
    x = params["wte"]["weight"][tokens_L]
    if "wpe" in params:
        position = np.arange(len(tokens_L))
        if segments_L is not None:  # padding takes no position
            position = np.maximum(position - np.cumsum(segments_L == 0), 0)
        x = x + params["wpe"]["weight"][position]
    allowed = visible(cfg, len(tokens_L), segments_L, prefix_L)
    how = {"kind": cfg.norm_type, "eps": cfg.norm_eps}
    for n in range(cfg.n_layers):
        p = layer(params["blocks"], n)
        x = x + attention(cfg, p["attn"], norm(x, p["norm_1"], **how), allowed)
        x = x + ffn(cfg, p["ffn"], norm(x, p["norm_2"], **how))
    x = norm(x, params["norm_f"], **how)
    head = params["wte" if cfg.tie_word_embeddings else "lm_head"]["weight"]
    logits = x @ head.T
    if cfg.logit_scale == "inv_sqrt_d_model":
        logits = logits / math.sqrt(cfg.d_model)
    elif cfg.logit_scale is not None:
        logits = logits * cfg.logit_scale
    return softcap(logits, cfg.final_logit_softcapping)


def forward(
    cfg: ModelConfig, params: Params, tokens: Array, segment_ids: Array | None = None,
    prefix_mask: Array | None = None,
) -> Array:  # fmt: skip
    """logits_BLV in float64. Rows of padding queries mean nothing.

    Args:
      params: the tree that random_params makes, of any float dtype.
      tokens, segment_ids, prefix_mask: (B, L) integers; segment 0 is padding.
    """
    params = map_leaves(params, lambda _, leaf: np.asarray(leaf, np.float64))
    row = lambda batch, b: None if batch is None else np.asarray(batch[b])  # noqa: E731
    return np.stack([
        forward_row(cfg, params, np.asarray(tokens[b]), row(segment_ids, b),
                    row(prefix_mask, b))
        for b in range(len(tokens))
    ])  # fmt: skip


def loss(
    cfg: ModelConfig, params: Params, tokens: Array, loss_mask: Array | None = None,
    z_loss: float = 0.0, **batch: Array | None,
) -> float:  # fmt: skip
    """Mean over real targets of -log p(tokens[l+1]) + z_loss * log(Z)^2.

    Args:
      loss_mask: (B, L), 1 where the token is a target; default everywhere. Position l
        learns tokens[l+1], so the first token is nobody's target.
      batch: segment_ids, prefix_mask as in forward.
    """
    logits = forward(cfg, params, tokens, **batch)[:, :-1]
    targets = np.asarray(tokens)[:, 1:]
    weights = np.ones(targets.shape)
    if loss_mask is not None:
        weights = np.asarray(loss_mask, np.float64)[:, 1:]
    top = logits.max(-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    target_logits = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total = weights * (log_z - target_logits + z_loss * log_z**2)
    return float(total.sum() / weights.sum())


def numeric_grad_directional(
    cfg: ModelConfig, params: Params, direction: Params, tokens: Array, *,
    step: float = 1e-7, **batch: Any,
) -> float:  # fmt: skip
    """d/dt loss(params + t * direction) at t = 0 by central differences.

    Args:
      direction: same tree as params; leave a leaf at zero to hold it still.
      batch: loss_mask, z_loss, segment_ids, prefix_mask as in loss.

    Numerics: rounding about 1e-15 / step = 1e-8. A larger step would carry some input
      over the kink of clip_qkv or relu, where the two sides differ.
    """

    ways = dict(leaves(direction))

    def at(t: float) -> float:
        moved = map_leaves(
            params, lambda path, leaf: np.float64(leaf) + t * np.float64(ways[path])
        )
        return loss(cfg, moved, tokens, **batch)

    return (at(step) - at(-step)) / (2 * step)


# ------------------------------------------------------------------ the parameter tree


def kv_heads(cfg: ModelConfig) -> int:
    a = cfg.attn_config
    return {
        "multihead_attention": cfg.n_heads,
        "multiquery_attention": 1,
        "grouped_query_attention": a.kv_n_heads,
    }[a.attn_type]


def shapes(cfg: ModelConfig) -> Params:
    """Shape of every parameter, as a nested dict; blocks are stacked on axis 0."""
    a, f = cfg.attn_config, cfg.ffn_config
    E, H, K = cfg.d_model, cfg.n_heads, kv_heads(cfg)
    D = cfg.head_dim or E // H
    F = f.ffn_hidden_size or int(E * cfg.expansion_ratio)
    biased = not cfg.no_bias
    qkv_biased = biased if cfg.attention_bias is None else cfg.attention_bias

    def linear(fan_in: tuple, fan_out: tuple, bias: bool = biased) -> Params:
        return {"weight": fan_in + fan_out} | ({"bias": fan_out} if bias else {})

    def norm_shapes(*shape: int, kind: str = cfg.norm_type) -> Params:
        bias = biased and kind.endswith("layernorm")
        return {"weight": shape} | ({"bias": shape} if bias else {})

    attn = {
        "Wq": linear((E,), (H, D), qkv_biased),
        "Wk": linear((E,), (K, D), qkv_biased),
        "Wv": linear((E,), (K, D), qkv_biased),
        "out_proj": linear((H, D), (E,)),
    }
    if a.qk_ln or a.qk_gn:
        attn["q_ln"] = norm_shapes(*((H, D) if a.qk_ln else (D,)), kind="layernorm")
        attn["k_ln"] = norm_shapes(*((K, D) if a.qk_ln else (D,)), kind="layernorm")
    mlp = {"up_proj": linear((E,), (F,)), "down_proj": linear((F,), (E,))}
    if f.ffn_type == "mptglu":
        mlp["gate_proj"] = linear((E,), (F,))
    block = {
        "norm_1": norm_shapes(E), "attn": attn, "norm_2": norm_shapes(E), "ffn": mlp
    }  # fmt: skip
    tree = {
        "wte": {"weight": (cfg.vocab_size, E)},
        "blocks": map_leaves(block, lambda _, shape: (cfg.n_layers, *shape)),
        "norm_f": norm_shapes(E),
    }
    if cfg.learned_pos_emb and not a.alibi:
        tree["wpe"] = {"weight": (cfg.max_seq_len, E)}
    if not cfg.tie_word_embeddings:
        tree["lm_head"] = {"weight": (cfg.vocab_size, E)}
    return tree


def random_params(cfg: ModelConfig, seed: int) -> Params:
    """float32 parameters with which every feature shows: no zero bias, no unit norm."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        noise = rng.standard_normal(shape)
        if path.endswith("bias"):
            noise = 0.3 * noise
        elif "norm_" in path or "_ln" in path:
            noise = 1 + 0.3 * noise
        elif path.startswith("blocks"):  # (N, fan_in..., fan_out...)
            fan_in = math.prod(shape[1:3] if "out_proj" in path else shape[1:2])
            noise = noise / math.sqrt(fan_in)
        else:
            noise = 0.5 * noise
        return noise.astype(np.float32)

    return map_leaves(shapes(cfg), draw)


def map_leaves(tree: Params, f: Callable[[str, Any], Any], path: str = "") -> Params:
    """f(dotted path, leaf) over a nested dict; whatever is no mapping is a leaf."""
    return {
        name: map_leaves(child, f, f"{path}{name}.")
        if isinstance(child, Mapping)
        else f(f"{path}{name}", child)
        for name, child in tree.items()
    }


def leaves(tree: Params, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a nested dict."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from leaves(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def layer(blocks: Params, n: int) -> Params:
    """Block n of the stacked blocks."""
    return map_leaves(blocks, lambda _, leaf: leaf[n])
