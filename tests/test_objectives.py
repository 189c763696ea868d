"""The chunked loss against the plain formula in float64, and its sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import partitioning
from mpt_jax.config import MeshConfig
from mpt_jax.objectives import next_token_loss

B, L, E, V = 4, 12, 8, 30
# float32 sums of B * L terms against float64.
F32 = {"rtol": 2e-6, "atol": 2e-6}


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (B, L, E))
    head = jax.random.normal(keys[1], (V, E))
    tokens = jax.random.randint(keys[2], (B, L), 0, V)
    mask = jax.random.bernoulli(keys[3], 0.7, (B, L)).astype(jnp.int32)
    return hidden, head, tokens, mask


def reference(hidden, head, tokens, mask, *, scale=1.0, cap=None, z_loss=0.0):
    """Sum over l of mask[l+1] * (-log p(tokens[l+1]) + z_loss * log(Z)^2), float64."""
    logits = scale * np.einsum("ble,ve->blv", np.float64(hidden), np.float64(head))
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    log_z = np.log(np.exp(logits).sum(-1))
    ce = z = 0.0
    for b in range(B):
        for i in range(L - 1):
            ce += mask[b, i + 1] * (log_z[b, i] - logits[b, i, tokens[b, i + 1]])
            z += mask[b, i + 1] * log_z[b, i] ** 2
    return ce + z_loss * z, ce, z, mask[:, 1:].sum()


OPTIONS = [
    {},
    {"logit_scale": 0.3},
    {"logit_softcap": 2.0},
    {"z_loss": 0.01},
    {"logit_scale": 0.5, "logit_softcap": 3.0, "z_loss": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [5, 48])
def test_sums_are_the_formula(options, chunk_tokens):
    args = inputs()
    got = next_token_loss(*args, chunk_tokens=chunk_tokens, **options)
    expected = reference(
        *map(np.asarray, args),
        scale=options.get("logit_scale", 1.0),
        cap=options.get("logit_softcap"),
        z_loss=options.get("z_loss", 0.0),
    )
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [7, 48])
def test_gradients_are_those_of_the_plain_loss(options, chunk_tokens):
    hidden, head, tokens, mask = inputs()

    def plain(hidden, head):
        logits = options.get("logit_scale", 1.0) * hidden @ head.T
        if cap := options.get("logit_softcap"):
            logits = cap * jnp.tanh(logits / cap)
        log_z = jax.nn.logsumexp(logits, -1)[:, :-1]
        at = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(
            mask[:, 1:] * (log_z - at + options.get("z_loss", 0.0) * log_z**2)
        )

    def ours(hidden, head):
        sums = next_token_loss(
            hidden, head, tokens, mask, chunk_tokens=chunk_tokens, **options
        )
        return 3 * sums.total  # the cotangent is used

    expected = jax.grad(plain, (0, 1))(hidden, head)
    got = jax.grad(ours, (0, 1))(hidden, head)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a / 3, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_shards_do_not_change_the_sums(sizes):
    args = inputs()
    loss = jax.value_and_grad(
        lambda h, w: next_token_loss(h, w, *args[2:], chunk_tokens=5).total, (0, 1)
    )
    expected = loss(*args[:2])
    with partitioning.use(partitioning.make_mesh(MeshConfig(**sizes))):
        got = jax.jit(loss)(*args[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                 got, expected)  # fmt: skip


def test_no_array_of_all_logits_exists():
    """Peak temporaries stay far under B * L * V floats, forward and backward."""
    b, length, vocab, width = 4, 512, 4096, 32
    shapes = [(b, length, width), (vocab, width)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    args += [jax.ShapeDtypeStruct((b, length), jnp.int32)] * 2
    grad = jax.grad(lambda *a: next_token_loss(*a, chunk_tokens=128).total, (0, 1))
    temporary = jax.jit(grad).lower(*args).compile().memory_analysis()
    assert temporary.temp_size_in_bytes < 4 * b * length * vocab / 4


def test_an_id_zero_is_learned_like_any_other():
    hidden, head, _, _ = inputs()
    ones = jnp.ones((B, L), jnp.int32)
    sums = next_token_loss(hidden, head, jnp.zeros((B, L), jnp.int32), ones)
    assert sums.weight == B * (L - 1)


def test_shapes_are_checked():
    hidden, head, tokens, mask = inputs()
    with pytest.raises(ValueError, match="must match hidden_BLE"):
        next_token_loss(hidden, head, tokens[:, 1:], mask)


def test_bfloat16_hidden_states_give_float32_sums():
    hidden, head, tokens, mask = inputs()
    full = next_token_loss(hidden, head, tokens, mask)
    half = next_token_loss(hidden.astype(jnp.bfloat16), head, tokens, mask)
    assert half.total.dtype == jnp.float32
    np.testing.assert_allclose(half.ce, full.ce, rtol=1e-2)  # 8 bits of mantissa
