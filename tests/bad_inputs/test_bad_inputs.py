"""What a user may get wrong, and what is said: one row per mistake.

Each is tried and called clear (an MptError of the right kind that names what is wrong
and where), silent (accepted), traceback (any other exception) or hang. Only clear
passes. The second table is of odd input that is right: it gives the text it holds.
"""

import gzip
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mpt_jax import tokenizer
from mpt_jax.config import TrainConfig, parse
from mpt_jax.data import feed, packing, sources
from mpt_jax.data.ledger import Ledger
from mpt_jax.errors import ConfigError, DataError, MptError
from mpt_jax.tokenizer import ByteTokenizer

HANG_SECONDS = 20.0  # a case takes milliseconds; the cores may be busy

GOOD = b'{"text": "a good row"}\n'


def row(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def zstd(content: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


def table(*texts: object) -> bytes:
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts)}), stream)
    return stream.getvalue().to_pybytes()


NOISE = np.random.default_rng(0).bytes(4000).hex().encode()  # what does not compress
PACKED = gzip.compress(row(text=NOISE.decode()) * 3)
FLIPPED = PACKED[:2000] + bytes([PACKED[2000] ^ 255]) + PACKED[2001:]

# Name -> (file, content, keys, what is said). Row 2 of the file is the bad one.
FILES: dict[str, tuple[str, bytes, str, str]] = {
    "bad JSON": (
        "a.jsonl", GOOD + b'{"text": "x"\n', "", r"a\.jsonl:2: bad JSON: Expecting"),
    "half a row": ("a.jsonl", GOOD + b'{"te', "", r"a\.jsonl:2: bad JSON"),
    "not an object": (
        "a.jsonl", GOOD + b'["text"]\n', "", ":2: bad JSON: .*this is a list"),
    "JSON text": ("a.jsonl", GOOD + b'"text"\n', "", ":2: bad JSON: .*this is text"),
    "a number for text": (
        "a.jsonl", GOOD + row(text=7), "", ":2: wrong type: .*'text' is a number"),
    "a list for text": (
        "a.jsonl", GOOD + row(text=["x"]), "", ":2: wrong type: .* is a list"),
    "null for text": ("a.jsonl", GOOD + row(text=None), "", ":2: wrong type.* is null"),
    "missing field": (
        "a.jsonl", GOOD + row(txt="x"), "", ":2: missing field: .*'txt'"),
    "missing nested field": (
        "a.jsonl", row(m={"b": "x"}) + row(m={}), "field=m.b", ":2: missing field"),
    "missing filter field": (
        "a.jsonl", row(text="x", lang="C") + GOOD, "filter=stack",
        ":2: missing field: no field 'lang'"),
    "not UTF-8": (
        "a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "", ":2: not UTF-8: byte 0xe9"),
    "text not UTF-8": ("a.txt", b"caf\xe9", "", r"a\.txt:1: not UTF-8: byte 0xe9 at 3"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "", "it is UTF-16; convert"),
    "UTF-16 text": ("a.txt", "text".encode("utf-16"), "", "UTF-16; convert it: iconv"),
    "UTF-32": ("a.txt", "text".encode("utf-32"), "", "it is UTF-32; convert"),
    "UTF-16 without mark": (
        "a.jsonl", GOOD.decode().encode("utf-16-le"), "", ":1: bad JSON"),
    "UTF-16 text without mark": (
        "a.txt", "text".encode("utf-16-le"), "", ":1: NUL character"),
    "empty text": ("a.jsonl", GOOD + row(text=""), "", ":2: blank text: 0 char"),
    "blank text": ("a.jsonl", GOOD + row(text=" \n\t"), "", ":2: blank text: 3 char"),
    "NUL": ("a.jsonl", GOOD + row(text="a\0b"), "", ":2: NUL character: character 1"),
    "lone surrogate": (
        "a.jsonl", GOOD + b'{"text": "ab\\ud800"}\n', "",
        ":2: lone surrogate: character 2"),
    "nested 2,000 deep": (
        "a.jsonl",
        GOOD + b'{"text": "x", "m": ' + b"[" * 2000 + b"]" * 2000 + b"}\n",
        "", ":2: nested too deeply: more than 500"),
    "an integer of 5,000 digits": (
        "a.jsonl", GOOD + b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "",
        ":2: bad JSON: Exceeds the limit"),
    "duplicate ids": (
        "a.jsonl", row(text="x", id=3) + row(text="y", id=3), "id=id",
        ":2: duplicate id: id 3 was in line 1"),
    "empty file": ("a.jsonl", b"", "", r"a\.jsonl:0: empty file"),
    "empty text file": ("a.txt", b"", "", "blank text"),
    "a file of blank lines": ("a.jsonl", b"\n \n", "", "empty file: it holds no rows"),
    "truncated gzip": ("a.jsonl.gz", PACKED[:-30], "", "cannot be read to its end"),
    "damaged gzip": ("a.jsonl.gz", FLIPPED, "", "cannot be read to its end"),
    "not a gzip": ("a.jsonl.gz", GOOD, "", "to its end: Not a gzipped file"),
    "truncated zstd": (
        "a.jsonl.zst", zstd(row(text="x" * 9))[:-3], "", "Truncated compressed stream"),
    "not a zstd": ("a.jsonl.zst", GOOD, "", "to its end: ZSTD decompress failed"),
    "not a Parquet file": ("a.parquet", GOOD * 9, "", r"a\.parquet: the file"),
    "truncated Parquet": ("a.parquet", table("x")[:-9], "", "the file cannot be"),
    "no such column": ("a.parquet", table("x"), "field=body", "no column 'body'"),
    "null in Parquet": ("a.parquet", table("x", None), "", ":2: wrong type.* is null"),
    "numbers in Parquet": ("a.parquet", table(1, 2), "", ":1: wrong type.* number"),
    "a file of another name": ("a.csv", GOOD, "", r"no jsonl file in this .*a\.csv"),
    "nothing kept": (
        "a.jsonl", row(text="x", lang="COBOL"), "filter=stack", "none of its 1 rows"),
    "no validation split": (
        "a.jsonl", GOOD, "split=validation", "no validation split; give validation="),
}  # fmt: skip

# Name -> (path, what is said).
PATHS = {
    "missing file": ("{}/b.jsonl", r"b\.jsonl: no such file or folder"),
    "missing folder": ("{}/b/", "no such file or folder"),
    "empty folder": ("{}", "no jsonl file in this folder: it is empty"),
    "a glob of nothing": ("{}/*.jsonl", r"\*\.jsonl: no file matches"),
}

# Name -> (changes of the configuration, what is said).
CONFIGS = {
    "unknown task": ({"tasks": ("stdlib_cod",)}, 'unknown task .*mean "stdlib_code"'),
    "unknown format": ({"tasks": ("jsn:a",)}, "unknown format 'jsn'"),
    "unknown key": ({"tasks": ("jsonl:a?feild=x",)}, 'unknown key .*mean "field"'),
    "unknown filter": ({"tasks": ("jsonl:a?filter=mc3",)}, "filter: unknown 'mc3'"),
    "holdout of 200 %": ({"tasks": ("jsonl:a?holdout=2",)}, "holdout: a share in"),
    "a source named twice": ({"tasks": ("text:a", "jsonl:b/a")}, "'a' is named twice"),
    "no source": ({"tasks": ()}, "data.tasks: name at least one"),
    "a rate too many": ({"rates": (1.0, 2.0)}, "data.rates: 2 rates for 1 tasks"),
    "a rate of zero": ({"rates": (0.0,)}, "data.rates: must be > 0"),
    "a negative rate": ({"rates": (-1.0,)}, "data.rates: must be > 0"),
    "a rate of NaN": ({"rates": (float("nan"),)}, "data.rates: expected"),
    "epochs of raw data": ({"epochs": (2.0,)}, "only prepared data knows its size"),
    "prepared without a directory": ({"source": "prepared"}, "data.prepared: a direct"),
    "a directory that is not read": ({"prepared": "/p"}, "data.prepared: a directory"),
    "all rows may be bad": (
        {"max_bad_fraction": 1.0},
        "data.max_bad_fraction: a share",
    ),
    "a packing that is none": ({"packing": "binz"}, "data.packing: expected one of"),
    "a tokenizer that is larger": ({"tokenizer": "bytes"}, "has 257 ids but model.voc"),
}


def read(spec: str, split: str = "train") -> list[str]:
    """Every document of a source, as the prepare verb reads it."""
    corpus, ledger = sources.parse(spec), Ledger()
    rows = (
        row for file in corpus.files(split)
        for row in sources.documents(corpus, file, split)
    )  # fmt: skip
    texts = [ledger.admit(corpus.name, row) for row in rows]
    ledger.finish()
    return texts


def read_file(folder: Path, name: str, content: bytes, keys: str) -> list[str]:
    (folder / name).write_bytes(content)
    kind = {".txt": "text", ".parquet": "parquet"}.get(Path(name).suffix, "jsonl")
    if keys == "split=validation":
        return read(f"{kind}:{folder}", "validation")
    return read(f"{kind}:{folder}" + (f"?{keys}" if keys else ""))


def open_config(data: dict) -> None:
    values = {"steps": 1, "model": {"vocab_size": 256}}
    base = {"tasks": ("stdlib_code",), "rates": (), "tokenizer": "bytes"}
    config = parse(TrainConfig, values | {"data": base | data})
    host = {"process_index": 0, "process_count": 1}
    feed.open_source(config, tokenizer=ByteTokenizer(), **host)


def tokens_out_of_range() -> None:
    tokens_BL = np.array([[1, 2], [3, 999]])
    packing.check_ids(tokens_BL, vocab_size=300, location="train split of c4")


def load_tokenizer(folder: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (folder / name.partition("+")[0]).write_bytes(content)
    tokenizer.load(str(folder / name))


NO_EOS = b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
# Name -> (file, content, what is said).
TOKENIZERS = {
    "a missing tokenizer": ("t.json", None, "cannot read the tokenizer: No such file"),
    "a tokenizer that is none": ("t.json", b"{}", "not a tokenizer.json of Hugging"),
    "a model that is none": ("t.model", b"\0\1", "not a SentencePiece model"),
    "an empty model": ("t.model", b"", "not a SentencePiece model"),
    "a tokenizer without EOS": ("t.json", NO_EOS, "no end-of-text token: looked for"),
    "an unknown extension": ("t.json+chat", NO_EOS, "unknown extension 'chat'"),
    "ChatML of a model": ("t.model+chatml", b"x", "only a tokenizer.json can be"),
}


def cases() -> dict[str, tuple[Callable[[Path], object], str]]:
    table: dict[str, tuple[Callable[[Path], object], str]] = {}
    for name, (*case, message) in FILES.items():
        table[name] = (lambda folder, case=case: read_file(folder, *case), message)
    for name, (path, message) in PATHS.items():
        table[name] = (
            lambda folder, p=path: read("jsonl:" + p.format(folder)),
            message,
        )
    for name, (changes, message) in CONFIGS.items():
        table[name] = (lambda folder, c=changes: open_config(c), message)
    for name, (*case, message) in TOKENIZERS.items():
        table[name] = (lambda folder, case=case: load_tokenizer(folder, *case), message)
    table["ids out of range"] = (
        lambda folder: tokens_out_of_range(),
        "train split of c4: row 1 has id 999 at token 1; .* 0 to 299",
    )
    return table


def outcome(run: Callable[[], object]) -> tuple[str, BaseException | None]:
    """What comes of a case, and the error."""
    caught: list[BaseException | None] = []

    def call() -> None:
        try:
            run()
            caught.append(None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    if not caught:
        return "hang", None
    error = caught[0]
    if error is None:
        return "silent", None
    clear = isinstance(error, MptError) and "Traceback" not in str(error)
    return "clear" if clear else "traceback", error


@pytest.mark.parametrize("name", cases())
def test_a_bad_input_is_refused_clearly(name, tmp_path, record_property):
    run, message = cases()[name]
    found, error = outcome(lambda: run(tmp_path))
    if found == "clear" and not re.search(message, str(error)):
        found = "unclear"
    record_property("outcome", found)
    assert found == "clear", f"{type(error).__name__}: {error}"
    assert isinstance(error, ConfigError if name in CONFIG_ERRORS else DataError)


# What is wrong with the configuration, not with the data that it names.
CONFIG_ERRORS = CONFIGS.keys() - {"a tokenizer that is larger"}

LONG = "x" * 5_000_000
# Name -> (file, content, texts, what is noted).
ODD = {
    "a byte-order mark": (
        "a.jsonl", b"\xef\xbb\xbf" + GOOD, ["a good row"], "left out the byte-order"),
    "a byte-order mark of text": (
        "b.txt", b"\xef\xbb\xbftext", ["text"], "left out the byte-order"),
    "CRLF in JSON lines": (
        "a.jsonl", b'{"text": "a\\r\\nb"}\r\n' * 2, ["a\r\nb"] * 2, ""),
    "CRLF in text": ("a.txt", b"a\r\nb\r\n", ["a\r\nb\r\n"], ""),
    "a 5 MB line": ("a.jsonl", row(text=LONG) + GOOD, [LONG, "a good row"], ""),
    "blank lines": (
        "a.jsonl", b"\n" + GOOD + b"\r\n \n" + GOOD, ["a good row"] * 2, ""),
    "no last newline": ("a.jsonl", GOOD.rstrip(), ["a good row"], ""),
    "line separators": ("a.jsonl", row(text="a\u2028b\x85c"), ["a\u2028b\x85c"], ""),
    "surrogate pairs": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"], ""),
    "400 deep": (
        "a.jsonl", b'{"text": "x", "m": ' + b"[" * 400 + b"]" * 400 + b"}", ["x"], ""),
    "many brackets": ("a.jsonl", row(text="{[" * 2000), ["{[" * 2000], ""),
    "equal rows": ("a.jsonl", GOOD * 2, ["a good row"] * 2, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_input_is_kept_whole(name, tmp_path, capsys):
    file, content, texts, noted = ODD[name]
    assert read_file(tmp_path, file, content, "") == texts
    err = capsys.readouterr().err
    assert noted in err if noted else not err


def test_the_table_has_only_names_that_are_tried():
    named = [*FILES, *PATHS, *CONFIGS, *TOKENIZERS]
    assert len(named) == len(set(named)) == len(cases()) - 1
