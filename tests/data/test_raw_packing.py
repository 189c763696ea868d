"""Both packings through tf.data: what rows hold, what is learned, resuming."""

import collections
import itertools
import json

import numpy as np
import pytest

from mpt_jax.data import tasks
from mpt_jax.errors import DataError
from mpt_jax.tokenizer import ByteTokenizer
from tests.data import feeds
from tests.data.feeds import LOWER, TINY, UPPER, make_config, small_tasks  # noqa: F401

EOS = ByteTokenizer.eos_id
ONE = {"data.tasks": "('lower',)", "data.rates": "(1,)", "global_batch_size": 1}
KINDS = ({"data.packing": "mpt"}, {"data.packing": "bins"})


pytestmark = pytest.mark.usefixtures("small_tasks")


class ZeroEos(ByteTokenizer):
    """Its EOS is id 0, as GPT-NeoX's is."""

    vocab_size, eos_id, fingerprint = 256, 0, "zero"


def opened(overrides=None, **kwargs):
    return feeds.opened(make_config(overrides), **kwargs)


def documents_of(batch):
    """The ids of every segment of a batch, padding aside."""
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment].tolist()


def test_bins_hold_every_document_of_a_finite_stream_once():
    held_out = tasks.stdlib_corpus.select(LOWER, "validation").values()
    expected = collections.Counter()
    for text in held_out:
        ids = [*text.encode(), EOS]
        expected.update(tuple(ids[i : i + 32]) for i in range(0, len(ids), 32))
    found = collections.Counter()
    with opened(ONE | KINDS[1], split="validation") as source:
        for batch in source:
            found.update(map(tuple, documents_of(batch)))
    assert found == expected


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ZeroEos()])
@pytest.mark.parametrize("kind", KINDS)
def test_eos_is_learned_whatever_its_id(kind, tokenizer):
    eos = tokenizer.eos_id
    with opened(ONE | kind, tokenizer=tokenizer) as source:
        batches = [next(source) for _ in range(40)]
    n = learned = 0
    for batch in batches:
        ends = (batch["tokens"] == eos) & (batch["segment_ids"] > 0)
        n += np.count_nonzero(ends)
        learned += batch["loss_mask"][ends].sum()
    # But where a document's rest, cut off at a row's end, is its EOS alone.
    assert n > 40
    assert learned >= 0.95 * n


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_documents_keep_their_beginning_and_eos(kind):
    changed = ONE | kind | {"data.on_long": "truncate", "data.seq_len": 16}
    changed |= {"data.shuffle_buffer": 0}  # of rows: what one begins the next goes on
    known = {
        tuple([*text.encode()[:15], EOS] if len(text) > 15 else [*text.encode(), EOS])
        for text in LOWER.values()
    }
    with opened(changed) as source:
        rows = [next(source) for _ in range(60)]
    if kind["data.packing"] == "bins":
        found = [tuple(ids) for batch in rows for ids in documents_of(batch)]
    else:
        stream = np.concatenate([batch["tokens"][0] for batch in rows])
        ends = np.flatnonzero(stream == EOS) + 1
        found = [tuple(ids.tolist()) for ids in np.split(stream, ends)[:-1]]
    assert len(found) > 30
    assert set(found) <= known


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_with_its_counts(kind):
    rng = np.random.default_rng(1)
    with opened(kind) as whole:
        expected = [next(whole) for _ in range(40)]
        shares = whole.metrics()
    at = int(rng.integers(1, 39))
    with opened(kind) as killed:
        for _ in range(at):
            next(killed)
        state = killed.state()
        next(killed)
    with opened(kind) as source:
        source.restore(state)
        for batch in expected[at:]:
            got = next(source)
            for name in batch:
                np.testing.assert_array_equal(got[name], batch[name])
        assert source.metrics() == shares
        assert len(source.rows_of()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_what_was_read(kind):
    with opened(kind) as source:
        batches = [next(source) for _ in range(80)]
        metrics = source.metrics()
    tokens = collections.Counter()
    for batch in batches:
        for ids in documents_of(batch):
            upper = any(65 <= i <= 90 for i in ids)
            lower = any(97 <= i <= 122 for i in ids)
            if upper != lower:  # a segment of digits alone says nothing
                tokens["upper" if upper else "lower"] += len(ids)
    share = tokens["lower"] / tokens.total()
    assert abs(metrics["share_of_tokens/lower"] - share) < 0.03
    assert abs(share - 0.75) < 0.08
    used = np.mean([(b["segment_ids"] > 0).mean() for b in batches])
    assert metrics["packing_efficiency"] == pytest.approx(used)


def test_a_bad_row_is_named_not_tensorflows_story(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(300)]
    rows[200] = "{"
    file.write_text("\n".join(rows))
    changed = {"data.tasks": f"('jsonl:{file}',)", "eval.batches": 0}
    with opened(ONE | changed) as source:
        with pytest.raises(DataError, match=rf"^{file}:201: "):
            collections.deque(itertools.islice(source, 1000), maxlen=0)


def test_the_log_says_what_its_order_depends_on():
    with opened() as source:
        assert "hold for 1 host(s) only" in source.describe()
