"""The op's contract and dispatch, and both XLA forms against the shared suite."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpt_jax.kernels import attention as op
from mpt_jax.kernels.attention import attention
from mpt_jax.kernels.attention_xla import attention_blocked, attention_reference
from tests.kernels import suite
from tests.kernels.suite import Case, arrays, call

# Neither divides the other nor most lengths: every loop runs and every pad is used.
SMALL_BLOCKS = {"block_q": 24, "block_k": 16}


class TestBlocked(suite.AttentionSuite):
    @staticmethod
    def attend(q, k, v, **options):
        # The long row crosses 128 blocks of the default size instead of 4,096.
        blocks = SMALL_BLOCKS if k.shape[1] < 1000 else {}
        return call(attention_blocked, q, k, v, **options, **blocks)


@pytest.mark.parametrize(
    "case",
    [c for c in suite.CASES if c.name in {"gqa_bf16", "packed_gqa", "everything"}],
    ids=lambda case: case.name,
)
def test_reference_matches_float64(case):
    class Reference(suite.AttentionSuite):
        attend = staticmethod(functools.partial(call, attention_reference))

    Reference().check(case)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, slice(64, None)),
        ({"window": 10, "q_offset": 64}, slice(0, 48)),
        ({"causal": False, "window": 10}, slice(80, None)),
    ],
)
def test_blocked_never_visits_blocks_that_nothing_sees(options, hidden):
    """NaN values there would spoil the output even with weight 0."""
    (q, k, v, dout, dlse), rest = arrays(Case("skip", L=64, S=128))
    v = v.at[:, hidden].set(jnp.nan)

    def attend(q, k, v):
        return call(attention_blocked, q, k, v, block_q=16, block_k=16, **rest)

    rest |= options
    results, pull = jax.vjp(jax.jit(attend), q, k, v)
    for array in (*results, *pull((dout, dlse))):
        assert jnp.isfinite(array).all()


def test_blocked_visits_above_the_diagonal_only_where_a_prefix_token_is():
    (q, k, v, *_), options = arrays(Case("prefix", L=64))

    @jax.jit
    def first_block(prefix_mask_BS, v):
        options["prefix_mask_BS"] = prefix_mask_BS
        out, _ = call(attention_blocked, q, k, v, block_q=16, block_k=16, **options)
        return out[:, :16]

    mask_BS = jnp.zeros((1, 64), bool)
    with_token = first_block(mask_BS.at[0, 60].set(True), v)
    # It sees blocks 0 and 3 of the keys, and 1 and 2 lie between.
    spoiled = first_block(mask_BS.at[0, 60].set(True), v.at[:, 20:47].set(jnp.nan))
    np.testing.assert_array_equal(spoiled, with_token)
    assert not jnp.allclose(first_block(mask_BS, v), with_token)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_blocked_needs_a_tenth_of_the_reference_memory_at_4096(backward):
    q = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)

    def temporaries(implementation):
        def f(q, k, v, slopes):
            out = attention(
                q, k, v, slopes, softmax_scale=0.125, implementation=implementation
            )
            return out.sum()

        f = jax.grad(f, (0, 1, 2)) if backward else f
        compiled = jax.jit(f).lower(q, q, q, slopes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("xla") < temporaries("reference") / 10


@pytest.mark.parametrize("K", [1, 2])
def test_blocked_sharded_over_batch_and_heads_gathers_nothing(K):
    case = Case("sharded", L=40, B=4, K=K)
    tensors, options = arrays(case)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = PartitionSpec("data", None, "tensor")
    kv = heads if K > 1 else PartitionSpec("data")
    specs = [NamedSharding(mesh, s) for s in (heads, kv, kv, heads, heads)]
    sharded = [jax.device_put(t, s) for t, s in zip(tensors, specs, strict=True)]

    def run(q, k, v, dout, dlse):
        results, pull = jax.vjp(
            lambda *a: call(attention_blocked, *a, **SMALL_BLOCKS, **options), q, k, v
        )
        return *results, *pull((dout, dlse))

    compiled = jax.jit(run).lower(*sharded).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    for got, want in zip(
        compiled(*sharded), suite.oracle(tensors, options), strict=True
    ):
        suite.assert_close(got, want, suite.GRADIENT_RTOL["float32"], f"K={K}")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_slopes_are_constants_to_the_gradient(implementation):
    (q, k, v, *_), options = arrays(Case("slopes", L=8))

    def loss(slopes_H):
        options["slopes_H"] = slopes_H
        return attention(q, k, v, implementation=implementation, **options).sum()

    gradient = jax.jit(jax.grad(loss))(options["slopes_H"])
    np.testing.assert_array_equal(gradient, 0)


def test_attention_returns_out_alone_unless_asked_for_lse():
    (q, k, v, *_), options = arrays(Case("lse", L=8))

    def shapes(**more):
        return jax.eval_shape(lambda: attention(q, k, v, **options, **more))

    out, lse = shapes(return_lse=True)
    assert (out.shape, lse.shape) == ((1, 8, 4, 16), (1, 8, 4))
    assert shapes() == out


def test_attention_named_backend_for_another_platform_raises():
    (q, k, v, *_), options = arrays(Case("absent", L=2))
    for name, message in (
        ("tpu", "the device is 'cpu', expected one of"),
        ("gpu", "needs an NVIDIA GPU, got cpu"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            attention(q, k, v, implementation=name, **options)
    with pytest.raises(ValueError, match="implementation: got 'cudnn', expected"):
        attention(q, k, v, implementation="cudnn", **options)


def test_attention_auto_falls_back_on_not_implemented_only(monkeypatch):
    (q, k, v, *_), options = arrays(Case("auto", L=2))
    monkeypatch.setitem(op._AUTO_ORDER, "cpu", ("tpu", "xla"))
    assert jax.eval_shape(lambda: attention(q, k, v, **options)).shape == q.shape
    monkeypatch.setitem(op._BACKENDS, "tpu", "tests.kernels.test_attention:broken")
    with pytest.raises(RuntimeError, match="a bug"):
        attention(q, k, v, **options)


def broken(*call):
    raise RuntimeError("a bug")


def zeros(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


VALID = {
    "q_BLHD": zeros(2, 6, 4, 8),
    "k_BSKD": zeros(2, 5, 2, 8),
    "v_BSKD": zeros(2, 5, 2, 8),
    "softmax_scale": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BLHD": zeros(6, 4, 8)}, r"q_BLHD: got \(6, 4, 8\), expected a non-empty"),
        ({"q_BLHD": zeros(2, 0, 4, 8)}, "q_BLHD: got .* expected a non-empty"),
        ({"q_BLHD": zeros(2, 6, 4, 8, dtype="int32")}, "q_BLHD: got int32, expected"),
        ({"k_BSKD": zeros(3, 5, 2, 8)}, r"k_BSKD: got .* with B=2, D=8"),
        ({"k_BSKD": zeros(2, 5, 3, 8)}, "k_BSKD: got K=3 heads, expected a divisor"),
        ({"v_BSKD": zeros(2, 4, 2, 8)}, "v_BSKD: got .* expected the shape of k"),
        ({"v_BSKD": zeros(2, 5, 2, 8, dtype="bfloat16")}, "v_BSKD: got bfloat16"),
        ({"slopes_H": zeros(2)}, r"slopes_H: got \(2,\), expected shape \(4,\)"),
        (
            {"slopes_H": zeros(4, dtype="int32")},
            "slopes_H: got int32, expected floating",
        ),
        ({"prefix_mask_BS": zeros(2, 5)}, "prefix_mask_BS: got float32, expected bool"),
        (
            {"q_offset": zeros(2, dtype="int32")},
            r"q_offset: got \(2,\), expected",
        ),
        ({"kv_offset": 0.5}, "kv_offset: got float32, expected integer"),
        ({"q_segment_ids_BL": zeros(2, 6, dtype="int32")}, "segment_ids: got one of"),
        (
            {"causal": False, "prefix_mask_BS": zeros(2, 5, dtype="bool")},
            "prefix_mask_BS: got a mask, expected None where causal=False",
        ),
        ({"softmax_scale": float("nan")}, "softmax_scale: got nan, expected a finite"),
        ({"window": -1}, "window: got -1, expected None or an int >= 0"),
        ({"window": 2.0}, "window: got 2.0, expected None or an int >= 0"),
        ({"logit_softcap": 0.0}, "logit_softcap: got 0.0, expected None or a number"),
        (
            {"dropout_rate": 1.0},
            r"dropout_rate: got 1.0, expected .* \[0, 1\)",
        ),
        ({"dropout_rate": 0.1}, "dropout_key: got None, expected a key"),
    ],
)
def test_attention_outside_its_contract_names_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**VALID, **changes})
