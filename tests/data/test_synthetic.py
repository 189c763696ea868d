import subprocess
import sys

import numpy as np
import pytest

from mpt_jax.config import TrainConfig, parse
from mpt_jax.data import feed, packing
from mpt_jax.errors import CheckpointError, ConfigError, DataError

TINY = {
    "steps": 1,
    "global_batch_size": 4,
    "model": {"vocab_size": 97},
    "data": {"source": "synthetic", "seq_len": 64},
}


def open_source(index: int = 0, count: int = 1, *, split="train", **overrides):
    config = parse(TrainConfig, TINY, {k: str(v) for k, v in overrides.items()})
    assert feed.tokenizer(config) is None
    return feed.open_source(
        config, split=split, tokenizer=None, process_index=index, process_count=count
    )


def take(source, n: int) -> np.ndarray:
    return np.stack([next(source)["tokens"] for _ in range(n)])


def test_batches_have_the_contract():
    batch = next(open_source())
    assert set(batch) == {"tokens", "loss_mask", "segment_ids"}
    assert all(a.dtype == np.int32 and a.shape == (4, 64) for a in batch.values())
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() < 97


def test_hosts_hold_the_parts_of_one_global_batch():
    whole = take(open_source(), 3)
    parts = [take(open_source(i, 2), 3) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_seeds_splits_and_batches_differ():
    streams = [open_source(), open_source(seed=18), open_source(split="validation")]
    rows = np.concatenate([take(s, 2).reshape(-1, 64) for s in streams])
    assert len(np.unique(rows, axis=0)) == 3 * 2 * 4


def test_rows_are_streams_of_their_own():
    """Neighbouring Philox counters, used carelessly, give shifted copies."""
    rows = take(open_source(), 2).reshape(-1, 64)
    for shift in range(1, 9):
        assert (rows[1:, :-shift] == rows[:-1, shift:]).mean() < 0.2


def test_a_model_can_learn_it():
    tokens = take(open_source(), 50)
    follows = (tokens[..., 1:] - tokens[..., :-1]) % 97 == 1
    assert 0.88 < follows.mean() < 0.93  # 0.9, and a jump may land there: 0.901
    counts = np.bincount(tokens.ravel(), minlength=97)
    assert counts[:20].sum() > 3 * counts[-20:].sum()


def test_resume_is_exact_on_any_number_of_hosts():
    source = open_source()
    take(source, 3)
    state = source.state()
    expected = take(source, 2)
    again = open_source()
    again.restore(state)
    np.testing.assert_array_equal(take(again, 2), expected)
    half = open_source(1, 2)
    half.restore(state)
    np.testing.assert_array_equal(take(half, 2), expected[:, 2:])


def test_another_run_is_refused_with_its_differences():
    state = open_source().state()
    other = open_source(seed=18, **{"data.seq_len": 32, "model.vocab_size": 98})
    with pytest.raises(CheckpointError) as e:
        other.restore(state)
    assert "seed: saved with 17, now 18" in str(e.value)
    assert "seq_len: saved with 64, now 32" in str(e.value)
    assert "vocab_size: saved with 97, now 98" in str(e.value)
    assert "global_batch_size" not in str(e.value)


def test_every_damaged_byte_is_noticed():
    source = open_source()
    state = source.state()
    for at in range(len(state)):
        with pytest.raises(CheckpointError, match="damaged"):
            source.restore(state[:at] + bytes([state[at] ^ 4]) + state[at + 1 :])
    for cut in (0, 10, len(state) - 1):
        with pytest.raises(CheckpointError, match="damaged"):
            source.restore(state[:cut])


def test_validation_is_the_same_for_every_seed_and_host_count(capsys):
    def batches(index, count, seed):
        config = parse(TrainConfig, TINY, {"seed": str(seed)})
        host = {"process_index": index, "process_count": count}
        found = feed.validation_batches(config, 3, tokenizer=None, **host)
        return np.stack([b["tokens"] for b in found])

    whole = batches(0, 1, 17)
    parts = [batches(i, 2, seed=i) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert capsys.readouterr().err == ""


def test_hosts_that_cannot_share_a_batch_are_a_config_error():
    with pytest.raises(
        ConfigError, match="global_batch_size: 4 does not divide over 3"
    ):
        open_source(0, 3)


def test_ids_outside_the_vocabulary_are_refused():
    tokens = np.arange(12).reshape(3, 4)
    packing.check_ids(tokens, vocab_size=12, location="here")
    with pytest.raises(
        DataError, match=r"here: row 2 has id 11 at token 3; .* 0 to 10"
    ):
        packing.check_ids(tokens, vocab_size=11, location="here")
    with pytest.raises(DataError, match="row 1 has id -1 at token 0"):
        packing.check_ids(np.array([[5], [-1]]), vocab_size=11, location="")


def test_feed_and_tokenizer_need_no_tensorflow():
    code = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['seqio'] = None\n"
        "from mpt_jax.config import TrainConfig, parse\n"
        "from mpt_jax.data import feed, tasks, vocab\n"
        "from mpt_jax import tokenizer\n"
        f"config = parse(TrainConfig, {TINY})\n"
        "source = feed.open_source(config, tokenizer=None, process_index=0,"
        " process_count=1)\n"
        "next(source); source.restore(source.state()); source.close()\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
