"""Attention cut over batch, queries and heads gives what it gives in one piece."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from mpt_jax.kernels.attention import RESIDUAL_NAMES
from mpt_jax.kernels.sharded import Layout, sharded_attention
from tests.kernels import suite
from tests.kernels.suite import Case, arrays


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


@pytest.mark.parametrize(("K", "traced_offset"), [(1, True), (2, False)])
def test_a_part_per_device_matches_float64(K, traced_offset):
    case = Case(
        "sharded", L=32, S=48, B=4, K=K, packed=True, prefix=True,
        options={"q_offset": 21, "kv_offset": 5},
    )  # fmt: skip
    tensors, options = arrays(case)
    layout = Layout(("data",), ("context",), ("tensor",), ("tensor",) if K > 1 else ())
    mesh = mesh_of(data=2, context=2, tensor=2)

    @jax.jit
    def run(q, k, v, dout, dlse, offset):
        given = options | ({"q_offset": offset} if traced_offset else {})
        results, pull = jax.vjp(
            lambda *a: sharded_attention(
                *a, mesh=mesh, layout=layout, return_lse=True, **given
            ),
            q, k, v,
        )  # fmt: skip
        return *results, *pull((dout, dlse))

    got = run(*tensors, jnp.int32(21))
    for g, w in zip(got, suite.oracle(tensors, options), strict=True):
        suite.assert_close(g, w, suite.GRADIENT_RTOL["float32"], f"K={K}")


def test_forward_communicates_nothing():
    (q, k, v, *_), options = arrays(Case("silent", L=32, B=4))
    mesh, layout = mesh_of(data=4, tensor=2), Layout(("data",), (), *[("tensor",)] * 2)

    def run(q, k, v):
        return sharded_attention(q, k, v, mesh=mesh, layout=layout, **options)

    spec = jax.sharding.PartitionSpec("data", None, "tensor")
    put = (jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (q, k, v))
    text = jax.jit(run).lower(*put).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_remat_policy_still_saves_the_residuals():
    (q, k, v, *_), options = arrays(Case("remat", L=64, B=2))
    mesh, layout = mesh_of(data=2), Layout(("data",))

    def products(wrap):
        loss = wrap(
            lambda *a: sharded_attention(*a, mesh=mesh, layout=layout, **options).sum()
        )
        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v).as_text()
        return text.count("dot_general")

    save = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    forget = jax.checkpoint_policies.nothing_saveable
    once = products(lambda f: f)
    assert products(lambda f: jax.checkpoint(f, policy=save)) == once
    assert products(lambda f: jax.checkpoint(f, policy=forget)) > once


def test_dropout_is_refused():
    (q, k, v, *_), options = arrays(Case("dropout", L=2))
    with pytest.raises(NotImplementedError, match="no dropout"):
        sharded_attention(
            q, k, v, mesh=mesh_of(data=1), layout=Layout(), dropout_rate=0.5, **options
        )
