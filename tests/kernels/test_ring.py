"""Rows cut over devices: what goes round a ring gives what one device gives."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mpt_jax.kernels import attention, attention_gpu, attention_tpu, ring
from mpt_jax.kernels.attention import RESIDUAL_NAMES, Operands, Rule
from mpt_jax.kernels.sharded import Layout, sharded_attention
from tests.kernels import suite
from tests.kernels.suite import Case, arrays

EPS = 2.0**-24
# Half a unit of bfloat16 for each visit that a row merges, and for the sum.
BF16_RTOL = {"out": 8e-3, "grads": 2e-2}


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: math.prod(sizes.values())]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices
    )


def layout_on(mesh: jax.sharding.Mesh, kv_heads: int) -> Layout:
    data, heads = (
        tuple(a for a in (n,) if a in mesh.shape) for n in ("data", "tensor")
    )
    context = ("context",)
    return Layout(data, context, heads, heads if kv_heads > 1 else (), context)


def around(mesh, tensors, options):
    """(out, lse, dq, dk, dv) of attention cut over ``mesh``."""
    q, k, v, dout, dlse = tensors
    layout = layout_on(mesh, k.shape[2])

    @jax.jit
    def run(q, k, v, dout, dlse):
        results, pull = jax.vjp(
            lambda *a: sharded_attention(
                *a, mesh=mesh, layout=layout, return_lse=True, **options
            ),
            q, k, v,
        )  # fmt: skip
        return *results, *pull((dout, dlse))

    return run(q, k, v, dout, dlse)


def assert_exact(got, tensors, options, what="", rtol=None):
    want = suite.oracle(tensors, options)
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        kind = "out" if name in ("out", "lse") else "grads"
        limit = rtol[kind] if rtol else suite.GRADIENT_RTOL["float32"]
        suite.assert_close(g, w, limit, f"{what} {name}")


CASES = {
    # Zig-zag: every head goes all the way.
    "far": (Case("far", L=32, B=2), {"context": 8}),
    # An odd length has no halves; without slopes nothing ever ends early.
    "odd": (Case("odd", L=28, slopes=False), {"context": 4}),
    # Documents decide how far keys go; keys are fewer than queries and travel.
    "gqa": (
        Case("gqa", L=32, B=2, K=2, packed=True, options={"skip": EPS}),
        {"data": 2, "tensor": 2, "context": 2},
    ),
    "mqa": (
        Case("mqa", L=32, K=1, packed=True,
             options={"window": 9, "logit_softcap": 3.0}),
        {"tensor": 2, "context": 4},
    ),
    "prefix": (Case("prefix", L=32, prefix=True, packed=True), {"context": 4}),
    "both_ways": (
        Case("both_ways", L=32, K=2, options={"causal": False, "window": 13}),
        {"context": 4},
    ),
    "nothing_beyond": (Case("nothing", L=32, options={"window": 0}), {"context": 4}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "mqa" else n for n in CASES],
)
def test_a_ring_matches_float64(name):
    case, sizes = CASES[name]
    tensors, options = arrays(case)
    assert_exact(around(mesh_of(**sizes), tensors, options), tensors, options, name)


@pytest.mark.slow
def test_bfloat16_rounds_each_visit_once():
    tensors, options = arrays(Case("bf16", L=64, B=2, D=32, dtype="bfloat16"))
    got = around(mesh_of(context=4), tensors, options)
    assert_exact(got, tensors, options, rtol=BF16_RTOL)
    assert got[0].dtype == got[2].dtype == got[3].dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def four_slopes():
    """Heads that need one hop, more, and all; rows of the batch that differ widely."""
    tensors, options = arrays(Case("steep", L=256, B=2))
    tensors[0] = tensors[0].at[1].multiply(0.01)
    options |= {"slopes_H": jnp.asarray([4.0, 1.0, 0.2, 1e-3]), "skip": EPS}
    return tensors, options


def hops_of(mesh, tensors, options):
    q, k, *_ = tensors
    rule = Rule(options["softmax_scale"], skip=options["skip"])
    x = Operands(options["slopes_H"], options.get("ids"), options.get("ids"))

    def local(q, k, x):
        names = mesh.axis_names
        made = ring._Ring(rule, "context", mesh.shape["context"], names, "xla", 4, EPS)
        return ring._hops(made, q, k, x)

    data = "data" if "data" in mesh.shape else None
    rows = P(data, "context")
    specs = rows, rows, Operands(P(), rows, rows, None, P(), P(), None)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
    )
    return np.asarray(jax.jit(run)(q, k, x)).tolist()


def test_each_head_goes_as_far_as_its_bias_lets_it_matter(four_slopes):
    tensors, options = four_slopes
    mesh = mesh_of(data=2, context=4)
    hops = hops_of(mesh, tensors, options)
    assert hops == [1, 1, 3, 3]
    assert_exact(around(mesh, tensors, options), tensors, options)
    # One device's large queries make every device send more.
    tensors = [tensors[0].at[0, 200, 0].multiply(400), *tensors[1:]]
    assert hops_of(mesh, tensors, options) == [3, 1, 3, 3]


def test_what_is_no_number_is_sent(four_slopes):
    tensors, options = four_slopes
    tensors = [tensors[0].at[0, 7, 1, 0].set(jnp.nan), *tensors[1:]]
    mesh = mesh_of(context=4)
    assert hops_of(mesh, tensors, options) == [1, 3, 3, 3]
    tensors[1] = tensors[1].at[1, 255, 0, 0].set(jnp.inf)
    assert hops_of(mesh, tensors, options) == [3, 3, 3, 3]


def test_documents_end_the_round(four_slopes):
    tensors, options = four_slopes
    ends = np.asarray([[60, 130, 250], [64, 128, 192]])
    ids_BL = 1 + (np.arange(256)[None, :, None] >= ends[:, None]).sum(-1)
    ids_BL[:, 250:] = 0  # padding is nobody's
    options = options | {"ids": jnp.asarray(ids_BL, jnp.int32)}
    assert hops_of(mesh_of(context=4), tensors, options) == [1, 1, 2, 2]
    alone = [t[1:] for t in tensors]
    options["ids"] = options["ids"][1:]
    assert hops_of(mesh_of(context=4), alone, options) == [0, 0, 0, 0]


def test_keys_left_at_home_have_less_than_eps(four_slopes):
    """The rule, beside an exact count: the mass beyond the reach of each head."""
    (q, k, *_), options = four_slopes
    rule = Rule(options["softmax_scale"], skip=EPS)
    x = Operands(options["slopes_H"])

    def local(q, k):
        return ring._reach(ring._Ring(rule, "i", 1, ("i",), "xla", 1, EPS), q, k, x)

    reach_H = jax.vmap(local, axis_name="i")(q[None], k[None])[0]
    i, j = np.arange(256)[:, None], np.arange(256)[None]
    logits = np.einsum("blhd,bshd->bhls", q, k).astype(float) * rule.softmax_scale
    logits -= np.asarray(x.slopes_H)[:, None, None] * (i - j)
    logits = np.where(j <= i, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    share = weights / weights.sum(-1, keepdims=True)
    beyond = (i - j)[None] > np.asarray(reach_H)[:, None, None]
    assert beyond[0].any()
    assert (share * beyond).sum(-1).max() <= EPS
    # Not idle: a third of it would already leave too much at home.
    near = (i - j)[None] > np.asarray(reach_H)[:, None, None] / 3
    assert (share * near).sum(-1)[:, 0].max() > EPS


def compiled(size, length, *, ids=False, checkpoint=None):
    mesh, layout = mesh_of(context=size), layout_on(mesh_of(context=size), 4)
    options = {"softmax_scale": 0.25, "slopes_H": 2.0 ** -jnp.arange(1.0, 5)}
    options["skip"] = "off"
    wrap = jax.checkpoint if checkpoint is None else checkpoint

    def loss(q, k, v, ids_BL):
        given = {"q_segment_ids_BL": ids_BL, "kv_segment_ids_BS": ids_BL} if ids else {}
        call = functools.partial(
            sharded_attention, mesh=mesh, layout=layout, **options, **given
        )
        return wrap(lambda *a: call(*a).astype(jnp.float32).sum())(q, k, v)

    def put(*shape, dtype=jnp.float32):
        where = jax.NamedSharding(mesh, P(None, "context"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    tensor, row = put(1, length, 4, 16), put(1, length, dtype=jnp.int32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return step.lower(tensor, tensor, tensor, row)


@pytest.mark.slow
def test_keys_move_by_permutation_and_are_never_gathered():
    text = compiled(4, 64, ids=True).compile().as_text()
    assert "collective-permute" in text
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    # The least and greatest document of each part: 2 numbers of each device.
    assert all("s32[4,1]" in line or "s32[2,4,1]" in line for line in gathered)
    assert " all-to-all(" not in text


@pytest.mark.slow
def test_memory_falls_with_the_number_of_devices():
    """Forward and backward hold two parts of the keys, not all."""
    length = 65_536
    temp = {
        n: compiled(n, length).compile().memory_analysis().temp_size_in_bytes
        for n in (2, 8)
    }
    assert temp[8] < 0.35 * temp[2]


def test_a_remat_policy_saves_the_residuals_of_a_ring():
    def products(wrap):
        return compiled(4, 32, checkpoint=wrap).as_text().count("dot_general")

    save = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    forget = jax.checkpoint_policies.nothing_saveable
    once = products(lambda f: f)
    assert products(functools.partial(jax.checkpoint, policy=save)) == once
    assert products(functools.partial(jax.checkpoint, policy=forget)) > once


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_the_kernels_go_round_too(name, monkeypatch):
    """Interpreted, with their own skipping, both layouts and all gradients."""
    module = {"tpu": attention_tpu, "gpu": attention_gpu}[name]
    given = {"interpret": True}
    if name == "tpu":
        given["tiles"] = attention_tpu.TPU["TPU v5 lite"]
    for table in (attention._BACKENDS, attention._GRADIENTS):
        function = table[name].split(":")[1]
        interpreted = functools.partial(getattr(module, function), **given)
        monkeypatch.setattr(module, function, interpreted)
    case = Case("kernels", L=64, H=2, D=32, packed=True, options={"skip": EPS})
    tensors, options = arrays(case)
    options |= {"slopes_H": jnp.asarray([3.0, 1e-3]), "implementation": name}
    got = around(mesh_of(context=2), tensors, options)
    del options["implementation"]
    assert_exact(got, tensors, options, name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout_rate": 0.5}, "no dropout"),
        ({"q_offset": 3}, "without offsets"),
        ({"implementation": "reference"}, "use 'xla'"),
    ],
)
def test_what_a_ring_cannot_is_refused(given, message):
    (q, k, v, *_), options = arrays(Case("refused", L=8))
    mesh = mesh_of(context=2)
    with pytest.raises(NotImplementedError, match=message):
        sharded_attention(
            q, k, v, mesh=mesh, layout=layout_on(mesh, 4), **options, **given
        )


def test_keys_cut_otherwise_than_queries_are_refused():
    (q, k, v, *_), options = arrays(Case("refused", L=8))
    layout = Layout(kv_length=("context",))
    with pytest.raises(ValueError, match="expected the same one axis"):
        sharded_attention(q, k, v, mesh=mesh_of(context=2), layout=layout, **options)
