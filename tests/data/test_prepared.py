"""Prepared data from files to batches; no TensorFlow, as on the machine that reads."""

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpt_jax.config import TrainConfig, parse
from mpt_jax.data import feed, indexed, prepared
from mpt_jax.errors import CheckpointError, ConfigError, DataError
from mpt_jax.tokenizer import ByteTokenizer

EOS = ByteTokenizer.eos_id
# Documents of the two sources differ, none is empty, some are longer than a row.
RNG = np.random.default_rng(3)
DOCUMENTS = {
    name: [
        np.append(RNG.integers(low, low + 100, 1 + 17 * i % 90), EOS).astype(np.int32)
        for i in range(60)
    ]
    for name, low in (("low", 0), ("high", 120))
}
TINY = {
    "steps": 50,
    "global_batch_size": 4,
    "model": {"vocab_size": 257},
    "data": {
        "source": "prepared",
        "tasks": ("low", "high"),
        "rates": (3.0, 1.0),
        "tokenizer": "bytes",
        "seq_len": 32,
    },
}
PACKINGS = ("mpt", "bins")


def write(root, documents, *, shards=3, dtype="<u2", held_out=8, tokenizer="bytes"):
    """A finished folder; the first ``held_out`` documents are validation, too."""
    written = {
        name: {
            split: tuple(
                prepared.write_shard(
                    root, f"{name}/{split}-{i:05d}-of-{n:05d}",
                    ids[len(ids) * i // n : len(ids) * (i + 1) // n], dtype=dtype,
                )
                for i in range(n)
            )
            for split, ids, n in (
                ("train", all_ids, shards), ("validation", all_ids[:held_out], 1)
            )
        }
        for name, all_ids in documents.items()
    }  # fmt: skip
    about = {"name": tokenizer, "fingerprint": tokenizer, "vocab_size": 257}
    manifest = prepared.Manifest(dtype, about | {"eos_id": EOS}, {}, written, {})
    prepared.write_manifest(root, manifest)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prepared"), DOCUMENTS)


@contextlib.contextmanager
def opened(root, overrides=None, *, index=0, count=1, split="train"):
    texts = {path: str(value) for path, value in (overrides or {}).items()}
    values = TINY | {"data": TINY["data"] | {"prepared": str(root)}}
    config = parse(TrainConfig, values, texts)
    source = feed.open_source(
        config, split=split, tokenizer=ByteTokenizer(),
        process_index=index, process_count=count,
    )  # fmt: skip
    with contextlib.closing(source):
        yield source


def take(source, n, name="tokens"):
    return np.concatenate([next(source)[name] for _ in range(n)])


ONE = {"data.tasks": "('low',)", "data.rates": "()", "global_batch_size": 1}


@pytest.mark.parametrize("packing", PACKINGS)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shards=st.integers(1, 3),
    dtype=st.sampled_from(["<u2", "<u4"]),
)
@settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_an_epoch_has_every_token_once(
    tmp_path_factory, packing, lengths, shards, dtype
):
    """In order within its document; and so has the next one, in another order."""
    numbers = iter(range(1, EOS))  # an id says where it is from
    documents = [np.array([next(numbers) for _ in range(n)], np.int32) for n in lengths]
    folder = write(
        tmp_path_factory.mktemp("epoch"), {"low": documents}, shards=shards,
        dtype=dtype, held_out=1,
    )  # fmt: skip
    changed = ONE | {"data.packing": packing, "data.seq_len": 16}
    with opened(folder, changed) as source:
        n = source._parts[0].layout.n_rows
        for _ in range(2):
            rows = [next(source) for _ in range(n)]
            used = [row["tokens"][row["segment_ids"] > 0] for row in rows]
            assert sorted(np.concatenate(used)) == list(range(1, sum(lengths) + 1))
            for row in rows:
                for segment in range(1, row["segment_ids"].max() + 1):
                    ids = row["tokens"][row["segment_ids"] == segment]
                    assert (np.diff(ids) == 1).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_of_one_source_drawn_by_rate(root, packing):
    with opened(root, {"data.packing": packing}) as source:
        tokens = take(source, 150)
        metrics = source.metrics()
    low = ((tokens < 120) | (tokens == EOS)).all(axis=1)
    high = (tokens >= 120).all(axis=1)
    assert (low ^ high).all()
    assert abs(low.mean() - 0.75) < 0.07  # 600 draws: four standard deviations
    used = np.array([np.count_nonzero(row != EOS) for row in tokens])
    share = used[low].sum() / used.sum()
    assert abs(metrics["share_of_tokens/low"] - share) < 0.02
    assert metrics["packing_efficiency"] > 0.9


@pytest.mark.parametrize("packing", PACKINGS)
def test_hosts_share_the_same_batches(root, packing):
    changed = {"data.packing": packing}
    with opened(root, changed) as whole:
        expected = [next(whole) for _ in range(12)]
        seen = whole.metrics()
    for count in (2, 4):
        with contextlib.ExitStack() as stack:
            hosts = [
                stack.enter_context(opened(root, changed, index=i, count=count))
                for i in range(count)
            ]
            for batch in expected:
                parts = [next(host) for host in hosts]
                for name, array in batch.items():
                    joined = np.concatenate([part[name] for part in parts])
                    np.testing.assert_array_equal(joined, array)
            assert all(host.metrics() == seen for host in hosts)


@given(at=st.integers(0, 10**9), packing=st.sampled_from(PACKINGS))
@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_resume_is_exact_at_any_step_and_number_of_hosts(root, at, packing):
    """Epochs past the end of the data, and no slower for it."""
    changed = {"data.packing": packing}
    with opened(root, changed) as source:
        source._batch = at
        state = source.state()
        expected = take(source, 3)
    parts = []
    for index in range(2):
        with opened(root, changed, index=index, count=2) as fresh:
            next(fresh)
            fresh.restore(state)
            parts.append(np.stack([next(fresh)["tokens"] for _ in range(3)]))
    np.testing.assert_array_equal(np.concatenate(parts, 1).reshape(-1, 32), expected)


def test_a_killed_run_sees_what_an_unbroken_one_does(root):
    rng = np.random.default_rng(0)
    with opened(root) as whole:
        expected = take(whole, 60)
    seen, state = [], None
    while len(seen) < 60:
        with opened(root) as source:
            if state is not None:
                source.restore(state)
            for _ in range(min(int(rng.integers(1, 9)), 60 - len(seen))):
                seen.append(next(source)["tokens"])
                state = source.state()
            take(source, 2)  # read ahead, then killed
    np.testing.assert_array_equal(np.concatenate(seen), expected)


def test_the_order_is_the_seeds(root):
    streams = []
    for seed in (17, 17, 18):
        with opened(root, {"seed": seed}) as source:
            streams.append(take(source, 5))
    np.testing.assert_array_equal(streams[0], streams[1])
    assert (streams[0] != streams[2]).any()


def test_another_run_is_refused_with_its_differences(root, tmp_path):
    with opened(root) as source:
        state = source.state()
    other = write(tmp_path, DOCUMENTS | {"high": DOCUMENTS["high"][:-1]})
    changed = {"seed": 18, "data.rates": "(1,1)", "data.packing": "bins"}
    with opened(other, changed) as source:
        with pytest.raises(CheckpointError, match="of another run") as e:
            source.restore(state)
    lines = [line.strip() for line in str(e.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in lines] == [
        "mixture.high", "mixture.low", "packing", "seed", "tokens.high",
    ]  # fmt: skip
    assert "packing: saved with 'mpt', now 'bins'" in lines


def test_epochs_are_exact(root):
    """Each source as often as asked for, over the rows that this makes."""
    changed = {"data.rates": "()", "data.epochs": "(2,1)", "global_batch_size": 1}
    with opened(root, changed) as source:
        rows = [part.layout.n_rows for part in source._parts]
        tokens = take(source, 2 * rows[0] + rows[1])
        assert source.metrics()["share_of_tokens/low"] == pytest.approx(
            2 * source._parts[0].layout.tokens
            / (2 * source._parts[0].layout.tokens + source._parts[1].layout.tokens)
        )  # fmt: skip
    counted = collections.Counter(tokens[tokens != EOS].tolist())
    for name, epochs in (("low", 2), ("high", 1)):
        ids = np.concatenate(DOCUMENTS[name])
        for token, n in collections.Counter(ids[ids != EOS].tolist()).items():
            assert counted[token] == epochs * n


def test_validation_ends_and_is_the_same_for_any_seed(root):
    runs = []
    for seed in (17, 18):
        with opened(root, ONE | {"seed": seed}, split="validation") as source:
            runs.append([batch["tokens"] for batch in source])
    np.testing.assert_array_equal(*runs)
    ids = np.concatenate(DOCUMENTS["low"][:8])
    assert sum(np.count_nonzero(row != EOS) for row in runs[0]) == (ids != EOS).sum()


def test_the_log_says_what_is_read(root):
    with opened(root) as source:
        first, low, high = source.describe().splitlines()
    assert first == "prepared data, in the same order for any number of hosts:"
    assert low.startswith("  low: 60 documents, ")
    assert "75.00% of the rows" in low
    assert "epochs in 50 steps" in high


def test_validation_is_of_the_sources_that_have_it(tmp_path):
    folder = write(tmp_path, {"low": DOCUMENTS["low"]})
    manifest = prepared.read_manifest(folder)
    high = write(tmp_path / "h", {"high": DOCUMENTS["high"]}, held_out=0)
    (folder / "high").mkdir()
    for path in (high / "high").iterdir():
        path.rename(folder / "high" / path.name)
    shards = manifest.shards | prepared.read_manifest(high).shards
    prepared.write_manifest(folder, dataclasses.replace(manifest, shards=shards))
    with opened(folder, split="validation") as source:
        assert source.metrics() == {}
        next(source)
        assert source.metrics()["share_of_tokens/low"] == 1


def test_truncated_documents_end_with_eos(root):
    changed = ONE | {"data.packing": "bins", "data.on_long": "truncate"}
    with opened(root, changed) as source:
        batches = [next(source) for _ in range(source._parts[0].layout.n_rows)]
    ends = 0
    for batch in batches:
        tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
        last = np.flatnonzero(np.diff(np.append(segments, 0)) != 0)
        last = [i for i in last if segments[i]]
        assert (tokens[last] == EOS).all()
        ends += len(last)
    assert ends == len(DOCUMENTS["low"])


# ------------------------------------------------------------------------ what is wrong


def spoil(root, tmp_path, name, change):
    """A copy whose file ``name`` has the bytes that ``change`` makes of its own."""
    copy = tmp_path / "spoiled"
    for path in root.rglob("*"):
        if path.is_file():
            to = copy / path.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    path = copy / name
    content = change(bytearray(path.read_bytes()))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return copy


def flip(content):
    content[len(content) // 2] ^= 4
    return content


@pytest.mark.parametrize("kind", ["tokens", "index", "crc"])
def test_a_flipped_bit_is_found(root, tmp_path, kind):
    name = f"low/train-00001-of-00003.{kind}"
    copy = spoil(root, tmp_path, name, flip)
    with pytest.raises(DataError, match=f"{name}: its sha256 is not the manifest's"):
        prepared.verify(copy)
    with pytest.raises(DataError, match=name), opened(copy) as source:
        take(source, 100)  # tokens: when a row is read from there, index: at once


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-1], r"\d+ bytes, the manifest says \d+"),
        (lambda content: content + b"x", r"\d+ bytes, the manifest says \d+"),
        (lambda content: None, "is missing: No such file"),
    ],
)
@pytest.mark.parametrize("kind", ["tokens", "index", "crc"])
def test_another_size_is_found_at_once(root, tmp_path, kind, change, reason):
    name = f"high/train-00002-of-00003.{kind}"
    copy = spoil(root, tmp_path, name, change)
    with pytest.raises(DataError, match=f"{name}: .*{reason}"), opened(copy):
        pass


def test_damage_after_opening_is_found(root, tmp_path):
    """A row is checked when it is read; a file cut short is no SIGBUS."""
    name = "low/train-00000-of-00003.tokens"
    copy = spoil(root, tmp_path, name, bytes)
    with opened(copy, ONE) as source:
        next(source)
        os.truncate(copy / name, 100)
        with pytest.raises(DataError, match=f"{name}: cut short since it was opened"):
            take(source, 200)
    copy = spoil(root, tmp_path, name, bytes)
    with opened(copy, ONE) as source:
        (copy / name).write_bytes(flip(bytearray((copy / name).read_bytes())))
        with pytest.raises(DataError, match=f"{name}: .*checksum is wrong"):
            take(source, 200)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip, "not a manifest|its checksum is wrong"),
        (lambda c: c.replace(b'"documents": 20', b'"documents": 21'), "its checksum"),
        (lambda c: c[:-30], "not a manifest"),
        (lambda c: b"[]", "not a manifest"),
        (lambda c: None, "it was not finished; run the same python -m mpt_jax.prepare"),
    ],
)
def test_a_damaged_manifest_is_refused(root, tmp_path, change, reason):
    copy = spoil(root, tmp_path, "manifest.json", change)
    with pytest.raises(DataError, match=reason), opened(copy):
        pass


def test_another_format_is_refused(root, tmp_path):
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["format"] = 99
    manifest["sha256"] = prepared._digest(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another format"), opened(tmp_path):
        pass


def test_what_is_not_there_is_refused(root, tmp_path):
    with (
        pytest.raises(DataError, match="no prepared data here"),
        opened(tmp_path / "x"),
    ):
        pass
    with pytest.raises(ConfigError, match=r"no source 'hihg'.*did you mean \"high\""):
        with opened(root, {"data.tasks": "('low','hihg')"}):
            pass
    bare = write(tmp_path / "bare", {"low": DOCUMENTS["low"]}, held_out=0)
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=r"^low: no validation split; .* holdout="):
            with opened(bare, ONE, split=split):
                pass
    with opened(bare, ONE | {"eval.batches": 0}) as source:
        next(source)


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path, DOCUMENTS, tokenizer="other.model")
    with pytest.raises(DataError, match=r"prepared with tokenizer 'other\.model'"):
        with opened(tmp_path):
            pass


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    """Bytes that are as they were written, of a tokenizer that was not this one."""
    documents = {"low": [np.array([1, 2, 999, EOS])] * 9}
    write(tmp_path, documents, held_out=1)
    with opened(tmp_path, ONE) as source:
        with pytest.raises(DataError, match=r"train split of low.*row 0 has id 999"):
            take(source, 9)


def test_ids_that_the_files_cannot_hold_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"document 0: expected ids in 0 to 65535"):
        prepared.write_shard(tmp_path, "a", [np.array([2**16])], dtype="<u2")
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_plain_arrays(root):
    shard = prepared.read_manifest(root).shards["low"]["train"][1]
    tokens = np.memmap(f"{root / shard.path}.tokens", "<u2")
    ends = np.fromfile(f"{root / shard.path}.index", "<i8")
    expected = DOCUMENTS["low"][20:40]
    got = np.split(tokens, ends[:-1])
    assert [ids.tolist() for ids in got] == [ids.tolist() for ids in expected]


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "MAX_OPEN_FILES", 2)
    write(tmp_path, DOCUMENTS, shards=9)
    with opened(tmp_path) as source:
        take(source, 60)
        tokens = source._parts[0].tokens
        assert len(tokens._open) == 2
        assert tokens.n_documents == 60


def test_reading_needs_no_tensorflow(root):
    values = TINY | {"data": TINY["data"] | {"prepared": str(root)}}
    code = (
        "import sys\nfrom mpt_jax.config import TrainConfig, parse\n"
        "from mpt_jax.data import feed\n"
        f"config = parse(TrainConfig, {values}, {{}})\n"
        "host = {'process_index': 0, 'process_count': 1}\n"
        "source = feed.open_source(config, tokenizer=feed.tokenizer(config), **host)\n"
        "next(source)\n"
        "bad = {'tensorflow', 'seqio', 'apache_beam', 'jax'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_of_a_position_is_named(root):
    """What a PreparedSource depends on is in its header: nothing else makes rows."""
    with opened(root) as source:
        assert isinstance(source, indexed.PreparedSource)
        assert set(source._header) == {
            "source", "split", "seed", "seq_len", "global_batch_size", "tokenizer",
            "tokens", "mixture", "packing", "on_long",
        }  # fmt: skip
