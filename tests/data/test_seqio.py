"""Everything that needs TensorFlow, in one file: importing it takes 10 s."""

import json
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax.data import feed, packing, stdlib_corpus, tasks
from mpt_jax.errors import CheckpointError, ConfigError, DataError
from mpt_jax.tokenizer import ByteTokenizer
from tests.data import feeds, oracle
from tests.data.feeds import LOWER, TINY, UPPER, make_config, small_tasks, take  # noqa: F401

EOS = ByteTokenizer.eos_id
ONE = {"data.tasks": "('lower',)", "data.rates": "(1,)"}


pytestmark = pytest.mark.usefixtures("small_tasks")


def opened(overrides=None, **kwargs):
    return feeds.opened(make_config(overrides), **kwargs)


def documents_of(rows: np.ndarray) -> list[str]:
    """Texts of the stream that ``rows`` are cut from, the last, cut one aside."""
    stream = "".join("|" if i == EOS else chr(i) for i in rows.ravel())
    return stream.split("|")[:-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # AutoGraph on Python 3.13
@given(
    documents=st.lists(
        st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=9
    ),
    length=st.integers(2, 12),
)
@settings(deadline=None, max_examples=10)
def test_packing_is_the_plain_definition(documents, length):
    """No token is lost, doubled or padded; id 0, EOS here, is an id like any other."""
    from mpt_jax.data.seqio_adapters import tf

    ended = tf.ragged.constant([[*d, 0] for d in documents], tf.int32)
    dataset = tf.data.Dataset.from_tensor_slices({"tokens": ended})
    rows = packing.concat_and_chop(dataset, {"tokens": length})
    got = [row["tokens"].numpy().tolist() for row in rows]
    assert got == oracle.pack(documents, length=length, eos_id=0)


def test_rows_are_of_one_task_drawn_by_rate():
    with opened() as source:
        rows = take(source, 150)
    lower = np.isin(rows, list(b"abcdefgh")).any(axis=1)
    upper = np.isin(rows, list(b"ABCDEFGH")).any(axis=1)
    assert (lower ^ upper).all()
    assert abs(lower.mean() - 0.75) < 0.07  # 600 draws: four standard deviations


def test_epochs_hold_every_document_once_in_a_new_order():
    with opened(ONE | {"data.shuffle_buffer": 1}) as source:
        seen = documents_of(take(source, 90))
    train = sorted(stdlib_corpus.select(LOWER, "train").values())
    n = len(train)
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == train
    assert seen[:n] != seen[n : 2 * n]


def test_hosts_read_disjoint_documents():
    with_order = ONE | {"data.shuffle_buffer": 0}
    train = list(stdlib_corpus.select(LOWER, "train").values())
    for index in range(2):
        with opened(with_order, index=index, count=2) as source:
            batch = next(source)
            assert batch["tokens"].shape == (2, 32)
            rows = np.concatenate([batch["tokens"], take(source, 40)])
        expected = train[index::2]
        assert documents_of(rows)[: len(expected)] == expected


@pytest.mark.parametrize("batches_seen", [0, 1, 60])  # lower's epoch is 48
def test_resume_is_exact(batches_seen):
    with opened() as source:
        for _ in range(batches_seen):
            next(source)
        state = source.state()
        expected = take(source, 25)
    with opened() as fresh:
        fresh.restore(state)
        np.testing.assert_array_equal(take(fresh, 25), expected)
        fresh.restore(state)  # and after having moved on
        np.testing.assert_array_equal(take(fresh, 2), expected[:8])


def test_a_position_that_cannot_be_written_is_a_checkpoint_error(monkeypatch, tmp_path):
    with opened() as source:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(CheckpointError, match=r"missing: .*cannot be saved"):
            source.state()


def test_the_order_is_the_seeds():
    streams = []
    for seed in (17, 17, 18):
        with opened({"seed": seed}) as source:
            streams.append(take(source, 5))
    np.testing.assert_array_equal(streams[0], streams[1])
    assert (streams[0] != streams[2]).any()


def test_another_run_is_refused_with_its_differences(monkeypatch):
    with opened() as source:
        state = source.state()
    monkeypatch.setitem(tasks.TASKS, "upper", lambda: UPPER | {"new": "text"})
    changed = {"seed": 18, "global_batch_size": 8}
    changed |= {"data.rates": "(3,2)", "data.seq_len": 16}
    with opened(changed, index=1, count=2) as source:
        with pytest.raises(CheckpointError, match="of another run") as e:
            source.restore(state)
    lines = str(e.value).splitlines()[1:]
    assert [re.match(r"\s*([\w.]+): saved with", line)[1] for line in lines] == [
        "global_batch_size", "process", "rates.upper", "seed", "seq_len", "text.upper",
    ]  # fmt: skip
    assert "seed: saved with 17, now 18" in lines[3]
    assert "process: saved with '0 of 1', now '1 of 2'" in lines[1]


def validation(overrides, n, *, index=0, count=1) -> np.ndarray:
    batches = feed.validation_batches(
        make_config(overrides), n, tokenizer=ByteTokenizer(),
        process_index=index, process_count=count,
    )  # fmt: skip
    return np.stack([batch["tokens"] for batch in batches])


def test_validation_is_the_held_out_text_in_order():
    rows = validation(ONE | {"global_batch_size": 2}, 2).reshape(-1, 32)
    held_out = stdlib_corpus.select(LOWER, "validation").values()
    ids = [ByteTokenizer().encode(text) for text in held_out]
    assert rows.tolist() == oracle.pack(ids, length=32, eos_id=EOS)[:4]


def test_validation_is_the_same_for_any_seed_and_hosts():
    size = {"global_batch_size": 6}
    whole = validation(size, 1)
    for seed in range(4):  # which task each row is drawn from must not change
        np.testing.assert_array_equal(validation(size | {"seed": seed}, 1), whole)
    parts = [validation(size, 1, index=i, count=2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_short_validation_split_gives_what_it_has_or_says_what_is_missing(capsys):
    config = make_config(ONE | {"global_batch_size": 1})
    host = {"tokenizer": ByteTokenizer(), "process_index": 0, "process_count": 1}
    held_out = stdlib_corpus.select(LOWER, "validation").values()
    rows = sum(len(text) + 1 for text in held_out) // 32
    assert len(feed.validation_batches(config, 99, **host)) == rows
    assert f"{rows} batches instead of 99" in capsys.readouterr().err
    config = make_config(ONE | {"global_batch_size": 64})
    with pytest.raises(DataError, match="less than one batch of 64 rows of 32 tokens"):
        feed.validation_batches(config, 1, **host)


def test_an_empty_task_is_an_error_not_a_loop(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "upper", dict)
    with opened() as source, pytest.raises(DataError, match="has no text"):
        take(source, 1000)


def test_bad_settings_are_told_before_tensorflow_is_asked():
    config = make_config({"data.tasks": "('lower','uper')"})
    with pytest.raises(
        ConfigError, match=r"unknown task 'uper'.*did you mean \"upper\""
    ):
        feed.open_source(config, tokenizer=ByteTokenizer())
    config = make_config({"model.vocab_size": 256})
    with pytest.raises(DataError, match=r"has 257 ids but model\.vocab_size is 256"):
        feed.open_source(config, tokenizer=ByteTokenizer())


def test_ids_outside_the_vocabulary_are_refused(monkeypatch):
    with opened() as source:
        monkeypatch.setattr(source._tokenizer, "vocab_size", 90)
        with pytest.raises(
            DataError, match=r"^train split of lower, upper: row .* 89$"
        ):
            take(source, 9)


def test_a_closed_source_says_so():
    with opened() as source:
        pass
    with pytest.raises(ValueError, match="closed"):
        next(source)


def test_stdlib_rows_are_what_python_tokenises(tmp_path):
    """The whole path against the SentencePiece library and packing in plain Python."""
    config = make_config(
        {
            "data.tasks": "('stdlib_code',)",
            "data.rates": "(1,)",
            "data.seq_len": 256,
            "data.tokenizer": "stdlib",
            "data.cache_dir": tmp_path,
            "model.vocab_size": 2048,
        }
    )
    tokenizer = feed.tokenizer(config)
    host = {"process_index": 0, "process_count": 1}
    batches = feed.validation_batches(config, 100, tokenizer=tokenizer, **host)
    rows = np.concatenate([b["tokens"] for b in batches])
    texts = stdlib_corpus.select(stdlib_corpus.code(), "validation").values()
    ids = (tokenizer.encode(text) for text in texts)
    expected = oracle.pack(ids, length=256, eos_id=0)
    assert tokenizer.eos_id == 0
    assert rows.tolist() == expected[:400]


@pytest.mark.slow
def test_a_source_is_silent_and_never_hangs_at_exit(tmp_path):
    """Both corpora, every warning shown, nothing closed: the trainer's worst exit."""
    values = TINY | {"model": {"vocab_size": 2048}, "data": {"seq_len": 64}}
    code = (
        "from mpt_jax.config import TrainConfig, parse\n"
        "from mpt_jax.data import feed\n"
        f"config = parse(TrainConfig, {values},\n"
        f"               {{'data.cache_dir': {json.dumps(str(tmp_path))}}})\n"
        "host = {'process_index': 0, 'process_count': 1}\n"
        "source = feed.open_source(config, tokenizer=feed.tokenizer(config), **host)\n"
        "next(source)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert run.stdout == ""
    assert run.stderr == "training tokenizer (once)...\n"
