"""The skipping bounds hold for any input, and skip what they should."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import Operands, Rule
from mpt_jax.models.alibi import slopes
from tests.kernels.suite import Case, arrays

EPS = 2.0**-24
BLOCK_Q, BLOCK_K = 8, 4
# Past any bound of ours: the oracle's own float64 rounding of a mass of 6e-8.
MASS_RTOL = 1e-6


def visible_BLS(case: Case, rule: Rule, x: Operands) -> np.ndarray:
    """Who sees whom, pair by pair."""
    L, S = case.L, case.S or case.L
    i = int(x.q_offset) + np.arange(L)[:, None]
    j = int(x.kv_offset) + np.arange(S)[None, :]
    seen = np.broadcast_to(j <= i if rule.causal else True, (case.B, L, S))
    if x.prefix_mask_BS is not None:
        seen = seen | np.asarray(x.prefix_mask_BS)[:, None, :]
    if rule.window is not None:
        seen = seen & (np.abs(i - j) <= rule.window)
    if x.q_segment_ids_BL is not None:
        of_q = np.asarray(x.q_segment_ids_BL)[:, :, None]
        of_key = np.asarray(x.kv_segment_ids_BS)[:, None, :]
        seen = seen & (of_q == of_key) & (of_q != 0)
    return seen


def log_softmax(case, q, k, rule, x, seen_BLS) -> np.ndarray:
    """(B, H, L, S) in float64; rows that see nothing are -inf."""
    q, k = (np.asarray(a).astype(np.float64) for a in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = rule.softmax_scale * np.einsum("blhd,bshd->bhls", q, k)
    if rule.logit_softcap is not None:
        s = rule.logit_softcap * np.tanh(s / rule.logit_softcap)
    distance = int(x.q_offset) - int(x.kv_offset) + np.arange(q.shape[1])[:, None]
    distance = np.abs(distance - np.arange(k.shape[1])[None, :])
    s = s - np.asarray(x.slopes_H, np.float64)[:, None, None] * distance
    s = np.where(seen_BLS[:, None], s, -np.inf)
    top = s.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0, top)
    total = np.exp(s - top).sum(-1, keepdims=True)
    return s - top - np.log(np.where(total == 0, 1, total))


def split(options: dict) -> tuple[Rule, Operands]:
    operands = {n: options[n] for n in options.keys() & set(Operands._fields)}
    rule = {n: x for n, x in options.items() if n not in operands}
    return Rule(**rule), Operands(**operands)


def worst_skipped_mass(case, q, k, options, lower_BHI) -> float:
    """The largest share of any row's softmax before its first block."""
    rule, x = split(options)
    seen = visible_BLS(case, rule, x)
    p = np.exp(log_softmax(case, q, k, rule, x, seen))
    first_column_BHL = np.repeat(np.asarray(lower_BHI), BLOCK_Q, axis=2) * BLOCK_K
    first_column_BHL = first_column_BHL[:, :, : case.L]
    before = np.arange(p.shape[-1]) < first_column_BHL[..., None]
    return float((p * before).sum(-1).max())


@functools.cache
def compiled(rule, q_offset, kv_offset, eps):
    def lower(q, k, x):
        x = x._replace(q_offset=q_offset, kv_offset=kv_offset)
        return skip.lower_key_blocks(
            q, k, rule, x, block_q=BLOCK_Q, block_k=BLOCK_K, eps=eps
        )

    return jax.jit(lower)


def lower_of(q, k, options, eps=EPS) -> jax.Array:
    rule, x = split(options)
    lower = compiled(rule, x.q_offset, x.kv_offset, eps)
    return lower(q, k, x._replace(q_offset=None, kv_offset=None))


RULES = (
    Case("plain", L=60, K=2),
    Case("packed", L=60, B=2, packed=True),
    Case("softcap", L=60, options={"logit_softcap": 2.0}),
    Case("window", L=60, options={"window": 30}),
    Case("bidirectional", L=60, options={"causal": False}),
    Case("prefix", L=60, prefix=True, packed=True, B=2),
    Case("later_rows", L=20, S=60, options={"q_offset": 43, "kv_offset": 3}),
    Case("past_the_keys", L=20, S=60, options={"q_offset": 90}),
    Case("before_the_keys", L=30, S=60, options={"kv_offset": 21}),
)


@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0.0, 0.1, 1.0, 5.0, 1e4]),
    first_slope=st.sampled_from([0.0, 2.0**-8, 1.0, 4.0, 50.0]),
    attack=st.sampled_from(["none", "early_keys", "opposed", "outlier", "eps"]),
)
def test_no_input_hides_more_than_eps(case, seed, size, first_slope, attack):
    """Attacks put the mass early, or the nearest key as low as norms allow."""
    (q, k, *_), options = arrays(case, seed)
    options["slopes_H"] = first_slope * jnp.asarray([1, 0.5, 0.25, 0.125], jnp.float32)
    S = k.shape[1]
    if attack == "early_keys":
        q, k = jnp.ones_like(q), k.at[:, : S // 4].set(1.0)
    elif attack == "opposed":
        q, k = jnp.ones_like(q), jnp.ones_like(k).at[:, S // 4 :].set(-1.0)
    elif attack == "outlier":
        k = k.at[:, seed % S].multiply(100.0)
    q = q * size
    eps = 2.0**-6 if attack == "eps" else EPS
    lower = lower_of(q, k, options, eps)
    assert lower.shape == (case.B, 4, -(-case.L // BLOCK_Q))
    assert worst_skipped_mass(case, q, k, options, lower) <= eps * (1 + MASS_RTOL)


def test_steep_heads_skip_and_flat_heads_do_not():
    (q, k, *_), options = arrays(Case("steep", L=60))
    options["slopes_H"] = jnp.asarray([4.0, 1.0, 2.0**-10, 0.0])
    lower = np.asarray(lower_of(0.1 * q, k, options))[0]
    last = lower[:, -1]
    # The last rows start at 56, and 17.3 / 4 < 5: one block before them is enough.
    assert last[0] == 56 // BLOCK_K - 1
    assert 0 < last[1] < last[0]
    np.testing.assert_array_equal(lower[2:], 0)
    # A larger spread of logits must keep more.
    assert (np.asarray(lower_of(8 * q, k, options))[0, 0] < lower[0])[-1]


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_numbers_that_are_not_finite_skip_nothing(spoil):
    (q, k, *_), options = arrays(Case("spoiled", L=60))
    options["slopes_H"] = jnp.full(4, 8.0)
    assert (lower_of(q, k, options)[..., -1] > 0).all()
    lower = lower_of(q.at[:, -1, 1].set(spoil), k, options)[0, :, -1]
    np.testing.assert_array_equal(lower == 0, [False, True, False, False])
    assert (lower_of(q, k.at[:, 0].set(spoil), options) == 0).all()


def test_off_and_no_slopes_skip_only_what_nobody_sees():
    (q, k, *_), options = arrays(Case("off", L=60, options={"window": 9}))
    first_seen = np.maximum(0, np.arange(0, 60, BLOCK_Q) - 9) // BLOCK_K
    for lower in (
        lower_of(q, k, options, eps=0.0),
        lower_of(q, k, {n: x for n, x in options.items() if n != "slopes_H"}),
    ):
        np.testing.assert_array_equal(lower, np.tile(first_seen, (1, 4, 1)))


def test_negative_slopes_skip_nothing():
    (q, k, *_), options = arrays(Case("negative", L=60))
    options["slopes_H"] = jnp.full(4, -8.0)
    assert (lower_of(q, k, options) == 0).all()


def test_skip_eps_reads_the_rule():
    eps = [skip.skip_eps(Rule(1.0, skip=s)) for s in ("auto", "off", 0.25, 0)]
    assert eps == [2**-24, 0.0, 0.25, 0.0]
    assert skip.skip_eps(Rule(1.0), n_key_blocks=4) == 0.0
    assert skip.skip_eps(Rule(1.0), n_key_blocks=16) == 2**-24
    assert skip.skip_eps(Rule(1.0, skip=0.5), n_key_blocks=4) == 0.5


@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_ranges_cover_what_is_visible_and_full_hides_nothing(case):
    """Against the pairs: every visible one is visited, from both sides."""
    (q, k, *_), options = arrays(case)
    rule, x = split(options)
    L, S, H = case.L, k.shape[1], case.H
    some, full = skip.block_visibility(L, S, rule, x, block_q=BLOCK_Q, block_k=BLOCK_K)
    lower = lower_of(q, k, options, eps=0.0)
    by_query, by_key = (
        jax.tree.map(np.asarray, f(some, full, lower))
        for f in (skip.key_ranges, skip.query_ranges)
    )
    seen = visible_BLS(case, rule, x)
    by_position = visible_BLS(
        case, rule, x._replace(q_segment_ids_BL=None, prefix_mask_BS=None)
    )
    nq, nk = full.shape
    for i, j in np.ndindex(nq, nk):
        at = np.s_[:, i * BLOCK_Q : (i + 1) * BLOCK_Q, j * BLOCK_K : (j + 1) * BLOCK_K]
        for b, h in np.ndindex(case.B, H):
            one = b if by_query.end.shape[0] > 1 else 0
            visits_q = by_query.first[b, h, i] <= j < by_query.end[one, i]
            visits_k = by_key.first[one, j] <= i < by_key.end[b, h, j]
            if seen[at][b].any():
                assert visits_q
                assert visits_k
        whole = by_position[at].all() and (j + 1) * BLOCK_K <= S
        assert (by_query.full_first[i] <= j < by_query.full_end[i]) == whole
        assert (by_key.full_first[j] <= i < by_key.full_end[j]) == whole


def test_packed_documents_are_not_visited_from_each_other():
    ids = jnp.asarray([[1] * 24 + [2] * 16 + [3] * 20], jnp.int32)
    (q, k, *_), options = arrays(Case("documents", L=60))
    options |= {"q_segment_ids_BL": ids, "kv_segment_ids_BS": ids}
    lower = lower_of(q, k, options, eps=0.0)
    np.testing.assert_array_equal(lower[0, 0], [0, 0, 0, 6, 6, 10, 10, 10])


def test_upper_query_blocks_are_the_last_readers():
    lower = jnp.asarray([[[0, 0, 1, 3]]], jnp.int32)
    upper = skip.upper_query_blocks(lower, 5)
    np.testing.assert_array_equal(upper, [[[2, 3, 3, 4, 4]]])


@pytest.mark.parametrize("bias_max", [8, 16])
def test_head_order_balances_shards(bias_max):
    """Work of a head: the keys it keeps of 65,536, logits spread by 40."""
    m = slopes(32, bias_max=bias_max)
    kept = np.minimum(65_536, (40 + 16.64) / m)
    order = skip.head_order(m, 8)
    np.testing.assert_array_equal(np.sort(order), np.arange(32))

    def busiest(order):
        return kept[order].reshape(8, 4).sum(1).max() / (kept.sum() / 8)

    assert busiest(np.arange(32)) > 1.9
    assert busiest(order) < 1.5  # the longest head alone is 1.27


def test_head_order_keeps_groups_together_and_refuses_what_does_not_divide():
    order = skip.head_order(slopes(8), 2, group=2)
    np.testing.assert_array_equal(order.reshape(4, 2) % 2, [[0, 1]] * 4)
    np.testing.assert_array_equal(order, [0, 1, 6, 7, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="n_shards: got 3, expected a divisor of 4"):
        skip.head_order(slopes(8), 3, group=2)
