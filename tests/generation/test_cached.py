"""Cached equals uncached, for every kind of attention: chunks, then tokens one by one.

The uncached logits are those of tests/reference.py, in float64 NumPy.
"""

import jax
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, nest, parse
from mpt_jax.generation.engine import Engine, Request
from mpt_jax.generation.sampling import Sampling
from mpt_jax.models import weights
from tests import reference

BASE = {
    "d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 30, "max_seq_len": 64,
    "compute_dtype": "float32", "attn_config.alibi": True,
}  # fmt: skip
GQA = {"attn_config.attn_type": "grouped_query_attention", "attn_config.kv_n_heads": 2}
VARIANTS = {
    "alibi": {},
    # Past max_seq_len from the middle of the prompt on.
    "storywriter": {"attn_config.alibi_bias_max": 16, "attn_config.clip_qkv": 0.7,
                    "max_seq_len": 12},
    "learned": {"attn_config.alibi": False},
    "no_positions": {"attn_config.alibi": False, "learned_pos_emb": False},
    "grouped": GQA,
    "multiquery": {"attn_config.attn_type": "multiquery_attention", "n_heads": 6},
    "qk_ln": {"attn_config.qk_ln": True, "no_bias": True},
    "qk_gn": {"attn_config.qk_gn": True} | GQA,
    "softcap": {"attn_config.attn_logit_softcapping": 2.0},
    "head_softcap": {"final_logit_softcapping": 3.0, "logit_scale": 0.5},
    "window": {"attn_config.sliding_window_size": 5},
    "prefix_lm": {"attn_config.prefix_lm": True},
    "prefix_lm_learned": {"attn_config.prefix_lm": True, "attn_config.alibi": False},
    "glu": {"ffn_config.ffn_type": "mptglu", "no_bias": True, "attention_bias": True},
    "untied": {"tie_word_embeddings": False, "norm_type": "rmsnorm", "head_dim": 8},
}  # fmt: skip
# The first few run by default; each compiles four programs.
DEFAULT = {"storywriter", "learned", "prefix_lm"}
# Log-probabilities, of the size of 3, in float32 beside float64.
LOGPROB_ATOL = 2e-5
PROMPT, NEW = 21, 6


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow)
             for n in VARIANTS]
)  # fmt: skip
def test_cached_log_probabilities_equal_those_of_the_whole_text(name):
    cfg = parse(ModelConfig, nest(BASE | VARIANTS[name]))
    params = reference.random_params(cfg, 1)
    prompt = np.random.default_rng(2).integers(30, size=PROMPT).tolist()
    serving = weights.unstack(jax.tree.map(jax.numpy.asarray, params))
    engine = Engine(cfg, serving, n_slots=2, capacity=64, prefill_chunk=8)
    s = Sampling(
        max_tokens=NEW, seed=4, temperature=2.0, logprobs=0, prompt_logprobs=True
    )
    engine.submit(Request("a", prompt, s))
    events = []
    while not engine.idle:
        events += engine.step()
    told = [*events[0].prompt_logprobs[1:], *(p for e in events for p in e.logprobs)]
    ids = np.array([[*prompt, *(i for e in events for i in e.ids)]])
    mask = None
    if cfg.attn_config.prefix_lm:
        mask = np.arange(ids.shape[1])[None] < PROMPT
    logits = reference.forward(cfg, params, ids, prefix_mask=mask)[0]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    want = logp[np.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert len(told) == PROMPT + NEW - 1
    assert np.ptp(want) > 1  # there is something to get wrong
    np.testing.assert_allclose([p.logprob for p in told], want, atol=LOGPROB_ATOL)
