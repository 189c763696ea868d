"""Properties of the model: who may influence whom, and what may not change anything."""

import collections
import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax import partitioning, presets
from mpt_jax.config import ModelConfig, parse
from mpt_jax.models import mpt
from mpt_jax.models.layers import dropout

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "params"
L, V = 12, 40
# float32, the same sums in another order (scanned or not, recomputed or not).
REORDERED = {"rtol": 2e-5, "atol": 2e-5}


def small(**fields) -> ModelConfig:
    base = {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "vocab_size": V,
        "compute_dtype": "float32", "attn_config": {"alibi": True},
    }  # fmt: skip
    return parse(ModelConfig, {**base, **fields})


# Compiled whole: op by op, compiling takes ten times as long.
apply = jax.jit(mpt.apply, static_argnums=0)
hidden_states = jax.jit(mpt.hidden_states, static_argnums=0)


@functools.cache
def init(cfg: ModelConfig):
    return jax.jit(mpt.init, static_argnums=0)(cfg, jax.random.key(0))


def tokens(seed=0, batch=2):
    return jax.random.randint(jax.random.key(seed), (batch, L), 0, V)


def influence(cfg, **kwargs):
    """(L, L): how much the embedding at j moves the hidden state at i."""
    params = init(cfg)
    ids = jnp.arange(L)[None]  # every position its own row of wte
    probe = jax.random.normal(jax.random.key(2), (cfg.d_model,))

    def state(table, i):
        with_table = params | {"wte": {"weight": table}}
        return mpt.hidden_states(cfg, with_table, ids, **kwargs)[0, i] @ probe

    # Row by row: jacrev, a vmap of the reversed scan, is wrong on jax 0.10.2's CPU.
    row = jax.jit(jax.grad(state))
    gradients = [row(params["wte"]["weight"], i)[:L] for i in range(L)]
    return jnp.abs(jnp.stack(gradients)).sum(2)


ATTENTION = {
    "alibi": {"alibi": True},
    "learned": {},
    "mqa": {"alibi": True, "attn_type": "multiquery_attention"},
    "gqa": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "window": {"alibi": True, "sliding_window_size": 3},
    "qk_ln": {"alibi": True, "qk_ln": True},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_causality_by_gradients(name):
    seen = influence(small(attn_config=ATTENTION[name]))
    assert np.all(np.diag(seen) > 0)
    assert np.all(np.triu(seen, 1) == 0)
    below = np.tril(np.ones((L, L), bool), -1)
    if name == "window":  # two layers of 3 reach back 6
        below &= np.abs(np.subtract.outer(range(L), range(L))) <= 6
        assert np.all(np.asarray(seen)[~below & np.tri(L, k=-1, dtype=bool)] == 0)
    assert np.all(np.asarray(seen)[below] > 0)


def test_packed_documents_do_not_see_each_other():
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
    cfg = small(attn_config={"alibi": True, "attn_uses_sequence_id": True})
    seen = np.asarray(influence(cfg, segment_ids_BL=segments))
    same = np.equal.outer(segments[0], segments[0])
    assert np.all(seen[~same] == 0)
    assert np.all(seen[same & np.tri(L, dtype=bool)][: 15 + 10] > 0)
    # With attn_uses_sequence_id off, as MPT was pretrained, only padding is hidden.
    loose = np.asarray(influence(small(), segment_ids_BL=segments))
    np.testing.assert_allclose(loose[:9], influence(small())[:9], **REORDERED)
    assert np.all(loose[9:, :9] == 0)


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(alibi, side):
    cfg = small(attn_config={"alibi": alibi})
    params, ids = init(cfg), tokens()
    widths = ((0, 0), (4, 0) if side == "left" else (0, 4))
    real = slice(4, None) if side == "left" else slice(L)
    padded = apply(
        cfg,
        params,
        jnp.pad(ids, widths, constant_values=7),
        segment_ids_BL=jnp.pad(jnp.ones_like(ids), widths),
    )
    expected = apply(cfg, params, ids)
    np.testing.assert_allclose(padded[:, real], expected, **REORDERED)


def test_prefix_tokens_see_each_other():
    prefix = jnp.arange(L)[None] < 5
    cfg = small(attn_config={"alibi": True, "prefix_lm": True})
    seen = np.asarray(influence(cfg, prefix_mask_BL=prefix))
    allowed = np.tri(L, dtype=bool) | np.asarray(prefix)
    assert np.all((seen > 0) == allowed)


def test_a_packed_document_is_computed_as_if_alone():
    cfg = small(attn_config={"alibi": True, "attn_uses_sequence_id": True})
    params, ids = init(cfg), tokens()
    segments = jnp.asarray([[1] * 7 + [2] * 5] * 2)
    packed = apply(cfg, params, ids, segment_ids_BL=segments)
    alone = apply(cfg, params, ids[:, 7:])
    np.testing.assert_allclose(packed[:, 7:], alone, **REORDERED)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [("attention", True), ("dots", True), ("full", True), ("none", False),
     ("attention", False)],
)  # fmt: skip
def test_remat_and_scan_change_nothing(remat, scan_layers):
    def loss(params, cfg):
        return jnp.sum(jnp.square(mpt.apply(cfg, params, tokens())))

    cfg = small()
    params = init(cfg)
    other = dataclasses.replace(cfg, remat=remat, scan_layers=scan_layers)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected, got = (grad(params, c) for c in (cfg, other))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / scale, b / scale, **REORDERED),
        expected,
        got,
    )


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        # In and out of two norms; q, k, v and what attention gave; FFN before its act.
        ({"remat": "none"}, {"stream": 4, "heads": 4, "lse": 1, "mlp": 1}),
        ({"remat": "none", "ffn_config": {"ffn_type": "mptglu"}},
         {"stream": 4, "heads": 4, "lse": 1, "mlp": 2}),
        ({"remat": "full"}, {"stream": 1}),
    ],
)  # fmt: skip
def test_what_the_backward_keeps_of_a_layer(fields, kept):
    def residuals(n_layers):
        cfg = small(scan_layers=False, n_layers=n_layers, **fields)
        backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: mpt.hidden_states(cfg, p, tokens()), p)[1],
            mpt.abstract_params(cfg),
        )
        return cfg, collections.Counter(x.shape for x in jax.tree.leaves(backward))

    (cfg, one), (_, two) = residuals(1), residuals(2)
    B, L = tokens().shape
    names = {
        (B, L, cfg.d_model): "stream", (B, L, cfg.n_heads, cfg.d_head): "heads",
        (B, L, cfg.n_heads): "lse", (B, L, cfg.d_mlp): "mlp",
    }  # fmt: skip
    got = {names.get(s, s): n for s, n in (two - one).items() if s[:2] == (B, L)}
    assert got == kept


def test_embedding_fraction_scales_the_lookup_gradient_only():
    def loss(params, cfg):
        return jnp.sum(jnp.sin(mpt.hidden_states(cfg, params, tokens())))

    whole, tenth = small(), small(embedding_fraction=0.1)
    params = init(whole)
    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (loss_a, a), (loss_b, b) = grad(params, whole), grad(params, tenth)
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
    np.testing.assert_allclose(
        0.1 * a["wte"]["weight"], b["wte"]["weight"], rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
        a["norm_f"]["weight"], b["norm_f"]["weight"], rtol=1e-3, atol=1e-5
    )


def test_pad_row_starts_at_zero_and_gets_no_lookup_gradient():
    cfg = small(pad_token_id=3)
    params = init(cfg)
    assert np.all(params["wte"]["weight"][3] == 0)
    ids = jnp.asarray([[3, 1, 3, 2]])
    loss = lambda p: jnp.sum(jnp.sin(mpt.hidden_states(cfg, p, ids)))  # noqa: E731
    grad = jax.jit(jax.grad(loss))(params)
    assert np.all(grad["wte"]["weight"][3] == 0)
    assert np.any(grad["wte"]["weight"][1] != 0)


@pytest.mark.parametrize("where", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_needs_a_key(where):
    rate = {where: 0.2}
    cfg = (
        small(attn_config={"alibi": True, **rate}) if "attn" in where else small(**rate)
    )
    params, ids = init(cfg), tokens()
    evaluation = hidden_states(cfg, params, ids)
    np.testing.assert_array_equal(evaluation, hidden_states(small(), params, ids))
    run = functools.partial(hidden_states, cfg, params, ids)
    one, same, other = (run(dropout_key=jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    for drawn in (evaluation, other):
        assert float(jnp.abs(one - drawn).mean()) > 0.01


def test_dropout_keeps_the_mean():
    drawn = dropout(jnp.full((100_000,), 3.0), 0.2, jax.random.key(0))
    assert set(np.unique(drawn)) == {0.0, 3.75}
    assert abs(float(drawn.mean()) - 3) < 0.02  # 4 standard errors


def test_an_out_of_range_id_is_nan_not_another_row():
    cfg = small()
    logits = apply(cfg, init(cfg), jnp.asarray([[1, V]]))
    assert np.isnan(logits[0, 1]).all()


def test_learned_positions_end():
    cfg = small(attn_config={})
    params = init(cfg)
    with pytest.raises(ValueError, match="length 17 is over max_seq_len 16"):
        apply(cfg, params, jnp.zeros((1, 17), jnp.int32))


def test_alibi_goes_on_past_max_seq_len():
    cfg = small()
    params = init(cfg)
    assert np.isfinite(apply(cfg, params, jnp.zeros((1, 40), jnp.int32))).all()


def test_compute_dtype_is_kept_and_logits_are_float32():
    cfg = small(compute_dtype="bfloat16")
    params = init(cfg)
    assert hidden_states(cfg, params, tokens()).dtype == jnp.bfloat16
    assert apply(cfg, params, tokens()).dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


# ----------------------------------------------------- the frozen parameter tree


def describe(cfg: ModelConfig) -> str:
    """Path, shape, logical and mesh axes, and initial scale of every parameter."""
    lines = []
    for path, spec in jax.tree_util.tree_leaves_with_path(mpt.param_specs(cfg)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # A large enough sample of the initialiser, whatever the shape.
        drawn = spec.initializer(jax.random.key(0), (256, 256), jnp.float32)
        mean, std = float(drawn.mean()), float(drawn.std())
        axes = ", ".join(map(str, spec.axes))
        mesh_axes = ", ".join(map(str, partitioning.spec(spec.axes)))
        lines.append(
            f"{name}  {spec.shape}  ({axes}) -> ({mesh_axes})  {spec.dtype}  "
            f"mean {abs(mean):.1f} std {std:.2e}"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_tree_is_the_golden_one(name):
    """MPT_JAX_WRITE_GOLDEN=1 rewrites the files; review the diff."""
    path, got = GOLDEN / f"{name}.txt", describe(presets.model(name))
    if os.environ.get("MPT_JAX_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(got)
    assert path.read_text() == got
