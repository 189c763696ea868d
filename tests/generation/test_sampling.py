"""Draws against the distributions that their knobs promise, in float64 NumPy."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from mpt_jax.errors import UserError
from mpt_jax.generation import sampling
from mpt_jax.generation.sampling import Sampling

V, KNOWN, N = 24, 21, 4000  # ids from KNOWN on are padding of the head
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(size=V) * 2
LOGITS[KNOWN:] = 50  # likeliest by far, and never drawn
# A correct sampler fails a test once in ten thousand seeds; the seeds are fixed.
P_VALUE = 1e-4
# float32 log-softmax of logits up to 50.
LOGPROB_ATOL = 1e-5

COMBINATIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.08},
    {"top_k": 1},
]


@functools.cache
def draw_program():
    def run(logits_BV, rows, slots_B, position_B, live_B):
        return sampling.draw(
            logits_BV, rows, slots_B=slots_B, position_B=position_B, live_B=live_B,
            vocab_size=KNOWN,
        )  # fmt: skip

    return jax.jit(run)


def stacked(requests, prompts=None, stops=()):
    """Rows of N requests, the last repeated."""
    prompts = prompts or [()] * len(requests)
    rows = [
        sampling.host_row(s, p, stops=stops, vocab=V)
        for s, p in zip(requests, prompts, strict=True)
    ]
    rows += [rows[-1]] * (N - len(rows))
    return type(rows[0])(*map(np.stack, zip(*rows, strict=True)))


def many(sampling_of, n=N):
    """N rows that differ in their seed, made fast."""
    row = sampling.host_row(sampling_of, (), stops=(), vocab=V)
    rows = jax.tree.map(lambda a: np.repeat(np.asarray(a)[None], n, 0), row)
    seeds = np.stack([np.zeros(n), np.arange(n)], 1).astype(np.uint32)
    return rows._replace(seed_BW=seeds)


def draw(rows, logits=None, *, position=5, slots=None, live=None):
    logits = np.broadcast_to(LOGITS if logits is None else logits, (N, V))
    slots = np.arange(N) if slots is None else slots
    live = np.ones(N, bool) if live is None else live
    position = np.broadcast_to(np.int32(position), N)
    drawn, rows = draw_program()(
        np.float32(logits), rows, np.int32(slots), position, live
    )
    return np.asarray(drawn.id_B), drawn, rows


def expected(s):
    """P of each id by the definitions, one step after another."""
    p = np.exp(LOGITS[:KNOWN] / s.temperature - (LOGITS[:KNOWN] / s.temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    if s.top_k:
        p[order[s.top_k :]] = 0
        p /= p.sum()
    if s.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= s.top_p]] = 0
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("knobs", COMBINATIONS, ids=str)
def test_draws_follow_the_distribution(knobs):
    s = Sampling(**knobs)
    ids, _, _ = draw(many(s))
    p = expected(s)
    counts = np.bincount(ids, minlength=V)
    assert not counts[KNOWN:].any()
    assert not counts[:KNOWN][p == 0].any()
    likely = p > 0
    if likely.sum() > 1:
        observed, wanted = counts[:KNOWN][likely], N * p[likely]
        rare = wanted < 5  # too few for the test's approximation: as one
        observed = [*observed[~rare], observed[rare].sum()]
        wanted = [*wanted[~rare], wanted[rare].sum()]
        if wanted[-1] == 0:
            observed, wanted = observed[:-1], wanted[:-1]
        assert stats.chisquare(observed, wanted).pvalue > P_VALUE


def test_a_row_draws_alike_whatever_its_slot_and_neighbours():
    mixed = [Sampling(**COMBINATIONS[i % 7], seed=i) for i in range(50)]
    mixed += [Sampling(temperature=0.0)]
    ids, _, _ = draw(stacked(mixed))
    order = np.random.default_rng(0).permutation(N)
    moved, _, _ = draw(stacked(mixed), slots=order)
    np.testing.assert_array_equal(moved, ids[order])
    for i, s in enumerate(mixed[:7]):  # alone: all rows as this one
        alone, _, _ = draw(many(s)._replace(seed_BW=np.full((N, 2), [0, i], np.uint32)))
        assert (alone == ids[i]).all()


def test_seed_and_position_decide():
    s = Sampling()
    same = many(s)._replace(seed_BW=np.full((N, 2), [3, 9], np.uint32))
    first, _, _ = draw(same)
    assert (first == first[0]).all()
    by_position = {draw(same, position=p)[0][0] for p in range(12)}
    assert len(by_position) > 3
    # Both words of a seed of 64 bits count.
    big = sampling.host_row(Sampling(seed=2**33 + 5), (), stops=(), vocab=V)
    assert big.seed_BW.tolist() == [2, 5]


def test_penalties_bias_and_early_stops_equal_the_formulas():
    rng = np.random.default_rng(1)
    n = 64
    requests, prompts, outputs = [], [], []
    for _ in range(n):
        requests.append(
            Sampling(
                temperature=0.0,
                repetition_penalty=float(rng.uniform(0.5, 3)),
                presence_penalty=float(rng.uniform(-2, 2)),
                frequency_penalty=float(rng.uniform(-2, 2)),
                logit_bias={
                    int(i): float(rng.normal()) for i in rng.integers(V, size=3)
                },
                min_tokens=int(rng.integers(4)),
            )
        )
        prompts.append(tuple(rng.integers(V, size=3).tolist()))
        outputs.append(rng.integers(V, size=6))
    rows = stacked(requests, prompts, stops=(2, 11))
    counts = np.zeros((N, V), np.int32)
    for i in range(n):
        np.add.at(counts[i], outputs[i], 1)
    rows = rows._replace(counts_BV=counts)
    logits = rng.normal(size=(N, V)) * 2
    position = 5  # prompts of 3 and 2 new tokens
    ids, _, after = draw(rows, logits, position=position)
    for i, s in enumerate(requests):
        x = logits[i].copy()
        seen = np.isin(np.arange(V), [*prompts[i], *outputs[i]])
        r = s.repetition_penalty
        x[seen] = np.where(x[seen] > 0, x[seen] / r, x[seen] * r)
        x -= s.presence_penalty * (counts[i] > 0) + s.frequency_penalty * counts[i]
        for token, bias in s.logit_bias.items():
            x[token] += bias
        if position < 3 + s.min_tokens:
            x[[2, 11]] = -np.inf
        assert ids[i] == x[:KNOWN].argmax(), i
        counts[i, ids[i]] += 1
    np.testing.assert_array_equal(np.asarray(after.counts_BV)[:n], counts[:n])


def test_logprobs_are_the_models_own():
    rows = many(Sampling(temperature=0.3, top_k=2, logprobs=5))
    ids, drawn, _ = draw(rows)
    own = LOGITS - np.logaddexp.reduce(LOGITS)  # padding of the head included
    np.testing.assert_allclose(drawn.logprob_B, own[ids], atol=LOGPROB_ATOL)
    order = np.argsort(-LOGITS[:KNOWN])[: sampling.TOP]
    np.testing.assert_array_equal(drawn.top_id_BT[0], order)
    np.testing.assert_allclose(drawn.top_logprob_BT[0], own[order], atol=LOGPROB_ATOL)


def test_logits_that_are_not_finite_draw_nothing_and_hurt_nobody():
    rows, logits = many(Sampling()), np.tile(LOGITS, (N, 1))
    good, _, _ = draw(rows, logits)
    logits[3, 4], logits[9, 0] = np.nan, np.inf
    ids, _, _ = draw(rows, logits)
    assert ids[3] == ids[9] == -1
    others = np.delete(np.arange(N), [3, 9])
    np.testing.assert_array_equal(ids[others], good[others])


def test_rows_that_do_not_count_are_not_counted():
    live = np.arange(N) % 2 == 0
    _, _, after = draw(many(Sampling()), live=live)
    np.testing.assert_array_equal(np.asarray(after.counts_BV).sum(1), live)


def test_every_bad_field_is_named_with_its_range():
    with pytest.raises(UserError) as caught:
        Sampling(
            max_tokens=-1, temperature=float("nan"), top_k=True, top_p=0.0, min_p=2.0,
            repetition_penalty=0, presence_penalty=3, frequency_penalty="1",
            seed=2**63, stop=("",), stop_ids=(-1,), logit_bias={1: 101.0}, logprobs=21,
        )  # fmt: skip
    message = str(caught.value)
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p",
                 "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
                 "stop", "stop_ids", "logit_bias", "logprobs"):  # fmt: skip
        assert f"{name}: got" in message
    assert "expected a number of 0 to 100" in message
    with pytest.raises(UserError, match="min_tokens: got 5, expected at most max_t"):
        Sampling(max_tokens=4, min_tokens=5)
