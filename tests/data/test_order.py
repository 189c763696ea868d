import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax.data import order


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=50)
def test_shuffled_is_a_permutation(size, key):
    got = [order.shuffled(i, size, key=key) for i in range(size)]
    assert sorted(got) == list(range(size))


def test_shuffled_mixes():
    size = 4000
    a, b = ([order.shuffled(i, size, key=k) for i in range(size)] for k in (1, 2))
    identity = np.arange(size)
    # Of independent orders; three standard deviations of 1 / sqrt(4000) are 0.047.
    for x, y in ((identity, a), (a, b), (a[:-1], a[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
    assert sum(i == j for i, j in enumerate(a)) < 8  # Poisson with mean 1
    # Where the first tenth went: all over the place.
    counts, _ = np.histogram(a[: size // 10], bins=10, range=(0, size))
    assert counts.min() > 20
    assert counts.max() < 65


def test_shuffled_never_changes():
    """A saved position means these rows; changing them needs another format."""
    key = order.key_of("train", 17)
    got = [order.shuffled(i, 10, key=key) for i in range(10)]
    assert got == [2, 3, 9, 5, 8, 1, 0, 7, 4, 6]


def test_shuffled_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="expected 0 to 9, got 10"):
        order.shuffled(10, 10, key=0)


@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    total=st.integers(12, 5000),
)
@settings(deadline=None)
def test_counts_are_near_the_weights(weights, total):
    parts = order.counts(weights, total)
    assert sum(parts) == total
    assert min(parts) >= 1
    shares = [total * w / sum(weights) for w in weights]
    if min(shares) >= 1:
        assert all(abs(p - s) < 1 for p, s in zip(parts, shares, strict=True))


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_a_mixture_counts_what_it_gives(counts):
    mixture = order.Mixture(counts, key=5)
    seen = [0] * len(counts)
    for row in range(3 * mixture.period):
        assert mixture.seen(row) == seen
        source, before = mixture.place(row)
        assert before == seen[source]
        seen[source] += 1
    assert seen == [3 * c for c in counts]


def test_a_mixture_is_shuffled_anew_in_each_period():
    mixture = order.Mixture([30, 70], key=5)
    rows = [mixture.place(row)[0] for row in range(200)]
    assert rows[:100] != rows[100:]
    assert sum(rows[:10]) < 10
