"""Files to documents, in plain Python; TFRecord and TFDS are in test_file_tasks.py."""

import gzip
import json
import pickle

import pyarrow
import pytest
from pyarrow import parquet

from mpt_jax.data import sources
from mpt_jax.errors import ConfigError, DataError

TEXTS = [f"document {i}\nwith caf\u00e9 and \U0001f600 {'x' * i}" for i in range(40)]


def jsonl(texts, **more) -> bytes:
    rows = ({"text": text, "id": i, **more} for i, text in enumerate(texts))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


def read(spec: str, split: str = "train") -> list:
    corpus = sources.parse(spec)
    return [
        row for file in corpus.files(split)
        for row in sources.documents(corpus, file, split)
    ]  # fmt: skip


def texts(spec: str, split: str = "train") -> list[str]:
    rows = read(spec, split)
    assert all(isinstance(row, sources.Document) for row in rows), rows
    return [row.text for row in rows]


# ----------------------------------------------------------------------------- specs


def test_a_spec_is_a_format_a_path_and_keys():
    spec = sources.parse(
        "jsonl:gs://b/c4-?.json?name=c4&field=meta.body&holdout=0.01&filter=mc4"
    ).spec
    assert (spec.format, spec.path, spec.name) == ("jsonl", "gs://b/c4-?.json", "c4")
    assert (spec.field, spec.holdout, spec.filter) == ("meta.body", 0.01, "mc4")
    assert sources.parse("text:a?train=%2A.txt").spec.train == "*.txt"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("jsonl:/data/c4_en.00001.json.gz", "c4_en"),
        ("text:~/novels/", "novels"),
        ("text:/src/linux-6/**/*.c", "linux_6"),
        ("tfds:c4/en:3.0.1", "c4_en"),
        ("parquet:*.parquet", "data"),
    ],
)
def test_a_name_is_taken_from_the_path(spec, name):
    assert sources.parse(spec).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsnl:a", "unknown format 'jsnl'.*did you mean \"jsonl\""),
        ("jsonl:", "no path"),
        ("jsonl:a?feild=x", "unknown key 'feild' of jsonl.*did you mean \"field\""),
        ("text:a?field=x", "unknown key 'field' of text"),
        ("jsonl:a?data_dir=x", "unknown key 'data_dir' of jsonl"),
        ("jsonl:a?holdout=2", r"holdout: a share in \(0, 1\)"),
        ("jsonl:a?holdout=half", r"holdout: a share in \(0, 1\)"),
        ("jsonl:a?holdout=0.1&validation=v", "validation or holdout, not both"),
        ("text:a?document=word", "document: 'file' or 'line', got 'word'"),
        ("jsonl:a?filter=mc5", "filter: unknown 'mc5'.*did you mean \"mc4\""),
        ("jsonl:a?name=a b", "name: letters, digits"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sources.parse(spec)
    assert spec in str(caught.value)


def test_all_that_is_wrong_comes_at_once():
    with pytest.raises(ConfigError) as caught:
        sources.parse("jsonl:a?holdout=2&feild=x")
    assert len(caught.value.problems) == 2


# --------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    half = [pack(jsonl(TEXTS[:20])), pack(jsonl(TEXTS[20:]))]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(half[0])
    (tmp_path / f"b.jsonl{suffix}").write_bytes(half[1])
    assert texts(f"jsonl:{tmp_path}") == TEXTS
    # Both formats may hold several members, as a parallel compressor writes them.
    (tmp_path / f"ab.jsonl{suffix}").write_bytes(b"".join(half))
    assert texts(f"jsonl:{tmp_path}/ab.jsonl{suffix}") == TEXTS


def test_text_is_a_document_per_file_or_line(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "sub" / "b.txt.gz").write_bytes(gzip.compress(b"\nthree\n\nfour"))
    assert texts(f"text:{tmp_path}") == ["one\r\ntwo\n", "\nthree\n\nfour"]
    rows = read(f"text:{tmp_path}?document=line")
    assert [(row.text, row.line) for row in rows] == [
        ("one", 1), ("two", 2), ("three", 2), ("four", 4),
    ]  # fmt: skip


def test_parquet_of_several_batches(tmp_path):
    table = pyarrow.table({"content": TEXTS * 4, "n": list(range(160))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert texts(f"parquet:{tmp_path}?field=content") == TEXTS * 4
    with pytest.raises(DataError, match="no column 'text'; it has content, n"):
        read(f"parquet:{tmp_path}")


def test_parquet_that_is_not_utf8_is_a_bad_row(tmp_path):
    content = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, content.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    good, bad = read(f"parquet:{tmp_path}")
    assert good.text == "good"
    assert (bad.reason, bad.detail, bad.line) == ("not UTF-8", "byte 0xe9 at 3", 2)


def test_fields_may_be_nested_and_dotted(tmp_path):
    rows = [{"meta": {"body": "a"}}, {"meta.body": "b"}, {"meta": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second, third = read(f"jsonl:{tmp_path}?field=meta.body")
    assert (first.text, second.text) == ("a", "b")
    assert third.reason == "missing field"


# ----------------------------------------------------------------------------- files


def test_a_folder_gives_its_files_of_the_format_and_names_the_others(tmp_path, capsys):
    for name in ("b.jsonl", "a.json.gz", "README.md"):
        content = jsonl(["x"])
        (tmp_path / name).write_bytes(
            gzip.compress(content) if name[-1] == "z" else content
        )
    files = sources.parse(f"jsonl:{tmp_path}").files("train")
    assert files == [f"{tmp_path}/a.json.gz", f"{tmp_path}/b.jsonl"]
    assert "1 files are not jsonl, the first is" in capsys.readouterr().err


def test_globs_go_down_folders(tmp_path):
    for name in ("a/x.py", "a/b/y.py", "z.py", "a/b/n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}/**/*.py") == ["a/b/y.py", "a/x.py", "z.py"]
    assert texts(f"text:{tmp_path}/a/?.py") == ["a/x.py"]


def test_validation_files_are_not_trained_on(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "valid.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    corpus = sources.parse(f"jsonl:{tmp_path}?validation=valid*")
    assert corpus.splits == ("train", "validation")
    assert corpus.files("validation") == [f"{tmp_path}/valid.jsonl"]
    assert corpus.files("train") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]


def test_a_holdout_splits_by_text_for_good(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS + TEXTS))
    parts = {
        split: texts(f"jsonl:{tmp_path}?holdout=0.3", split)
        for split in ("train", "validation")
    }
    assert sorted(parts["train"] + parts["validation"]) == sorted(TEXTS + TEXTS)
    assert not set(parts["train"]) & set(parts["validation"])
    assert 8 <= len(parts["validation"]) <= 40  # 24 expected of 80, in pairs
    more = set(texts(f"jsonl:{tmp_path}?holdout=0.5", "validation"))
    assert more > set(parts["validation"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsonl:{}/missing.jsonl", "missing.jsonl: no such file or folder"),
        ("jsonl:{}/missing/*.jsonl", r"\*.jsonl: no file matches"),
        ("jsonl:{}/empty", "no jsonl file in this folder: it is empty"),
        ("parquet:{}", r"no parquet file in this folder: it has .*a\.txt; name files"),
    ],
)
def test_missing_data_is_named(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        read(spec.format(tmp_path))


def test_a_split_that_is_not_there_says_how_to_get_one(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no validation split; give validation= or"):
        read(f"text:{tmp_path}", "validation")


def test_a_fingerprint_is_of_the_data_not_of_where_it_lies(tmp_path):
    prints = []
    for folder, content in (("a", b"xy"), ("b", b"xy"), ("c", b"xyz")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_bytes(content)
        corpus = sources.parse(f"text:{tmp_path / folder}?name=t")
        prints.append(corpus.fingerprint())
    assert prints[0] == prints[1] != prints[2]
    split = sources.parse(f"text:{tmp_path}/a?name=t&holdout=0.5").fingerprint()
    assert split != prints[0]


# ----------------------------------------------------------------------------- rows


def test_reading_may_begin_at_any_row(tmp_path):
    content = jsonl(TEXTS).splitlines(keepends=True)
    content[3:3] = [b"\n", b"not JSON\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(content))
    corpus = sources.parse(f"jsonl:{tmp_path}?holdout=0.3&id=id")
    (file,) = corpus.files("train")
    rows = list(corpus.rows(file, "train"))
    assert len(rows) == len(TEXTS) + 1
    for start in (0, 1, 3, 4, 17, 41):
        assert list(corpus.rows(file, "train", start)) == rows[start:]
    assert list(corpus.rows(file, "train", 99)) == []


def test_a_corpus_can_be_sent_to_a_worker(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    corpus = pickle.loads(pickle.dumps(sources.parse(f"text:{tmp_path}")))
    (file,) = corpus.files("train")
    rows = list(sources.documents(corpus, file, "train"))
    assert rows == [sources.Document("x", str(tmp_path / "a.txt"), 1)]


def test_a_filter_says_why_and_gets_its_fields(tmp_path):
    rows = [{"text": "int x;", "lang": "C"}, {"text": "x", "lang": "COBOL"},
            {"text": "x"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, dropped, bad = read(f"jsonl:{tmp_path}?filter=stack")
    assert kept.text == "int x;"
    assert (dropped.kind, dropped.reason) == ("filtered", "another language")
    assert (bad.kind, bad.reason) == ("bad", "missing field")


def test_the_published_counts_of_real_files(shared_data):
    golden = json.loads((shared_data / "tokenizer" / "golden.json").read_text())
    counted = {d["file"]: d["docs"] for d in golden["documents"]}
    for name in ("cc_web", "wikipedia", "stackexchange"):
        found = texts(f"jsonl:{shared_data}/pretrain/{name}.jsonl.gz")
        assert len(found) == counted[f"pretrain/{name}.jsonl.gz"]
