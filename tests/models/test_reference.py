"""The model against tests/reference.py: float64 NumPy that shares no code with it.

Each case of CASES turns one feature on, or several that meet in one place; the ids name
the feature. Parameters are random down to biases and norm weights.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, nest, parse
from mpt_jax.models import mpt
from mpt_jax.objectives import next_token_loss
from tests import reference

# Largest error over the rms of the logits. Float32 carries 6e-8 per operation; through
# two layers of sums over up to 144 terms the worst logit is off by about 2e-6.
FLOAT32_RTOL = 1e-5
# <error, direction> over |gradient|, for a random direction of unit entries: float32
# gradients pass twice as many sums and lose about 2e-6.
GRADIENT_RTOL = 1e-5
# A key bias alone moves no softmax, so its gradient is 0 but for float32 noise of 1e-7.
# The other gradients here have norms over 3e-2.
GRADIENT_ATOL = 1e-6
# rms of the error over rms of the logits. One bfloat16 rounding is off by 1.1e-3 rms
# (2^-9 / sqrt(3)); logits here pass about 30 of them, a random walk of 6e-3.
BFLOAT16_RTOL = 2e-2
# A feature is visible when it moves the logits by this much of their rms, ten times
# what the comparison tolerates. The least visible one (gelu_tanh) moves them by 1.5e-4.
VISIBLE = 1e-4
# Each program runs once: LLVM's optimisations are over half of its compile time.
COMPILER = {"xla_backend_optimization_level": 0}

BASE: dict[str, Any] = {
    "d_model": 36,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 29,
    "max_seq_len": 20,
    "attn_config": {"alibi": True},
    "compute_dtype": "float32",
    "attention": "xla",
}
LENGTH = 15  # odd, and under max_seq_len

# Two rows: three documents and padding at the end; padding first, then two documents.
SEGMENTS = np.array([[1] * 4 + [2] * 6 + [3] * 3 + [0] * 2, [0] + [1] * 5 + [2] * 9])
# Padding at the end only, where it needs no mask: what real tokens see is the same.
RIGHT_PADDED = np.array([[1] * 4 + [2] * 5 + [0] * 6, [1] * 6 + [2] * 9])
PREFIX = np.array([[1] * 7 + [0] * 8, [1] * 3 + [0] * 12])
PAD = 5  # a token id
PACKED = {"attn_config.attn_uses_sequence_id": True}
GQA = {
    "n_heads": 6,
    "attn_config.attn_type": "grouped_query_attention",
    "attn_config.kv_n_heads": 2,
}
MQA = {"attn_config.attn_type": "multiquery_attention"}
NO_ALIBI = {"attn_config.alibi": False}
LEARNED = NO_ALIBI | {"learned_pos_emb": True}

# Many features at once; the gradient tests run on these too.
RICH: dict[str, dict[str, Any]] = {
    "rich_gqa_alibi_packed": GQA
    | PACKED
    | {
        "head_dim": 8,
        "attn_config.alibi_bias_max": 16,
        "attn_config.clip_qkv": 1.0,
        "attn_config.qk_ln": True,
        "attn_config.attn_logit_softcapping": 2.0,
        "attn_config.sliding_window_size": 3,
        "ffn_config.ffn_type": "mptglu",
        "ffn_config.ffn_act_fn.name": "silu",
        "expansion_ratio": 2.5,
        "norm_type": "rmsnorm",
        "logit_scale": 1.5,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
    "rich_mqa_learned_prefix": MQA
    | LEARNED
    | {
        "attn_config.prefix_lm": True,
        "attn_config.qk_gn": True,
        "attn_config.softmax_scale": 0.5,
        "ffn_config.ffn_act_fn.name": "quick_gelu",
        "norm_type": "layernorm",
        "logit_scale": "inv_sqrt_d_model",
        "tie_word_embeddings": False,
        "embedding_fraction": 0.25,
    },
    "rich_mha_alibi_3_heads": {
        "n_heads": 3,
        "no_bias": True,
        "attention_bias": True,
        "attn_config.prefix_lm": True,
        "attn_config.attn_uses_sequence_id": True,
        "ffn_config.ffn_hidden_size": 50,
        "ffn_config.ffn_act_fn.name": "mish",
        "scan_layers": False,
    },
}
CASES: dict[str, dict[str, Any]] = RICH | {
    "alibi_4_heads": {},
    "alibi_3_heads": {"n_heads": 3},
    "alibi_6_heads": {"n_heads": 6},
    "alibi_12_heads": {"n_heads": 12},
    "alibi_bias_max_16": {"attn_config.alibi_bias_max": 16},
    "alibi_bias_max_16_12_heads": {"n_heads": 12, "attn_config.alibi_bias_max": 16},
    "learned_positions": LEARNED,
    "learned_positions_packed": LEARNED | PACKED,
    "no_positions": NO_ALIBI | {"learned_pos_emb": False},
    "packed": PACKED,
    "packed_window": PACKED | {"attn_config.sliding_window_size": 2},
    "segments_without_sequence_id": {"attn_config.attn_uses_sequence_id": False},
    "prefix": {"attn_config.prefix_lm": True},
    "prefix_packed": PACKED | {"attn_config.prefix_lm": True},
    "prefix_window": {
        "attn_config.prefix_lm": True,
        "attn_config.sliding_window_size": 2,
    },
    "prefix_mask_without_prefix_lm": {"attn_config.prefix_lm": False},
    "window_0": {"attn_config.sliding_window_size": 0},
    "window_4": {"attn_config.sliding_window_size": 4},
    "attn_softcap": {"attn_config.attn_logit_softcapping": 1.0},
    "softmax_scale": {"attn_config.softmax_scale": 1.0},
    "clip_qkv": {"attn_config.clip_qkv": 0.5},
    "clip_qkv_0_is_off": {"attn_config.clip_qkv": 0.0},
    "clip_qkv_before_qk_ln": {"attn_config.clip_qkv": 0.5, "attn_config.qk_ln": True},
    "qk_ln": {"attn_config.qk_ln": True},
    "qk_ln_mqa": MQA | {"attn_config.qk_ln": True},
    "qk_ln_gqa": GQA | {"attn_config.qk_ln": True},
    # q_ln and k_ln stay layernorms (with bias) and keep epsilon 1e-5.
    "qk_ln_rmsnorm": {
        "attn_config.qk_ln": True,
        "norm_type": "rmsnorm",
        "norm_eps": 0.1,
    },
    "qk_ln_no_bias": {"attn_config.qk_ln": True, "no_bias": True},
    "qk_gn": {"attn_config.qk_gn": True},
    "qk_gn_gqa": GQA | {"attn_config.qk_gn": True},
    "mqa": MQA,
    "gqa": GQA,
    "head_dim": {"head_dim": 5},
    "head_dim_gqa": GQA | {"head_dim": 8},
    "no_bias": {"no_bias": True},
    "attention_bias_with_no_bias": {"no_bias": True, "attention_bias": True},
    "no_attention_bias": {"attention_bias": False},
    "layernorm": {"norm_type": "layernorm"},
    "rmsnorm": {"norm_type": "rmsnorm"},
    "low_precision_rmsnorm": {"norm_type": "low_precision_rmsnorm"},
    "norm_eps": {"norm_eps": 0.1},
    "mptglu": {"ffn_config.ffn_type": "mptglu"},
    "expansion_ratio_float": {"expansion_ratio": 2.5},
    "ffn_hidden_size": {"ffn_config.ffn_hidden_size": 50},
    "gelu_tanh": {"ffn_config.ffn_act_fn.approximate": "tanh"},
    **{
        name: {"ffn_config.ffn_act_fn.name": name}
        for name in ("quick_gelu", "relu", "silu", "elu", "leaky_relu", "mish", "tanh")
    },
    "logit_scale": {"logit_scale": 0.5},
    "logit_scale_inv_sqrt_d_model": {"logit_scale": "inv_sqrt_d_model"},
    "final_softcap": {"final_logit_softcapping": 2.0},
    "final_softcap_after_logit_scale": {
        "final_logit_softcapping": 2.0,
        "logit_scale": 0.5,
    },
    "untied": {"tie_word_embeddings": False},
    "embedding_fraction": {"embedding_fraction": 0.1},
    "unscanned": {"scan_layers": False},
}
# What computes the same as BASE by definition, on the batch of its case.
INERT = {
    "alibi_4_heads", "segments_without_sequence_id", "prefix_mask_without_prefix_lm",
    "clip_qkv_0_is_off", "layernorm", "embedding_fraction", "unscanned",
}  # fmt: skip


def make_config(name: str, **more: Any) -> ModelConfig:
    return parse(ModelConfig, nest(CASES[name] | more, BASE))


def make_batch(name: str) -> dict[str, np.ndarray]:
    """tokens and what else the case's name and config call for; all (2, LENGTH)."""
    cfg = make_config(name)
    rng = np.random.default_rng(7)
    batch = {"tokens": rng.integers(cfg.vocab_size, size=(2, LENGTH), dtype=np.int32)}
    if name in ("segments_without_sequence_id", "learned_positions_packed"):
        batch["segment_ids"] = RIGHT_PADDED
    elif cfg.attn_config.attn_uses_sequence_id:
        batch["segment_ids"] = SEGMENTS
    if cfg.attn_config.prefix_lm or "prefix" in name:
        batch["prefix_mask"] = PREFIX
    return batch


def model_kwargs(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    kwargs = {}
    if "segment_ids" in batch:
        kwargs["segment_ids_BL"] = jnp.asarray(batch["segment_ids"], jnp.int32)
    if "prefix_mask" in batch:
        kwargs["prefix_mask_BL"] = jnp.asarray(batch["prefix_mask"], bool)
    return kwargs


def model_logits(
    cfg: ModelConfig, params: reference.Params, batch: dict[str, np.ndarray]
) -> np.ndarray:
    run = jax.jit(functools.partial(mpt.apply, cfg), compiler_options=COMPILER)
    return np.asarray(run(params, batch["tokens"], **model_kwargs(batch)), np.float64)


def real(batch: dict[str, np.ndarray]) -> np.ndarray:
    """(B, L) of bool: where the output means something."""
    return batch.get("segment_ids", np.ones_like(batch["tokens"])) != 0


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("name", CASES)
def test_parameter_tree_is_the_expected_one(name):
    cfg = make_config(name)
    specs = dict(reference.leaves(mpt.param_specs(cfg)))
    expected = dict(reference.leaves(reference.shapes(cfg)))
    assert {path: spec.shape for path, spec in specs.items()} == expected


@pytest.mark.parametrize("name", CASES)
def test_logits_match_reference(name):
    cfg, batch = make_config(name), make_batch(name)
    params = reference.random_params(cfg, seed=3)
    expected = reference.forward(cfg, params, **batch)[real(batch)]
    got = model_logits(cfg, params, batch)[real(batch)]
    assert np.abs(got - expected).max() <= FLOAT32_RTOL * rms(expected)


def same_parameters_as_base() -> list[str]:
    base = reference.shapes(parse(ModelConfig, BASE))
    return [name for name in CASES if reference.shapes(make_config(name)) == base]


@pytest.mark.parametrize("name", same_parameters_as_base())
def test_reference_shows_the_feature(name):
    """Or the comparison above would pass with the feature left out of both."""
    cfg, base, batch = make_config(name), parse(ModelConfig, BASE), make_batch(name)
    params = reference.random_params(cfg, seed=3)
    there = reference.forward(cfg, params, **batch)[real(batch)]
    plain = reference.forward(base, params, **batch)[real(batch)]
    change = rms(there - plain) / rms(plain)
    if name in INERT:
        assert change == 0
    else:
        assert change > VISIBLE


@pytest.mark.parametrize("name", RICH)
def test_bfloat16_stays_near_float64(name):
    cfg, batch = make_config(name, compute_dtype="bfloat16"), make_batch(name)
    params = reference.random_params(cfg, seed=3)
    expected = reference.forward(cfg, params, **batch)[real(batch)]
    error = rms(model_logits(cfg, params, batch)[real(batch)] - expected)
    assert error <= BFLOAT16_RTOL * rms(expected)
    assert error > 10 * FLOAT32_RTOL * rms(expected)  # else it ran in float32


# -------------------------------------------------------------------------- gradients


def mean_loss(
    cfg: ModelConfig, params: reference.Params, batch: dict[str, np.ndarray], *,
    loss_mask: np.ndarray, z_loss: float = 0.0,
) -> jax.Array:  # fmt: skip
    tokens = jnp.asarray(batch["tokens"])
    sums = next_token_loss(
        mpt.hidden_states(cfg, params, tokens, **model_kwargs(batch)),
        mpt.unembedding(cfg, params),
        tokens,
        jnp.asarray(loss_mask, jnp.int32),
        logit_scale=cfg.logit_multiplier,
        logit_softcap=cfg.final_logit_softcapping,
        z_loss=z_loss,
        chunk_tokens=11,  # several chunks, the last one partly filled
    )
    return sums.total / sums.weight


@pytest.mark.parametrize("name", RICH)
def test_loss_and_gradient_match_reference(name):
    """One directional derivative per parameter, so that no error hides in a sum."""
    cfg, batch = make_config(name), make_batch(name)
    params = reference.random_params(cfg, seed=3)
    rng = np.random.default_rng(5)
    learned = real(batch) & (rng.random(batch["tokens"].shape) < 0.8)
    learned[:, 1:] &= real(batch)[:, :-1]  # what padding predicts means nothing
    options = {"loss_mask": learned.astype(np.int32), "z_loss": 0.01}
    loss = functools.partial(mean_loss, cfg, batch=batch, **options)
    run = jax.jit(jax.value_and_grad(loss), compiler_options=COMPILER)
    value, grads = run(params)
    expected = reference.loss(cfg, params, **batch, **options)
    assert float(value) == pytest.approx(expected, rel=FLOAT32_RTOL)
    still = reference.map_leaves(params, lambda _, leaf: np.zeros_like(leaf))
    for path, grad in reference.leaves(grads):
        way = rng.standard_normal(grad.shape)
        direction = reference.map_leaves(
            still, lambda p, zero, path=path, way=way: way if p == path else zero
        )
        expected = reference.numeric_grad_directional(
            cfg, params, direction, **batch, **options
        )
        if path.startswith(("wte", "wpe")):  # untied wherever the fraction is not 1
            expected *= cfg.embedding_fraction
        grad = np.asarray(grad, np.float64)
        tolerance = GRADIENT_RTOL * np.linalg.norm(grad) + GRADIENT_ATOL
        assert np.vdot(grad, way) == pytest.approx(expected, abs=tolerance), path


def embedding_gradients(cfg: ModelConfig, params: reference.Params) -> reference.Params:
    """Gradients of wte and, where there is one, lm_head."""
    batch = make_batch("untied")
    batch["tokens"][0, 3] = PAD
    mask = np.ones_like(batch["tokens"])
    loss = functools.partial(mean_loss, cfg, batch=batch, loss_mask=mask)
    grads = jax.jit(jax.grad(loss), compiler_options=COMPILER)(params)
    tables = {"wte", "lm_head"} & grads.keys()
    return {name: np.asarray(grads[name]["weight"]) for name in tables}


@functools.cache
def untied_gradients() -> tuple[reference.Params, reference.Params]:
    """(parameters with equal wte and lm_head, their gradients)."""
    cfg = make_config("untied")
    params = reference.random_params(cfg, seed=3)
    params["lm_head"] = params["wte"]
    return params, embedding_gradients(cfg, params)


@pytest.mark.parametrize(
    ("field", "value"), [("embedding_fraction", 0.25), ("pad_token_id", PAD)]
)
def test_tied_embedding_gradient_is_lookup_plus_head(field, value):
    """What shrinks or stops the lookup's gradient leaves the head's alone.

    torch.nn.Embedding(padding_idx) and GLM-130B's fraction act on the lookup only.
    """
    params, untied = untied_gradients()
    lookup = untied["wte"].copy()
    assert np.abs(lookup[PAD]).max() > 0
    if field == "pad_token_id":
        lookup[PAD] = 0
    else:
        lookup *= value
    tied = {name: child for name, child in params.items() if name != "lm_head"}
    cfg = make_config("alibi_4_heads", **{field: value})
    got, expected = embedding_gradients(cfg, tied)["wte"], lookup + untied["lm_head"]
    assert np.abs(got - expected).max() <= GRADIENT_RTOL * np.abs(expected).max()
