"""Decode attention cut over slots and heads gives what it gives in one piece."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from mpt_jax.kernels import sharded_decode as module
from mpt_jax.kernels.attention import Rule
from mpt_jax.kernels.decode import key_norms
from mpt_jax.kernels.sharded import Layout
from mpt_jax.kernels.sharded_decode import sharded_decode
from tests.kernels import suite
from tests.kernels.test_decode import gpu, inputs, oracle, xla
from tests.kernels.test_sharded import mesh_of

RULE = Rule(0.3, window=200)
LENGTHS = (300, 1, 170, 260)


@pytest.mark.parametrize("attend", [xla, gpu], ids=["xla", "gpu"])
@pytest.mark.parametrize(("K", "slots"), [(1, ("data",)), (2, ())])
def test_a_part_per_device_matches_float64(attend, K, slots, monkeypatch):
    """The interpreted Triton kernel, too, which XLA could not cut by itself."""
    monkeypatch.setattr(module, "decode_attention", attend)
    q, k, v, lengths_B, slopes_H = inputs(K=K, lengths=LENGTHS)
    if not slots:  # a bucket of the lowest slots of a larger cache
        k, v = (jnp.concatenate([a, a[:1]]) for a in (k, v))
    mesh = mesh_of(data=2, tensor=2)
    layout = Layout(slots, (), ("tensor",), ("tensor",) if K > 1 else ())
    run = functools.partial(sharded_decode, mesh=mesh, layout=layout, rule=RULE)
    norms = key_norms(jnp.nan_to_num(k))
    got = jax.jit(run)(q, k, v, lengths_B, slopes_H, key_norms_BKJ=norms)
    want = oracle(q, k[:4], v[:4], lengths_B, slopes_H, RULE)
    suite.assert_close(got, want, suite.FORWARD_RTOL["float32"], f"K={K}")


def test_nothing_is_communicated():
    q, k, v, lengths_B, slopes_H = inputs(lengths=LENGTHS)
    mesh = mesh_of(data=4, tensor=2)
    layout = Layout(("data",), (), ("tensor",), ("tensor",))

    def run(q, k, v, norms):
        return sharded_decode(
            q, k, v, lengths_B, slopes_H, key_norms_BKJ=norms,
            mesh=mesh, layout=layout, rule=RULE, implementation="xla",
        )  # fmt: skip

    def put(a, *spec):
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(a, jax.NamedSharding(mesh, spec))

    cache = [put(a, "data", "tensor") for a in (k, v, key_norms(k))]
    lowered = jax.jit(run).lower(put(q, "data", None, "tensor"), *cache)
    text = lowered.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_slots_that_are_cut_must_match():
    q, k, v, lengths_B, slopes_H = inputs(lengths=LENGTHS)
    with pytest.raises(ValueError, match="got 2 rows, expected the 4 of the cache"):
        sharded_decode(
            q[:2], k, v, lengths_B[:2], slopes_H,
            mesh=mesh_of(data=2), layout=Layout(("data",)), rule=RULE,
        )  # fmt: skip
