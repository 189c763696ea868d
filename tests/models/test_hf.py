"""The model against Hugging Face transformers' MptForCausalLM.

The golden tests read what HF computed (tests/golden/make_hf_golden.py) and need no
torch; the tests marked hf build HF's model here, with other seeds and settings.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, parse
from mpt_jax.models import mpt
from mpt_jax.objectives import next_token_loss
from tests import reference
from tests.golden import make_hf_golden as hf

# Largest error over the array's largest entry: HF and we sum the same float32 products
# in different orders, which leaves about 1e-6 after three layers and their backward.
HF_RTOL = 1e-5
# HF in float64 still casts to float32 around the softmax: 6e-8 each, over three layers.
GOLDEN_RTOL = 1e-6
# Each program runs once: LLVM's optimisations are over half of its compile time.
COMPILER = {"xla_backend_optimization_level": 0}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(hf.FOLDER) / f"{name}.npz") as file:
        return dict(file)


def subtree(arrays: dict[str, np.ndarray], root: str) -> dict[str, Any]:
    prefix = f"{root}."
    return hf.unflatten(
        {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    )


def make_config(fields: dict[str, Any], **ours: Any) -> ModelConfig:
    ours = {"compute_dtype": "float32", "param_dtype": "float32"} | ours
    return parse(ModelConfig, fields | ours)


def mean_cross_entropy(
    cfg: ModelConfig, params: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean next-token loss, logits), by nothing but the model's logits."""
    logits_BLV = mpt.apply(cfg, params, tokens)
    log_p = jax.nn.log_softmax(logits_BLV[:, :-1])
    target = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
    return -jnp.mean(target), logits_BLV


def mean_objective(
    cfg: ModelConfig, params: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, None]:
    """The same loss by the training objective."""
    sums = next_token_loss(
        mpt.hidden_states(cfg, params, tokens),
        mpt.unembedding(cfg, params),
        tokens,
        jnp.ones_like(tokens),
        logit_scale=cfg.logit_multiplier,
        logit_softcap=cfg.final_logit_softcapping,
    )
    return sums.total / sums.weight, None


def evaluate(
    cfg: ModelConfig, params: dict[str, Any], tokens: np.ndarray, loss: Any
) -> dict[str, Any]:
    """What hf.evaluate returns, of our model."""
    loss = functools.partial(loss, cfg, tokens=jnp.asarray(tokens))
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILER)
    (value, logits), grads = run(params)
    return {"loss": value, "logits": logits, "grads": grads}


def check(got: Any, expected: Any, what: str, *, rtol: float = HF_RTOL) -> None:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, what
    error, size = np.abs(got - expected).max(), np.abs(expected).max()
    assert size > 0, f"{what}: nothing to compare"
    assert error <= rtol * size, (
        f"{what}: off by {error / size:.1e} of its largest entry"
    )


def check_all(got: dict[str, Any], expected: dict[str, Any]) -> None:
    check(got["loss"], expected["loss"], "loss")
    if got["logits"] is not None:
        check(got["logits"], expected["logits"], "logits")
    ours = dict(reference.leaves(got["grads"]))
    theirs = dict(reference.leaves(expected["grads"]))
    assert ours.keys() == theirs.keys()
    for path, grad in theirs.items():
        check(ours[path], grad, f"gradient of {path}")


def golden_results(name: str) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """(config fields, tokens, what hf.evaluate returned)."""
    arrays = load(name)
    results = {"logits": arrays["logits"], "loss": arrays["loss"]}
    results |= {root: subtree(arrays, root) for root in ("params", "grads")}
    return json.loads(str(arrays["config"])), arrays["tokens"], results


# ----------------------------------------------------------------------------- golden


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("attention", ["xla", "reference"])
@pytest.mark.parametrize("name", hf.CASES)
def test_logits_and_gradients_equal_golden(name, attention, scan_layers):
    fields, tokens, expected = golden_results(name)
    cfg = make_config(fields, attention=attention, scan_layers=scan_layers)
    check_all(evaluate(cfg, expected["params"], tokens, mean_cross_entropy), expected)


@pytest.mark.parametrize("name", hf.CASES)
def test_objective_equals_golden(name):
    fields, tokens, expected = golden_results(name)
    cfg = make_config(fields, attention="xla")
    check_all(evaluate(cfg, expected["params"], tokens, mean_objective), expected)


@pytest.mark.parametrize("name", hf.CASES)
def test_reference_equals_golden(name):
    """The oracle of every other feature agrees with HF where HF can speak."""
    fields, tokens, expected = golden_results(name)
    cfg, params = make_config(fields), expected["params"]
    logits = reference.forward(cfg, params, tokens)
    check(logits, expected["logits"], "logits", rtol=GOLDEN_RTOL)
    loss = reference.loss(cfg, params, tokens)
    check(loss, expected["loss"], "loss", rtol=GOLDEN_RTOL)


# ------------------------------------------------------------------------------- live

LIVE: dict[str, dict[str, Any]] = {
    "power_of_two": {"d_model": 64, "n_heads": 8, "max_seq_len": 40},
    "12_heads": {"d_model": 48, "n_heads": 12, "max_seq_len": 29},
    "1_head": {"d_model": 24, "n_heads": 1, "max_seq_len": 29},
    "untied": {"d_model": 32, "n_heads": 4, "max_seq_len": 32}
    | {"tie_word_embeddings": False},
    "clip_and_scale": {"d_model": 40, "n_heads": 5, "max_seq_len": 32}
    | {"attn_config": {"alibi": True, "clip_qkv": 0.7, "softmax_scale": 0.9}},
}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="live parity needs the 'hf' extra")
    return pytest.importorskip("torch", reason="live parity needs the 'hf' extra")


def live(
    fields: dict[str, Any], *, seed: int, dtype: str = "float32", **inputs: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """(tokens, hf.evaluate) of a random model and batch."""
    model = hf.make_model(fields, seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(fields["vocab_size"], size=(2, 29), dtype=np.int32)
    return tokens, hf.evaluate(model, tokens, **inputs)


@pytest.mark.hf
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LIVE)
def test_logits_and_gradients_equal_live_hf(torch, name, dtype):
    fields = hf.BASE | LIVE[name]
    tokens, expected = live(fields, seed=10 + list(LIVE).index(name), dtype=dtype)
    cfg = make_config(fields, attention="xla")
    params = jax.tree.map(
        functools.partial(np.asarray, dtype=np.float32), expected["params"]
    )
    check_all(evaluate(cfg, params, tokens, mean_cross_entropy), expected)


@pytest.mark.hf
def test_padded_row_equals_live_hf(torch):
    """HF's attention_mask and our segment ids hide the same padding, left and right."""
    fields = hf.BASE | LIVE["power_of_two"] | {"attn_config": {"alibi": True}}
    real = np.ones((2, 29), np.int32)
    real[0, :6] = 0
    real[1, 20:] = 0
    tokens, expected = live(fields, seed=20, attention_mask=torch.from_numpy(real))
    attn_config = {"alibi": True, "attn_uses_sequence_id": True}
    cfg = make_config(fields | {"attn_config": attn_config}, attention="xla")
    run = jax.jit(functools.partial(mpt.apply, cfg), compiler_options=COMPILER)
    logits = run(expected["params"], tokens, segment_ids_BL=real)
    seen = real != 0
    check(np.asarray(logits)[seen], expected["logits"][seen], "logits of real tokens")


@pytest.mark.hf
@pytest.mark.parametrize("name", hf.CASES)
def test_golden_is_what_hf_computes(torch, name):
    """python -m tests.golden.make_hf_golden would write the committed file again."""
    committed, fresh = load(name), hf.golden(name)
    assert committed.keys() == fresh.keys()
    assert str(committed["config"]) == str(fresh["config"])
    np.testing.assert_array_equal(committed["tokens"], fresh["tokens"])
    for path in committed.keys() - {"config", "tokens"}:
        check(fresh[path], committed[path], path, rtol=GOLDEN_RTOL)
