import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax.data import packing
from tests.data import oracle

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def stream(lengths):
    """Documents of ascending numbers, so that order shows, and where each ends."""
    tokens = np.arange(sum(lengths), dtype=np.int32)
    return tokens, np.cumsum(lengths)


def rows_of(layout, tokens, eos_id=-1):
    rows = []
    for row in range(layout.n_rows):
        spans = list(layout.spans(row))
        parts = [tokens[s.start : s.start + s.size].copy() for s in spans]
        for part, span in zip(parts, spans, strict=True):
            if span.cut:
                part[-1] = eos_id
        rows.append(parts)
    return rows


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1),
    eos_id=st.integers(0, 3),
)
@settings(deadline=None)
def test_segments_end_after_each_eos(rows, eos_id):
    batch = packing.as_batch(np.array(rows), eos_id=eos_id)
    expected = [oracle.segments(row, eos_id) for row in rows]
    assert batch["segment_ids"].tolist() == expected
    assert batch["tokens"].tolist() == rows
    assert (batch["loss_mask"] == 1).all()
    assert {(a.dtype, a.shape) for a in batch.values()} == {
        (np.dtype(np.int32), (len(rows), 5))
    }


def test_no_id_is_padding():
    batch = packing.as_batch(np.zeros((2, 4)), eos_id=7)
    assert (batch["segment_ids"] == 1).all()
    assert (batch["loss_mask"] == 1).all()


def test_padding_has_neither_segment_nor_weight():
    batch = packing.as_batch(np.array([[5, 0, 6, 0, 0]]), eos_id=0, used_B=[3])
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 0]]


def test_eos_of_id_0_is_learned():
    """Both packings, down to the weights of the loss; SeqIO's own gives it none."""
    tokens = np.array([[5, 0, 6, 7, 0, 0]])
    assert packing.as_batch(tokens, eos_id=0)["loss_mask"].tolist() == [[1] * 6]
    segments = np.array([[1, 1, 2, 2, 2, 0]])  # the last 0 is padding
    batch = packing.as_binned_batch(tokens, segments)
    assert batch["loss_mask"].tolist() == [[0, 1, 0, 1, 1, 0]]


@given(lengths=LENGTHS, capacity=st.integers(40, 60))
@settings(deadline=None)
def test_best_fit_overfills_no_bin_and_leaves_no_two_half_empty(lengths, capacity):
    bins = packing.best_fit(np.array(lengths), capacity)
    filled = np.bincount(bins, weights=lengths)
    assert filled.max() <= capacity
    assert filled.min() > 0  # numbered without gaps
    assert np.count_nonzero(filled * 2 <= capacity) <= 1


def test_best_fit_takes_the_fullest_bin_with_room():
    # 6 and 5 open a bin each; 4 fits only beside 6 exactly, 5 beside 5.
    assert packing.best_fit(np.array([4, 6, 5, 5]), 10).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="expected 1 to 10"):
        packing.best_fit(np.array([11]), 10)


def test_best_fit_of_many_documents_is_nearly_full():
    lengths = np.random.default_rng(0).geometric(1 / 300, 20_000).clip(1, 2048)
    bins = packing.best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * (bins.max() + 1)) > 0.999


@given(lengths=LENGTHS, length=st.integers(2, 16))
@settings(deadline=None)
def test_chopped_rows_are_the_stream(lengths, length):
    tokens, _ = stream(lengths)
    layout = packing.Chopped(tokens.size, length)
    rows = [np.concatenate(parts) for parts in rows_of(layout, tokens)]
    assert [len(row) for row in rows[:-1]] == [length] * (len(rows) - 1)
    assert np.concatenate(rows).tolist() == tokens.tolist()


@given(lengths=LENGTHS, length=st.integers(2, 16))
@settings(deadline=None)
def test_binned_rows_hold_every_token_once_in_order(lengths, length):
    tokens, ends = stream(lengths)
    layout = packing.Binned(ends, length, on_long="split")
    rows = rows_of(layout, tokens)
    assert all(sum(map(len, parts)) <= length for parts in rows)
    parts = [part for parts in rows for part in parts]
    assert all((np.diff(part) == 1).all() for part in parts)
    assert sorted(np.concatenate(parts)) == tokens.tolist()
    for begin, end in zip(ends - lengths, ends, strict=True):
        own = [p for p in parts if begin <= p[0] < end]
        assert all(p[-1] < end for p in own), "a segment of two documents"
        sizes = sorted(map(len, own))
        assert sizes[1:] == [length] * (len(own) - 1), "split more than it must be"


@pytest.mark.parametrize("packing_name", ["mpt", "bins"])
@given(lengths=LENGTHS, length=st.integers(2, 16))
@settings(deadline=None)
def test_truncation_keeps_the_beginning_and_eos(packing_name, lengths, length):
    tokens, ends = stream(lengths)
    expected = []
    for begin, end in zip(ends - lengths, ends, strict=True):
        ids = tokens[begin:end].tolist()
        expected.append(ids if len(ids) <= length else [*ids[: length - 1], -1])
    if packing_name == "bins":
        layout = packing.Binned(ends, length, on_long="truncate")
        rows = rows_of(layout, tokens)
        got = [p.tolist() for parts in rows for p in parts]
        assert sorted(got) == sorted(expected)
    else:
        layout = packing.Chopped(tokens.size, length, ends_N=ends)
        rows = rows_of(layout, tokens)
        got = [i for parts in rows for p in parts for i in p.tolist()]
        assert got == [i for document in expected for i in document]
    assert layout.tokens == sum(map(len, expected))


@given(lengths=LENGTHS, length=st.integers(2, 16))
@settings(deadline=None)
def test_a_window_is_rows_with_segments(lengths, length):
    tokens, ends = stream(lengths)
    got, segments = packing.pack_window(tokens, ends, length, pad_id=-1)
    assert sorted(got[segments > 0]) == tokens.tolist()
    assert (got[segments == 0] == -1).all()
    for row in segments:
        used = row[row > 0]
        assert (row[: used.size] == used).all(), "padding is at the end"
        assert sorted(set(used)) == list(range(1, used.max() + 1))
        assert (np.diff(used) >= 0).all()


def test_shares_are_of_the_tokens_without_padding():
    assert packing.shares({"a": 30, "b": 10}, capacity=50) == {
        "share_of_tokens/a": 0.75,
        "share_of_tokens/b": 0.25,
        "packing_efficiency": 0.8,
    }
    assert packing.shares({"a": 0}, capacity=0) == {}
