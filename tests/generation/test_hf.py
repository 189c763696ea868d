"""Greedy tokens against Hugging Face's own generate(), for all that HF implements."""

import jax
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, parse
from mpt_jax.generation.engine import Engine, Request
from mpt_jax.generation.sampling import Sampling
from mpt_jax.models import weights
from tests.golden import make_hf_golden as hf

CASES = {
    "power_of_two": {"d_model": 64, "n_heads": 8, "max_seq_len": 96},
    "6_heads_clip": {"d_model": 36, "n_heads": 6, "max_seq_len": 96}
    | {"attn_config": {"alibi": True, "clip_qkv": 1.0}},
}
LENGTHS, NEW = (1, 7, 40), 40


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="live parity needs the 'hf' extra")
    return pytest.importorskip("torch", reason="live parity needs the 'hf' extra")


@pytest.mark.hf
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_hf(torch, name, penalty):
    fields = hf.BASE | CASES[name]
    model = hf.make_model(fields, seed=5, dtype="float32")
    params = hf.our_tree(
        dict(model.named_parameters()), n_layers=3, n_heads=fields["n_heads"]
    )
    ours = {"compute_dtype": "float32", "param_dtype": "float32"}
    cfg = parse(ModelConfig, fields | ours)
    serving = weights.unstack(jax.tree.map(jax.numpy.asarray, params))
    engine = Engine(cfg, serving, n_slots=4, capacity=96, prefill_chunk=16)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(97, size=n).tolist() for n in LENGTHS]
    s = Sampling(temperature=0.0, max_tokens=NEW, repetition_penalty=penalty)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, s))
    got = {str(i): [] for i in range(len(prompts))}
    while not engine.idle:
        for event in engine.step():
            got[event.id] += event.ids
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
            do_sample=False, repetition_penalty=penalty, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
        assert got[str(i)] == out[0, len(prompt) :].tolist()
