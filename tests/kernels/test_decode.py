"""Decode attention against full attention, row by row, and what it does not read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from mpt_jax.kernels import decode
from mpt_jax.kernels.attention import Rule
from mpt_jax.kernels.attention_gpu import decode_gpu
from mpt_jax.kernels.decode import decode_attention, first_blocks, key_norms
from tests.kernels import suite

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Triton.*:DeprecationWarning", "ignore:.*Pallas.*:DeprecationWarning"
)
LENGTHS = (300, 1, 170)


def inputs(L=1, S=320, H=4, K=2, D=16, dtype="float32", lengths=LENGTHS, seed=0):
    """q, k, v, lengths, slopes; NaN lies in the cache beyond each length."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    q = jnp.asarray(rng.standard_normal((B, L, H, D)), dtype)
    unused = (
        np.arange(S)[None, None, :, None] >= np.asarray(lengths)[:, None, None, None]
    )
    k, v = (
        jnp.asarray(np.where(unused, np.nan, rng.standard_normal((B, K, S, D))), dtype)
        for _ in range(2)
    )
    slopes_H = jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32)
    return q, k, v, jnp.asarray(lengths, jnp.int32), slopes_H


def oracle(q, k, v, lengths_B, slopes_H, rule: Rule) -> np.ndarray:
    """The suite's float64 oracle on each row's own keys."""
    rows = []
    for b, length in enumerate(np.asarray(lengths_B)):
        own = [a[b : b + 1, :, :length].swapaxes(1, 2) for a in (k, v)]
        row = q[b : b + 1]
        options = {
            "softmax_scale": rule.softmax_scale,
            "window": rule.window,
            "logit_softcap": rule.logit_softcap,
            "q_offset": int(length) - q.shape[1],
        }
        if slopes_H is not None:
            options["slopes_H"] = slopes_H
        no_pull = jnp.zeros(q.shape[1:3])[None]
        rows.append(suite.oracle([row, *own, row, no_pull], options)[0])
    return np.concatenate(rows)


def gpu(q_BLHD, k_BKSD, v_BKSD, lengths_B, slopes_H=None, *, rule, key_norms_BKJ=None):
    """decode_attention through the interpreted kernel."""
    first_BK = first_blocks(
        q_BLHD, k_BKSD, lengths_B, slopes_H, rule=rule, key_norms_BKJ=key_norms_BKJ
    )
    call = q_BLHD, k_BKSD, v_BKSD, lengths_B, slopes_H, first_BK, rule
    return decode_gpu(*call, splits=2, interpret=True)


xla = functools.partial(decode_attention, implementation="xla")


@pytest.mark.parametrize("attend", [xla, gpu], ids=["xla", "gpu"])
@pytest.mark.parametrize(
    ("shape", "rule", "slopes"),
    [
        ({}, Rule(0.3), True),
        ({"L": 3, "D": 112, "dtype": "bfloat16"}, Rule(0.1, logit_softcap=2.0), True),
        ({"H": 4, "K": 1, "L": 2}, Rule(0.3, window=140), True),
        ({"K": 4}, Rule(0.3), False),
    ],
    ids=["gqa", "few_bf16_softcap", "mqa_window", "no_slopes"],
)
def test_matches_float64_for_every_length(attend, shape, rule, slopes, monkeypatch):
    monkeypatch.setattr(decode, "STEP", 128)  # three steps, of which the last overlaps
    q, k, v, lengths_B, slopes_H = inputs(**shape)
    if not slopes:
        slopes_H = None
    norms = key_norms(jnp.nan_to_num(k))
    run = jax.jit(functools.partial(attend, rule=rule))
    got = run(q, k, v, lengths_B, slopes_H, key_norms_BKJ=norms)
    want = oracle(q, k, v, lengths_B, slopes_H, rule)
    assert got.dtype == q.dtype
    suite.assert_close(got, want, suite.FORWARD_RTOL[str(q.dtype)], "out")


@pytest.mark.parametrize("attend", [xla, gpu], ids=["xla", "gpu"])
def test_erased_keys_are_not_read(attend, monkeypatch):
    """A steep head's old keys may be anything; a flat head reads them all."""
    monkeypatch.setattr(decode, "STEP", 128)
    S = 512
    q, k, v, lengths_B, _ = inputs(S=S, H=2, K=2, lengths=(S,))
    rule = Rule(0.3)
    norms = key_norms(k)
    steep, flat = (jnp.asarray(s, jnp.float32) for s in ((1.0, 1.0), (1.0, 0.001)))

    first_BK = first_blocks(q, k, lengths_B, flat, rule=rule, key_norms_BKJ=norms)
    np.testing.assert_array_equal(first_BK, [[3, 0]])
    np.testing.assert_array_equal(decode.keys_read(first_BK, lengths_B), [[128, 512]])

    spoiled = v.at[:, :, :384].set(jnp.nan)
    run = jax.jit(functools.partial(attend, rule=rule))
    out = run(q, k, spoiled, lengths_B, steep, key_norms_BKJ=norms)
    want = oracle(q, k, v, lengths_B, steep, rule)
    suite.assert_close(out, want, suite.FORWARD_RTOL["float32"], "steep")
    without_norms = run(q, k, spoiled, lengths_B, steep)
    assert jnp.isnan(without_norms).all()


@settings(max_examples=25, deadline=None, database=None)
@given(
    seed=st.integers(0, 1000),
    log_slope=st.floats(-6, 1),
    spread=st.floats(0, 30),
    eps=st.sampled_from([2.0**-24, 2.0**-10]),
)
def test_what_is_skipped_weighs_at_most_eps(seed, log_slope, spread, eps):
    """Keys that point the query's way, in one old block, are the worst case."""
    rng = np.random.default_rng(seed)
    S, D = 640, 8
    q = rng.standard_normal((1, 2, 1, D)).astype(np.float32)
    k = rng.standard_normal((1, 1, S, D)).astype(np.float32)
    block = 128 * rng.integers(0, 4)
    k[0, 0, block : block + 128] = spread * q[0, 0, 0]
    k[0, 0, -2:] = -q[0, :, 0]
    slopes_H = jnp.asarray([2.0**log_slope], jnp.float32)
    lengths_B, rule = jnp.asarray([S], jnp.int32), Rule(1.0, skip=eps)
    k = jnp.asarray(k)
    first = first_blocks(
        jnp.asarray(q), k, lengths_B, slopes_H, rule=rule, key_norms_BKJ=key_norms(k)
    )
    position = np.arange(S - 2, S)[:, None]
    away = position - np.arange(S)[None]
    logits = q[0, :, 0].astype(np.float64) @ np.asarray(k, np.float64)[0, 0].T
    logits = np.where(away >= 0, logits - float(slopes_H[0]) * away, -np.inf)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert p[:, : int(first[0, 0]) * decode.NORM_BLOCK].sum(1).max() <= eps


def test_norms_added_are_the_norms_of_the_whole_cache():
    rng = np.random.default_rng(0)
    k = jnp.asarray(rng.standard_normal((2, 2, 400, 8)), jnp.float32)
    starts_B = jnp.asarray([250, 10])
    before = jnp.stack([k[b].at[:, start:].set(0) for b, start in enumerate((250, 10))])
    after = jnp.stack(
        [k[b].at[:, start + 9 :].set(0) for b, start in enumerate((250, 10))]
    )
    new = jnp.stack([k[b, :, s : s + 9] for b, s in enumerate((250, 10))])
    got = decode.add_key_norms(key_norms(before), new, starts_B)
    np.testing.assert_allclose(got, key_norms(after), rtol=1e-6)


def test_wrong_rules_and_absent_gpus_raise():
    call = inputs()
    with pytest.raises(ValueError, match="expected a causal one without dropout"):
        decode_attention(*call, rule=Rule(1.0, causal=False))
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        decode_attention(*call, rule=Rule(1.0), implementation="gpu")
    assert jax.eval_shape(lambda: decode_attention(*call, rule=Rule(1.0))).ndim == 4


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
def test_the_kernel_lowers_for_gpus(kind):
    struct = jax.ShapeDtypeStruct
    cache = struct((2, 4, 1000, 112), "bfloat16")
    q, slopes = struct((2, 1, 8, 112), "bfloat16"), struct((8,), "float32")
    norms = struct((2, 4, 8), "float32")

    def run(q, cache, lengths_B, slopes_H, norms):
        return decode_attention(
            q, cache, cache, lengths_B, slopes_H, key_norms_BKJ=norms,
            rule=Rule(0.1, window=500), implementation="gpu",
        )  # fmt: skip

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(q, cache, struct((2,), "int32"), slopes, norms)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1
