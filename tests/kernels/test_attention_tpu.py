"""The TPU kernel against the shared suite, interpreted on the CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.kernels.attention_tpu import attention_tpu
from mpt_jax.kernels.tiles import TPU, TpuTiles
from tests.kernels import suite
from tests.kernels.suite import Case, arrays, call

MIB = 2**20
# The smallest tile that whole registers allow: 130 tokens cross a tile and pad one.
SMALL = TpuTiles((128, 128), (128, 128), 8 * MIB, 16 * MIB)
# Memory for one tile: every chunk is a tile, and dk and dv are summed in HBM.
CHUNKED = TpuTiles((128, 128), (128, 128), 1, 16 * MIB)
LARGE = TpuTiles((512, 512), (512, 512), 64 * MIB, 128 * MIB)
BOTH_WAYS = pytest.mark.parametrize(
    "tiles",
    [pytest.param(SMALL, id="resident", marks=pytest.mark.slow),
     pytest.param(CHUNKED, id="chunked")],
)  # fmt: skip
# Two paths to one result: float32 sums of other lengths and orders.
SAME_RTOL = 2e-6
EPS = 2.0**-24  # "auto" leaves rows of four tiles alone
QUICK = {"gqa_bf16", "mha_bf16_head_112", "everything"}


class TestTpu(suite.AttentionSuite):
    @staticmethod
    def attend(q, k, v, **options):
        tiles = SMALL if k.shape[1] < 1000 else LARGE
        return call(attention_tpu, q, k, v, tiles=tiles, interpret=True, **options)

    @pytest.mark.parametrize(
        "case",
        [c if c.name in QUICK else pytest.param(c, marks=pytest.mark.slow)
         for c in suite.CASES],
        ids=lambda case: case.name,
    )  # fmt: skip
    def test_outputs_and_gradients_match_float64(self, case):
        self.check(case)

    def test_dropout_drops_weights_and_its_gradient_is_that_of_the_mask(self):
        (q, k, v, *_), options = arrays(Case("dropout", L=2))
        with pytest.raises(NotImplementedError, match="no dropout; use 'xla'"):
            self.attend(q, k, v, dropout_rate=0.5, **options)

    def test_dropout_averages_to_no_dropout_over_keys(self):
        pytest.skip("no dropout in this kernel")


LONG = (
    Case("causal", L=400, H=2),
    Case("packed_mqa", L=400, H=2, K=1, packed=True, prefix=True),
    Case("window", L=400, H=2, options={"window": 200}),
    Case("bidirectional", L=400, H=2, options={"causal": False, "window": 130}),
    Case("later_rows", L=150, S=400, H=2, options={"q_offset": 300, "kv_offset": 50}),
)


@BOTH_WAYS
@pytest.mark.parametrize(
    "case",
    [c if c.name == "packed_mqa" else pytest.param(c, marks=pytest.mark.slow)
     for c in LONG],
    ids=lambda case: case.name,
)  # fmt: skip
def test_rows_of_several_tiles_match_float64(case, tiles):
    """Four tiles a row: pairs, odd ones, tiles before and after those that hide."""

    class Long(suite.AttentionSuite):
        attend = staticmethod(
            functools.partial(call, attention_tpu, tiles=tiles, interpret=True)
        )

    Long().check(case)


def steep(**options) -> tuple:
    """512 tokens; head 0 forgets within 30, head 1 in 240, head 2 never."""
    tensors, rest = arrays(Case("steep", L=512, H=3, D=32))
    rest["slopes_H"] = jnp.asarray([1.0, 0.125, 2.0**-8], jnp.float32)
    return tensors, rest | options


def run(tensors, options, tiles=SMALL):
    q, k, v, dout, dlse = tensors

    @jax.jit
    def both(q, k, v):
        results, pull = jax.vjp(
            lambda *a: call(attention_tpu, *a, tiles=tiles, interpret=True, **options),
            q, k, v,
        )  # fmt: skip
        return *results, *pull((dout, dlse))

    return both(q, k, v)


def test_skipping_changes_nothing_that_float32_shows():
    tensors, options = steep()
    full = run(tensors, options | {"skip": "off"})
    skipped = run(tensors, options | {"skip": EPS})
    largest = float(jnp.abs(tensors[2]).max())
    np.testing.assert_allclose(skipped[0], full[0], rtol=0, atol=2**-22 * largest)
    for got, want in zip(skipped, full, strict=True):
        suite.assert_close(got, want, SAME_RTOL, "skipped")
    for got, want in zip(full, suite.oracle(tensors, options), strict=True):
        suite.assert_close(got, want, suite.GRADIENT_RTOL["float32"], "off")


@BOTH_WAYS
def test_tiles_that_cannot_matter_are_not_visited(tiles):
    """NaNs in v there would spoil output and gradients even with weight 0."""
    (q, k, v, dout, dlse), options = steep()
    last = np.s_[:, 384:]
    options["q_offset"] = 384
    tensors = q[last], k, v.at[:, :256, 0].set(jnp.nan), dout[last], dlse[last]
    for got in run(tensors, options | {"skip": EPS}, tiles):  # head 0 has erased them
        assert jnp.isfinite(got).all()
    out = run(tensors, options | {"skip": "off"}, tiles)[0]
    assert jnp.isnan(out[:, :, 0]).all()

    options["q_offset"] = 128
    tensors = q[last], k, v.at[:, 256:].set(jnp.nan), dout[last], dlse[last]
    for got in run(tensors, options, tiles):  # they lie ahead
        assert jnp.isfinite(got).all()


def test_slopes_are_constants_to_the_gradient():
    (q, k, v, *_), options = arrays(Case("slopes", L=8))

    def loss(slopes_H):
        options["slopes_H"] = slopes_H
        return call(
            attention_tpu, q, k, v, tiles=SMALL, interpret=True, **options
        )[0].sum()  # fmt: skip

    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(options["slopes_H"]), 0)


def test_a_device_that_is_no_tpu_is_refused():
    (q, k, v, *_), options = arrays(Case("cpu", L=2))
    with pytest.raises(NotImplementedError, match="the device is 'cpu', expected one"):
        call(attention_tpu, q, k, v, **options)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_dtypes_without_a_kernel_are_refused(dtype):
    (q, k, v, *_), options = arrays(Case("dtype", L=2, dtype=dtype))
    with pytest.raises(NotImplementedError, match=f"has no {dtype}; use 'xla'"):
        call(attention_tpu, q, k, v, tiles=SMALL, interpret=True, **options)


def test_tiles_are_whole_registers_and_leave_memory():
    for kind, tiles in TPU.items():
        assert all(n % 128 == 0 for n in (*tiles.forward, *tiles.backward)), kind
        assert tiles.resident_bytes < tiles.vmem_bytes, kind
