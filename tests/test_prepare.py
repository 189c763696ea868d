"""The prepare verb, in one file: Beam and TensorFlow take 15 s to import."""

import gzip
import json
import re

import numpy as np
import pytest

from mpt_jax.config import DataConfig
from mpt_jax.data import feed, prepared
from mpt_jax.errors import DataError, UserError
from mpt_jax.prepare import main, prepare
from mpt_jax.tokenizer import ByteTokenizer

pytest.importorskip("apache_beam", reason="needs the beam extra")

EOS = ByteTokenizer.eos_id
CONFIG = """
from ml_collections import ConfigDict
from mpt_jax import presets

def get_config() -> ConfigDict:
    config = presets.config()
    config.steps = 1
    config.model.vocab_size = 384
    config.data.tasks = {tasks!r}
    config.data.rates = ()
    config.data.tokenizer = "bytes"
    return config
"""


def documents(name, n):
    return [f"{name} document {i} " + "x" * (i % 37) for i in range(n)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three files of JSON lines and one of plain lines."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(3):
        with gzip.open(folder / f"part-{i}.jsonl.gz", "wt") as file:
            for document in documents(f"part {i}", 40 + i):
                file.write(json.dumps({"text": document}) + "\n")
    (folder / "plain.txt").write_text("\n".join(documents("plain", 25)))
    return folder


def data(text, **changed):
    values = {
        "tasks": (
            f"jsonl:{text}/part-*.jsonl.gz?name=parts&holdout=0.2",
            f"text:{text}/plain.txt?document=line",
        ),
        "rates": (),
        "tokenizer": "bytes",
    }
    return DataConfig(**values | changed)


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "whole"
    prepare(data(text), out)
    return out


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(folder, source, split):
    tokens = prepared.Tokens(
        folder, prepared.read_manifest(folder), source=source, split=split
    )
    ids = np.concatenate([*tokens.read(0, tokens.n_tokens)])
    tokens.close()
    found = np.split(ids, tokens.ends_N[:-1])
    assert all(document[-1] == EOS for document in found)
    return [bytes(document[:-1].astype(np.uint8)).decode() for document in found]


def test_every_document_is_there_once_in_order(folder):
    parts = [d for i in range(3) for d in documents(f"part {i}", 40 + i)]
    train, held_out = (texts_of(folder, "parts", s) for s in ("train", "validation"))
    assert sorted(train + held_out) == sorted(parts)
    assert train == [d for d in parts if d in set(train)]
    assert 0.1 < len(held_out) / len(parts) < 0.3
    assert texts_of(folder, "plain", "train") == documents("plain", 25)


def test_documents_have_the_same_tokens_raw(folder, text):
    """Raw validation is in order, and so are the files of prepared data."""
    from mpt_jax.config import TrainConfig

    one = data(text, tasks=data(text).tasks[:1], seq_len=16, shuffle_buffer=0)
    config = TrainConfig(steps=1, global_batch_size=1, data=one)
    source = feed.open_source(
        config, split="validation", tokenizer=ByteTokenizer(), process_index=0,
        process_count=1,
    )  # fmt: skip
    raw = np.concatenate([batch["tokens"].ravel() for batch in source])
    source.close()
    joined = "".join(f"{d}|" for d in texts_of(folder, "parts", "validation"))
    assert "".join("|" if i == EOS else chr(i) for i in raw) == joined[: raw.size]
    assert raw.size > 100


def test_a_folder_is_complete_and_says_what_it_holds(folder):
    manifest = prepared.verify(folder)
    assert {len(s) for s in manifest.shards["parts"].values()} == {3}
    assert manifest.tokenizer["fingerprint"] == "bytes"
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "report.md", "lengths.png", "parts", "plain",
    }  # fmt: skip
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]
    report = (folder / "report.md").read_text()
    tokens = sum(len(d) + 1 for d in documents("plain", 25))
    assert f"| plain | train | 25 | {tokens:,} | {tokens / 25:,.0f} | none |" in report
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, text, tmp_path):
    from mpt_jax.data import caching

    out, real, written = tmp_path / "out", prepared.write_shard, []

    def killed(*arguments, **more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[1])
        return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching.prepared, "write_shard", killed)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            prepare(data(text), out)
    with pytest.raises(DataError, match="it was not finished"):
        prepared.read_manifest(out)
    again = []

    def counted(*arguments, **more):
        again.append(arguments[1])
        return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching.prepared, "write_shard", counted)
        prepare(data(text), out)
    assert not set(again) & set(written), "a finished shard was made again"
    assert contents(out) == contents(folder)


def test_a_finished_folder_is_left_as_it_is(folder, text):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    prepare(data(text), folder)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_something_else_is_refused(folder, text, tmp_path):
    other = data(text, tasks=data(text).tasks[:1])
    with pytest.raises(UserError, match=r"of another preparation.*\n  sources\.plain"):
        prepare(other, folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, it has 'notes\.txt'"):
        prepare(data(text), tmp_path)
    with pytest.raises(UserError, match="no text to prepare in 'synthetic'"):
        prepare(data(text, source="synthetic"), tmp_path / "x")


def test_bad_rows_stop_it_or_are_reported(tmp_path):
    rows = [json.dumps({"text": d}) for d in documents("row", 50)]
    rows[7] = '{"text": 3}'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    tasks = (f"jsonl:{file}",)
    with pytest.raises(DataError, match=rf"{file}:8"):
        prepare(data(tmp_path, tasks=tasks), tmp_path / "out")
    some = data(tmp_path, tasks=tasks, max_bad_fraction=0.02)
    manifest = prepare(some, tmp_path / "out")  # the same folder goes on
    found = manifest.report["rows"]["train"]
    assert found["documents"] == 49
    assert sum(found["bad"].values()) == 1
    assert "| 1 " in (tmp_path / "out" / "report.md").read_text()


def test_filtered_rows_are_counted_by_reason(tmp_path):
    rows = [{"text": "few words"}, {"text": " ".join(f"word{i}" for i in range(300))}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = (f"jsonl:{file}?filter=mc4",)
    manifest = prepare(data(tmp_path, tasks=tasks), tmp_path / "out")
    assert manifest.report["rows"]["train"]["filtered"] == {"fewer than 200 words": 1}


def test_a_tokenizer_is_trained_on_the_text(text, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(data(text), out, train_tokenizer=300)
    assert manifest.tokenizer["vocab_size"] == 300
    assert manifest.tokenizer["name"] == "tokenizer.model"
    from mpt_jax.tokenizer import load

    tokenizer = load(str(out / "tokenizer.model"))
    tokens = prepared.Tokens(out, manifest, source="plain", split="train")
    ids = next(tokens.read(0, int(tokens.ends_N[0])))
    tokens.close()
    assert tokenizer.decode(ids[:-1]) == documents("plain", 1)[0]
    assert ids[-1] == tokenizer.eos_id == 0


def test_the_verb(text, folder, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tasks=data(text).tasks))
    out = tmp_path / "out"
    assert main(["--config", str(config), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^plain train: 25 documents, [\d,]+ tokens, 0 rows", said, re.M)
    assert said.endswith(f"{out}: complete and as its manifest says\n")
    assert contents(out) == contents(folder)
    assert main(["--out", str(out), "--verify"]) == 0
    shard = out / "plain" / "train-00000-of-00001.tokens"
    shard.write_bytes(b"!" + shard.read_bytes()[1:])
    capsys.readouterr()
    assert main(["--out", str(out), "--verify"]) == 3
    assert f"data error: {shard}: its sha256 is not" in capsys.readouterr().err
    assert main(["--out", str(out)]) == 2
    assert "--config: expected a file" in capsys.readouterr().err
