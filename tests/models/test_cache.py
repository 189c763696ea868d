"""The cache itself: slots do not touch each other, and its norms stay true bounds."""

import functools
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import partitioning
from mpt_jax.config import MeshConfig, ModelConfig, parse
from mpt_jax.kernels.decode import NORM_BLOCK
from mpt_jax.models import cache as caches
from mpt_jax.models import mpt, weights
from mpt_jax.models.packed import Int8, ThreePass

S, V, SLOTS = 2 * NORM_BLOCK, 40, 3
CFG = parse(ModelConfig, {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": S, "vocab_size": V,
    "compute_dtype": "float32",
    "attn_config": {
        "alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2,
    },
})  # fmt: skip
# float32, the same sums over other blocks.
REORDERED = {"rtol": 2e-5, "atol": 2e-5}
# float32 sums of 256 terms, relative to the sum of their sizes.
FLOAT32_SUM = 2e-6
# Rounding to 1/254 of each channel's largest weight, through two layers.
INT8_RELATIVE = 0.05

prefill = jax.jit(mpt.prefill, static_argnums=0, static_argnames="reach")
decode = jax.jit(mpt.decode, static_argnums=0)


@functools.cache
def params():
    return jax.jit(mpt.init, static_argnums=0)(CFG, jax.random.key(0))


@functools.cache
def serving_params():
    return weights.unstack(params())


def tokens(length, seed=1):
    return jax.random.randint(jax.random.key(seed), (length,), 0, V)


def full(ids):
    return jax.jit(mpt.hidden_states, static_argnums=0)(CFG, params(), ids[None])[0]


def filled(slot=1, length=100):
    cache = caches.make(CFG, SLOTS, S)
    return prefill(CFG, serving_params(), cache, tokens(length), slot=slot, start=0)[1]


def rows(cache, slot):
    return [np.asarray(a[slot]) for layer in cache for a in layer]


def test_chunks_and_single_tokens_equal_the_whole():
    ids = tokens(150)
    x_LE, cache = prefill(
        CFG, serving_params(), caches.make(CFG, SLOTS, S), ids[:64], slot=2, start=0,
        reach=NORM_BLOCK,
    )  # fmt: skip
    states = [x_LE]
    padded = jnp.pad(ids[64:145], (0, 47), constant_values=7)
    x_LE, cache = prefill(CFG, serving_params(), cache, padded, slot=2, start=64)
    states.append(x_LE[:81])
    for i in range(145, 150):
        batch = jnp.asarray([[0], [0], [ids[i]]])
        lengths = jnp.asarray([-1, -1, i])
        x_BLE, cache = decode(CFG, serving_params(), cache, batch, lengths)
        states.append(x_BLE[2])
    np.testing.assert_allclose(np.concatenate(states), full(ids), **REORDERED)


def test_a_slot_left_alone_and_one_outside_the_batch_keep_every_bit():
    cache = filled(slot=1)
    kept = rows(cache, 1)
    idle = jnp.asarray([[3], [4]]), jnp.asarray([5, -1])
    _, cache = decode(CFG, serving_params(), cache, *idle)
    _, cache = decode(
        CFG, serving_params(), cache, jnp.asarray([[3]]), jnp.asarray([6])
    )
    _, cache = prefill(CFG, serving_params(), cache, tokens(128), slot=2, start=0)
    for before, after in zip(kept, rows(cache, 1), strict=True):
        np.testing.assert_array_equal(before, after)


def test_tokens_beyond_the_capacity_are_dropped():
    cache = filled(slot=0, length=S)
    _, after = decode(
        CFG, serving_params(), cache, jnp.asarray([[3]]), jnp.asarray([S])
    )
    for one, other in zip(rows(cache, 0), rows(after, 0), strict=True):
        np.testing.assert_array_equal(one, other)


def test_copied_and_grown_slots_go_on_alike():
    ids = tokens(100)
    cache = caches.copy_slot(filled(slot=1), 1, 0)
    cache = caches.grow(cache, 2 * S)
    assert caches.capacity(cache) == 2 * S
    batch = jnp.full((2, 1), 5), jnp.asarray([100, 100])
    x_BLE, _ = decode(CFG, serving_params(), cache, *batch)
    np.testing.assert_array_equal(x_BLE[0], x_BLE[1])
    expected = full(jnp.append(ids, 5))[-1]
    np.testing.assert_allclose(x_BLE[0, 0], expected, **REORDERED)


def test_norms_bound_every_key_and_are_lowered_by_the_next_prompt():
    cache = filled(slot=1, length=S)
    for layer in cache:
        norm = np.linalg.norm(np.asarray(layer.k_BKSD, np.float64), axis=-1)
        largest = norm.reshape(*norm.shape[:2], -1, NORM_BLOCK).max(-1)
        np.testing.assert_allclose(layer.norms_BKJ[1], largest[1], rtol=1e-6)
    ids = tokens(NORM_BLOCK, seed=3)
    _, cache = prefill(CFG, serving_params(), cache, ids, slot=1, start=0)
    for layer in cache:
        assert not layer.norms_BKJ[1, :, 1].any()  # what stood there is forgotten


def test_bytes_and_capacity():
    cache = caches.make(CFG, SLOTS, S)
    assert caches.n_bytes(CFG, SLOTS, S) == sum(
        a.nbytes for a in jax.tree.leaves(cache)
    )
    with pytest.raises(ValueError, match="multiple of 128"):
        caches.make(CFG, SLOTS, S + 1)


def test_heads_are_sharded_like_the_model():
    mesh = partitioning.make_mesh(
        MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]
    )
    with partitioning.use(mesh, batch=(), length=()):
        cache = caches.make(CFG, SLOTS, S)
        assert cache[0].k_BKSD.sharding.spec[:2] == (None, "tensor")
        x_LE, _ = prefill(CFG, serving_params(), cache, tokens(64), slot=0, start=0)
    np.testing.assert_allclose(x_LE, full(tokens(64)), **REORDERED)


def test_consumed_stacks_are_freed():
    stacked = jax.tree.map(jnp.copy, params())
    unstacked = weights.unstack(stacked, consume=True)
    assert all(a.is_deleted() for a in jax.tree.leaves(stacked["blocks"]))
    for one, layer in enumerate(unstacked["blocks"]):
        jax.tree.map(
            lambda a, b, one=one: np.testing.assert_array_equal(a, b[one]),
            layer, params()["blocks"],
        )  # fmt: skip


def test_int8_rounds_every_matrix_to_its_channel():
    quantized = weights.quantize(serving_params())
    out = quantized["blocks"][0]["attn"]["out_proj"]["weight"]
    assert isinstance(out, Int8)
    w = np.asarray(serving_params()["blocks"][0]["attn"]["out_proj"]["weight"])
    assert out.scale.shape == w.shape[2:]
    values, scale = np.asarray(out.values), np.asarray(out.scale)[:, None, None]
    error = np.abs(values * scale - np.moveaxis(w, 2, 0))
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    n_bytes = sum(a.nbytes for a in jax.tree.leaves(quantized))
    assert n_bytes < 0.3 * sum(a.nbytes for a in jax.tree.leaves(params()))

    ids = tokens(64)
    x_LE, _ = prefill(CFG, quantized, caches.make(CFG, SLOTS, S), ids, slot=0, start=0)
    logits = mpt.logits(CFG, quantized, x_LE[None])
    exact = mpt.apply(CFG, params(), ids[None])
    assert np.linalg.norm(logits - exact) < INT8_RELATIVE * np.linalg.norm(exact)


def test_three_passes_lose_nothing_of_float32():
    """Against float64: as near as float32 with the same weights, far from bfloat16."""
    w = jax.random.normal(jax.random.key(0), (48, 256)).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (5, 256))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    got = jax.jit(lambda x: ThreePass.of(w, 1).matmul(x))(x)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64)).T
    assert (np.abs(got - exact) <= FLOAT32_SUM * size).all()
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(w).T
    assert (np.abs(rounded - exact) > FLOAT32_SUM * size).mean() > 0.5


@pytest.mark.parametrize(
    ("rows", "n"), [(1, 32), (2, 33), (9, 32), (64, 32)],
    ids=["pairs", "a pair left over", "no pairs", "many"],
)  # fmt: skip
def test_three_passes_keep_every_bit(rows, n):
    """Times the identity: each third has bits that nothing else has."""
    x = jax.random.normal(jax.random.key(2), (rows, n))
    eye = ThreePass.of(jnp.eye(n, dtype=jnp.bfloat16), 1)
    np.testing.assert_array_equal(jax.jit(eye.matmul)(x), x)


def test_a_bfloat16_checkpoint_computes_the_same_in_three_passes():
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), serving_params())
    packed = weights.three_pass(rounded)
    assert isinstance(packed["blocks"][1]["ffn"]["up_proj"]["weight"], ThreePass)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
    ids, both = tokens(65), []
    for one in (wide, packed):
        cache = caches.make(CFG, SLOTS, S)
        x_LE, cache = prefill(CFG, one, cache, ids[:64], slot=0, start=0)
        x_11E, _ = decode(CFG, one, cache, ids[None, 64:], jnp.array([64]))
        states = jnp.concatenate([x_LE[None], x_11E], axis=1)  # many rows, and few
        both.append(mpt.logits(CFG, one, states))
    np.testing.assert_allclose(*both, **REORDERED)


def test_settling_changes_no_bit_and_frees_what_it_copied():
    params = {"a": jnp.arange(7.0), "b": (jnp.ones((3, 5), jnp.bfloat16), jnp.int8(3))}
    want, old = jax.tree.map(np.asarray, params), jax.tree.leaves(params)
    devices = jax.devices()[:2]
    spread = jax.device_put(
        jnp.arange(8), jax.NamedSharding(jax.make_mesh((2,), ("x",), devices=devices),
                                         jax.P("x"))
    )  # fmt: skip
    got = weights.settle({**params, "c": spread})
    assert got.pop("c") is spread
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert all(a.is_deleted() for a in old)
        first, *rest = (a.unsafe_buffer_pointer() for a in jax.tree.leaves(got))
        assert all(0 < p - first < 4096 and p % 64 == 0 for p in rest)  # no more copies
