"""In which order heads lie, and that nothing but memory knows of it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from mpt_jax import presets
from mpt_jax.config import ModelConfig, parse
from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import Operands, Rule
from mpt_jax.models import alibi, heads, mpt

MPT_7B = presets.model("mpt-7b-8k")


def test_the_order_of_7b_deals_heads_in_turns():
    """Every device has one head of each octave of slopes, or of every other one."""
    four, eight = (heads.order(MPT_7B, shards=n, length=8192) for n in (4, 8))
    assert four.heads[:8] == (0, 7, 8, 15, 16, 23, 24, 31)
    assert four.heads[8:16] == (1, 6, 9, 14, 17, 22, 25, 30)
    assert eight.heads[:8] == (0, 15, 16, 31, 1, 14, 17, 30)
    assert eight.heads[28:] == (7, 8, 23, 24)
    assert four.heads == four.kv_heads
    assert sorted(eight.heads) == list(range(32))
    assert [four.heads[n] for n in four.inverse.heads] == list(range(32))


@pytest.mark.parametrize(
    ("fields", "shards", "length"),
    [
        ({}, 1, 8192),
        ({}, 32, 8192),  # one head each: nothing to deal
        ({}, 4, 2048),  # too short to skip
        ({"attention_skip": "off"}, 4, 8192),
        ({"attention": "xla"}, 4, 8192),
        ({"attn_config": {"alibi": False}}, 4, 8192),
        ({"attn_config": {"alibi": True, "attn_pdrop": 0.1}}, 4, 8192),
    ],
)
def test_heads_keep_their_order_where_it_would_not_help(fields, shards, length):
    cfg = parse(ModelConfig, {**dataclasses.asdict(MPT_7B), **fields})
    assert heads.order(cfg, shards=shards, length=length) is None


def small(kind: str = "grouped_query_attention", **fields) -> ModelConfig:
    attn = {"attn_type": kind, "alibi": True, "qk_ln": True, "clip_qkv": 1.0}
    if kind.startswith("grouped"):
        attn["kv_n_heads"] = 4
    base = {
        "d_model": 32, "n_heads": 8, "n_layers": 1, "vocab_size": 48, "max_seq_len": 16,
        "compute_dtype": "float32", "attention_skip": 2**-24, "attn_config": attn,
    }  # fmt: skip
    return parse(ModelConfig, base | fields)


@pytest.mark.parametrize(
    ("kind", "kv_heads"),
    [
        ("multihead_attention", (0, 3, 4, 7, 1, 2, 5, 6)),
        ("grouped_query_attention", (0, 3, 1, 2)),
        ("multiquery_attention", (0,)),
    ],
)
def test_logits_do_not_depend_on_the_order(kind, kv_heads):
    """KV heads go with their query heads; biases and norms over heads, too."""
    cfg = small(kind)
    order = heads.order(cfg, shards=2, length=16)
    assert order.kv_heads == kv_heads
    axes = mpt.param_axes(cfg)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 16))

    def noisy(params):
        """Biases and norms start alike in all heads, which would hide a mistake."""
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        pairs = zip(leaves, keys, strict=True)
        return tree.unflatten(p + 0.1 * jax.random.normal(k, p.shape) for p, k in pairs)

    @jax.jit
    def run():
        params = noisy(mpt.init(cfg, jax.random.key(0)))
        arranged = heads.arrange(params, axes, order)
        want = mpt.apply(cfg, params, tokens)
        with heads.arranged(order):
            got, wrong = (mpt.apply(cfg, p, tokens) for p in (arranged, params))
        return got, want, wrong

    got, want, wrong = run()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert abs(wrong - want).max() > 1e-2


def visited(cfg: ModelConfig, length: int) -> np.ndarray:
    """Blocks of keys that each head visits, over those of causal attention."""
    D, block, n = cfg.d_head, heads.BLOCK, length // heads.BLOCK
    slopes_H = alibi.slopes(cfg.n_heads, bias_max=cfg.attn_config.alibi_bias_max)

    @jax.jit
    def lower(q, k, slope):
        rule, x = Rule(D**-0.5), Operands(slopes_H=slope[None])
        return skip.lower_key_blocks(q, k, rule, x, block_q=block, block_k=block)

    shares = []
    for head, slope in enumerate(slopes_H):
        rng = np.random.default_rng(head)
        q, k = (rng.standard_normal((1, length, 1, D), np.float32) for _ in range(2))
        reads = np.arange(1, n + 1) - np.asarray(lower(q, k, slope))[0, 0]
        shares.append(reads.sum() / (n * (n + 1) / 2))
    return np.asarray(shares)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length", "shards", "own", "dealt", "mean"),
    [
        ("mpt-7b", 8192, 4, 0.89, 0.46, 0.45),
        ("mpt-7b", 8192, 8, 0.99, 0.47, 0.45),
        ("mpt-7b", 65_536, 8, 0.25, 0.11, 0.08),
        ("mpt-7b-storywriter", 65_536, 8, 1.00, 0.53, 0.50),
    ],
)
def test_the_table_of_the_busiest_device(name, length, shards, own, dealt, mean):
    cfg = presets.model(name)
    shares_H = visited(cfg, length)
    order = heads.order(cfg, shards=shards, length=length)

    def busiest(shares_H):
        return shares_H.reshape(shards, -1).mean(1).max()

    got = busiest(shares_H), busiest(shares_H[np.asarray(order.heads)]), shares_H.mean()
    np.testing.assert_allclose(got, (own, dealt, mean), atol=0.006)
