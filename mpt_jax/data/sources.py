"""Documents out of files: text, JSON lines, Parquet, TFRecord and TFDS.

A spec names a source, ``FORMAT:PATH?key=value&...``:

    text:~/novels                                   a document per .txt below the folder
    jsonl:gs://bucket/c4/*.json.gz?name=c4&holdout=0.001
    parquet:/data/the-stack?field=content&filter=stack
    tfds:c4/en:3.0.1?data_dir=gs://bucket/tfds

PATH is a file, a folder (its files of the format, at any depth) or a glob (``**``, too,
on a local disk); of TFDS it is a dataset's name. Names that end in .gz or .zst are
decompressed. Spec's fields are the keys. One reader serves training, preparing and
inspecting, so a document is the same text everywhere:

* A row is a line (jsonl, text with document=line), a record, or a whole file (text).
  Lines end at LF or CRLF; a line of white space is layout, not a row.
* Text is UTF-8, kept to the byte: CRs inside it stay, a row may be any length. A UTF-8
  byte-order mark at the start of a file is left out, with a note.
* Bad rows: not UTF-8, bad JSON, JSON nested deeper than MAX_NESTING, a field that is
  missing or not text, blank text, a NUL or a lone surrogate in it, an id met before in
  the file (with id=FIELD), an empty file. The Ledger counts them, reports file and line
  and stops the run past data.max_bad_fraction.
* A file that breaks off or fails its checksum, or is UTF-16 or UTF-32, always stops the
  run: nobody could count what is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

from etils import epath

from mpt_jax.config import suggest
from mpt_jax.data import filters, stdlib_corpus
from mpt_jax.data.notes import note
from mpt_jax.errors import ConfigError, DataError

Format: TypeAlias = Literal["text", "jsonl", "parquet", "tfrecord", "tfds"]
# A record of a file as read, before anything is made of it: (line or number, content).
Records: TypeAlias = Iterator[tuple[int, Any]]

# Deeper JSON overflows the parser of some Python versions and is no one's text.
MAX_NESTING = 500
COMPRESSIONS = ("", ".gz", ".zst")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text and where it was read; ``line`` counts rows from 1."""

    text: str
    file: str
    line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that gives no document: "bad", or left out by the source's filter."""

    kind: Literal["bad", "filtered"]
    reason: str  # to count by
    detail: str  # what exactly, for one row
    file: str
    line: int


Row: TypeAlias = Document | Rejected


class Corpus(Protocol):
    """A source of documents. Picklable: workers of the prepare verb open their own."""

    name: str

    @property
    def splits(self) -> tuple[str, ...]: ...

    def files(self, split: str) -> list[str]:
        """The files of ``split``, sorted. Raises: DataError: there are none."""
        ...

    def rows(self, file: str, split: str, start: int = 0) -> Iterator[Row | None]:
        """Every row of ``file`` from number ``start`` on; None: of another split.

        Raises: DataError: the file is missing or damaged.
        """
        ...

    def fingerprint(self) -> str:
        """Differs where the documents or their order do, as far as names and sizes."""
        ...


def documents(corpus: Corpus, file: str, split: str) -> Iterator[Row]:
    """The rows of ``file`` that are ``split``'s, in order."""
    return (row for row in corpus.rows(file, split) if row is not None)


class _Bad(Exception):
    """(reason, detail) of a row that is not text."""


# ------------------------------------------------------------------------------- specs


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where documents are and what is in them; the keys of a spec's text."""

    format: Format
    path: str
    name: str = ""  # default: from the path
    field: str = "text"  # of a row; "meta.body" is body in meta
    train: str = ""  # glob below path, or TFDS split; default all of path, or "train"
    validation: str = ""  # likewise; default none, of TFDS "validation" if it is there
    holdout: float = 0.0  # or: share of train's documents, chosen by a hash of the text
    filter: str = ""  # of filters.py
    id: str = ""  # field that no two rows of a file share
    document: Literal["file", "line"] = "file"  # of text
    data_dir: str = ""  # of TFDS


_ROWS = ("field", "filter", "id")
_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("document",),
    "jsonl": _ROWS,
    "parquet": _ROWS,
    "tfrecord": _ROWS,
    "tfds": (*_ROWS, "data_dir"),
}
_COMMON = ("name", "train", "validation", "holdout")


def parse(text: str, *, name: str = "") -> Files:
    """The source that a spec describes, as ``name``; nothing is read.

    >>> parse("jsonl:/data/c4_en.*.json.gz?holdout=0.01").name
    'c4_en'

    Raises: ConfigError: naming each wrong part.
    """
    kind, _, rest = text.partition(":")
    # The keys begin at a "?" that is followed by one: "?" is also a glob's wildcard.
    path, keys = rest, ""
    if found := re.search(r"\?(?=\w+=)", rest):
        path, keys = rest[: found.start()], rest[found.end() :]
    problems = []
    if kind not in _KEYS:
        hint = suggest(kind, _KEYS)
        problems.append(f"unknown format {kind!r}; known are {', '.join(_KEYS)}{hint}")
    elif not path:
        problems.append("no path")
    known = (*_COMMON, *_KEYS.get(kind, _ROWS))
    values: dict[str, Any] = {}
    for item in filter(None, keys.split("&")):
        key, _, value = item.partition("=")
        if key not in known:
            problems.append(f"unknown key {key!r} of {kind}{suggest(key, known)}")
        else:
            values[key] = urllib.parse.unquote(value)
    problems += _check_values(values)
    if problems:
        raise ConfigError([f"data.tasks: {text!r}: {p}" for p in problems])
    whole = path.partition(":")[0].replace("/", "_") if kind == "tfds" else path
    values["name"] = name or values.get("name") or _default_name(whole)
    return Files(Spec(kind, path, **values))


def _check_values(values: dict[str, Any]) -> list[str]:
    """What is wrong with ``values``; makes holdout the number it says."""
    problems = []
    if "holdout" in values:
        try:
            values["holdout"] = float(values["holdout"])
        except ValueError:
            values["holdout"] = -1.0
        if not 0 < values["holdout"] < 1:
            problems.append("holdout: a share in (0, 1)")
        if values.get("validation"):
            problems.append("give validation or holdout, not both")
    if values.get("document", "file") not in ("file", "line"):
        problems.append(f"document: 'file' or 'line', got {values['document']!r}")
    if not re.fullmatch(r"[\w.]*", values.get("name", "")):
        problems.append(f"name: letters, digits, _ and ., got {values['name']!r}")
    name = values.get("filter")
    if name and name not in filters.FILTERS:
        known = ", ".join(filters.FILTERS)
        hint = suggest(name, filters.FILTERS)
        problems.append(f"filter: unknown {name!r}; known are {known}{hint}")
    return problems


def _default_name(path: str) -> str:
    """The last part of ``path`` that says something: no wildcards, no suffixes."""
    for part in reversed(path.rstrip("/").split("/")):
        if name := re.split(r"[.*?\[:]", part)[0].strip("-_"):
            return re.sub(r"\W", "_", name)  # as SeqIO wants names
    return "data"


# --------------------------------------------------------------------------- the files


@dataclasses.dataclass(frozen=True)
class Files:
    """A Corpus of files."""

    spec: Spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def splits(self) -> tuple[str, ...]:
        held_out = self.spec.validation or self.spec.holdout
        if self.spec.format == "tfds" and not held_out:
            held_out = "validation" in _tfds(self.spec).info.splits
        return ("train", "validation") if held_out else ("train",)

    def files(self, split: str) -> list[str]:
        if split not in self.splits:
            message = f"no {split} split; give validation= or holdout= in its spec"
            raise DataError(message, location=self.name)
        spec = self.spec
        if spec.holdout:
            split = "train"
        part = {"train": spec.train, "validation": spec.validation}[split]
        if spec.format == "tfds":
            return _tfds_files(spec, part or split)
        path = os.path.expanduser(spec.path)
        found = _expand(f"{path.rstrip('/')}/{part}" if part else path, spec.format)
        if split == "train" and not part and spec.validation:
            found = sorted(set(found) - set(self.files("validation")))
        return found

    def rows(self, file: str, split: str, start: int = 0) -> Iterator[Row | None]:
        try:
            yield from self._rows(file, split, start)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            message = f"the file cannot be read to its end: {reason}"
            raise DataError(message, location=file) from error

    def _rows(self, file: str, split: str, start: int) -> Iterator[Row | None]:
        read, interpret = _FORMATS[self.spec.format]
        seen: dict[Any, int] = {}
        line = None
        for number, (line, record) in enumerate(read(file, self.spec)):
            # What was read before a restart is passed over, but its ids count.
            if number < start and not self.spec.id:
                continue
            try:
                content = interpret(record, self.spec)
                text = _text(content, self.spec.field)
                if self.spec.id:
                    _check_id(content, self.spec.id, line, seen)
                reason = ""
                if self.spec.filter:
                    reason = _filter(text, content, self.spec.filter)
            except _Bad as bad:
                row = Rejected("bad", *bad.args, file, line)
            else:
                row = Document(text, file, line)
                if reason:
                    row = Rejected("filtered", reason, "", file, line)
                elif self.spec.holdout and split != _part(text, self.spec.holdout):
                    row = None
            if number >= start:
                yield row
        if line is None and start == 0:
            yield Rejected("bad", "empty file", "it holds no rows", file, 0)

    def fingerprint(self) -> str:
        spec = self.spec
        base = spec.data_dir if spec.format == "tfds" else spec.path.split("*")[0]
        base = os.path.expanduser(base)
        listed = [
            (split, file.removeprefix(base), size)
            for split in self.splits
            for file, size in _sizes(self.files(split))
        ]
        # Where the data lie may change (a copy on another disk), what they are may not.
        spec = dataclasses.replace(spec, path="", data_dir="")
        return hashlib.sha256(repr((spec, listed)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Texts:
    """A Corpus of texts in memory; ``read`` gives those of a split by name."""

    name: str
    read: Callable[[str], Mapping[str, str]]
    splits: tuple[str, ...] = ("train", "validation")

    def files(self, split: str) -> list[str]:
        return [self.name]

    def rows(self, file: str, split: str, start: int = 0) -> Iterator[Row | None]:
        texts = list(self.read(split).values())
        for line, text in enumerate(texts[start:], start + 1):
            yield Document(text, file, line)

    def fingerprint(self) -> str:
        return "-".join(stdlib_corpus.fingerprint(self.read(s)) for s in self.splits)


def _expand(path: str, kind: Format) -> list[str]:
    """The files of a path, folder or glob, sorted."""
    if glob.has_magic(path):
        if "://" in path:
            base = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]
            pattern = path.removeprefix(base + "/")
            found = [str(p) for p in epath.Path(base).glob(pattern)]
        else:
            found = [f for f in glob.iglob(path, recursive=True) if os.path.isfile(f)]
        if not found:
            raise DataError("no file matches", location=path)
        return sorted(found)
    if not epath.Path(path).exists():
        raise DataError("no such file or folder", location=path)
    if not epath.Path(path).is_dir():
        return [path]
    below = [
        str(folder / name)
        for folder, _, names in epath.Path(path).walk()
        for name in names
    ]
    suffixes = _SUFFIXES[kind]
    found = sorted(f for f in below if re.search(suffixes, f.rpartition("/")[2]))
    others = sorted(set(below) - set(found))
    if not found:
        there = f"it has {others[0]}; name files by a glob" if others else "it is empty"
        raise DataError(f"no {kind} file in this folder: {there}", location=path)
    if others:
        note(f"{path}: {len(others)} files are not {kind}, the first is {others[0]}")
    return found


def _sizes(files: Sequence[str]) -> list[tuple[str, int]]:
    def size(file: str) -> int:
        try:
            return epath.Path(_part_of_file(file)[0]).stat().length
        except OSError as error:
            raise DataError(error.strerror or str(error), location=file) from None

    with futures.ThreadPoolExecutor(16) as pool:  # a stat of a bucket takes 50 ms
        return list(zip(files, pool.map(size, files), strict=True))


# TFDS names parts of files: "FILE[first:end]", records from 0.
_PART_OF_FILE = re.compile(r"(.*)\[(\d+):(\d+)\]")


def _part_of_file(file: str) -> tuple[str, int, int | None]:
    if found := _PART_OF_FILE.fullmatch(file):
        return found[1], int(found[2]), int(found[3])
    return file, 0, None


@functools.lru_cache
def _tfds(spec: Spec) -> Any:
    """The builder of prepared data; nothing is downloaded or generated."""
    from mpt_jax.data.seqio_adapters import tfds

    data_dir = os.path.expanduser(spec.data_dir) or None
    location = f"{spec.path} in {data_dir or tfds.core.constants.DATA_DIR}"
    try:
        builder = tfds.builder(spec.path, data_dir=data_dir, try_gcs=False)
    except (ValueError, OSError) as error:
        message = str(error).partition("\n")[0]
        raise DataError(f"TFDS: {message}", location=location) from None
    if not builder.info.splits:
        message = "TFDS finds no prepared data of this name and version there"
        raise DataError(message, location=location)
    if builder.info.file_format.value != "tfrecord":
        message = f"its files are {builder.info.file_format.value}; only tfrecord reads"
        raise DataError(message, location=location)
    return builder


def _tfds_files(spec: Spec, split: str) -> list[str]:
    try:
        parts = _tfds(spec).info.splits[split].file_instructions
    except ValueError as error:
        message = str(error).partition("\n")[0]
        raise DataError(message, location=spec.path) from None
    whole = [(p.skip == 0 and p.take in (-1, p.examples_in_shard), p) for p in parts]
    return [
        p.filename if all_of_it
        else f"{p.filename}[{p.skip}:"
        f"{p.examples_in_shard if p.take < 0 else p.skip + p.take}]"
        for all_of_it, p in whole
    ]  # fmt: skip


# ------------------------------------------------------------------------- the formats


@contextlib.contextmanager
def _open(file: str) -> Iterator[BinaryIO]:
    with epath.Path(file).open("rb") as stream:
        if file.endswith(".gz"):
            yield gzip.GzipFile(fileobj=stream)
        elif file.endswith(".zst"):
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
        else:
            yield stream


def _decoded_start(start: bytes, file: str) -> bytes:
    """The first bytes of a file, without a mark of UTF-8."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        kind = "UTF-16" if start[:4].count(0) < 2 else "UTF-32"
        raise OSError(f"it is {kind}; convert it: iconv -f {kind} -t UTF-8")
    if start.startswith(b"\xef\xbb\xbf"):
        _note_once(f"{file}: left out the byte-order mark at its start")
        return start[3:]
    return start


@functools.cache
def _note_once(text: str) -> None:
    note(text)


def _read_lines(file: str, spec: Spec) -> Records:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = _decoded_start(line, file)
            if not line.isspace():
                yield number, line


def _read_text(file: str, spec: Spec) -> Records:
    if spec.document == "line":
        for number, line in _read_lines(file, spec):
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")
        return
    with _open(file) as stream:
        yield 1, _decoded_start(stream.read(), file)


def _columns(spec: Spec) -> list[str]:
    """The fields that a row is asked for."""
    asked = (spec.field, spec.id, *filters.FIELDS.get(spec.filter, ()))
    return list(dict.fromkeys(filter(None, asked)))


def _read_parquet(file: str, spec: Spec) -> Records:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with epath.Path(file).open("rb") as stream:
        try:
            table = parquet.ParquetFile(stream)
            columns = [name.partition(".")[0] for name in _columns(spec)]
            if missing := set(columns) - set(table.schema_arrow.names):
                there = ", ".join(table.schema_arrow.names)
                raise OSError(f"no column {sorted(missing)[0]!r}; it has {there}")
            for batch in table.iter_batches(batch_size=64, columns=columns):
                # As bytes: a column of text may hold what is not UTF-8.
                arrays = [
                    a.cast(pyarrow.binary()) if a.type == pyarrow.string() else a
                    for a in batch.columns
                ]
                rows = pyarrow.RecordBatch.from_arrays(arrays, batch.schema.names)
                for row in rows.to_pylist():
                    number += 1
                    yield number, row
        except pyarrow.ArrowException as error:
            raise OSError(f"after row {number}: {error}") from error


def _read_tfrecord(file: str, spec: Spec) -> Records:
    from mpt_jax.data.seqio_adapters import tf

    path, first, end = _part_of_file(file)
    compression = "GZIP" if path.endswith(".gz") else ""
    records = iter(tf.data.TFRecordDataset(path, compression))
    number = 0
    while end is None or number < end:
        try:
            record = next(records).numpy()
        except StopIteration:
            return
        except tf.errors.OpError as error:
            what = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", error.message)
            raise OSError(f"after record {number}: {what}") from error
        number += 1
        if number > first:
            yield number, record


def _read_json(record: bytes, spec: Spec) -> Mapping[str, Any]:
    try:
        row = json.loads(_utf8(record))
        if not isinstance(row, dict):
            raise _Bad("bad JSON", f"a row is an object {{...}}, this is {_kind(row)}")
        # The cheap bound first: most rows have fewer brackets than that in all.
        if record.count(b"{") + record.count(b"[") > MAX_NESTING:
            _check_nesting(row)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at character {error.pos}"
        raise _Bad("bad JSON", detail) from None
    except RecursionError:
        raise _Bad("nested too deeply", f"more than {MAX_NESTING} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _Bad("bad JSON", str(error)) from None
    return row


def _check_nesting(row: Any) -> None:
    level = [row]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _read_example(record: bytes, spec: Spec) -> Mapping[str, Any]:
    from google.protobuf import message

    from mpt_jax.data.seqio_adapters import tf

    try:
        features = tf.train.Example.FromString(record).features.feature
    except message.DecodeError:
        raise _Bad("not a tf.train.Example", f"{len(record)} bytes") from None
    row = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        row[name] = values[0] if len(values) == 1 else values
    return row


# How a file becomes records, and a record a row.
_FORMATS: dict[str, tuple[Callable[[str, Spec], Records], Callable[..., Mapping]]] = {
    "text": (_read_text, lambda record, spec: {"text": record}),
    "jsonl": (_read_lines, _read_json),
    "parquet": (_read_parquet, lambda record, spec: record),
    "tfrecord": (_read_tfrecord, _read_example),
    "tfds": (_read_tfrecord, _read_example),
}
# What belongs to a folder's source.
_PACKED = r"(\.gz|\.zst)?$"
_SUFFIXES: dict[str, str] = {
    "text": r"\.(txt|text)" + _PACKED,
    "jsonl": r"\.(jsonl|ndjson|json)" + _PACKED,
    "parquet": r"\.parquet$",
    "tfrecord": r"\.tfrecords?(-\d+-of-\d+)?(\.gz)?$",
}


# ---------------------------------------------------------------------------- the rows


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        detail = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise _Bad("not UTF-8", detail) from None


def _lookup(row: Mapping[str, Any], field: str) -> Any:
    value: Any = row
    for name in (field,) if field in row else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            there = ", ".join(map(repr, list(row)[:8])) or "nothing"
            raise _Bad("missing field", f"no field {field!r}; the row has {there}")
        value = value[name]
    return value


def _text(row: Mapping[str, Any], field: str) -> str:
    text = _lookup(row, field)
    if isinstance(text, bytes):
        text = _utf8(text)
    if not isinstance(text, str):
        raise _Bad("wrong type", f"field {field!r} is {_kind(text)}, expected text")
    if not text or text.isspace():
        raise _Bad("blank text", f"{len(text)} characters of white space")
    if (at := text.find("\0")) >= 0:
        raise _Bad("NUL character", f"character {at}; is this a text file?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Bad("lone surrogate", f"character {error.start}") from None
    return text


def _check_id(row: Mapping[str, Any], field: str, line: int, seen: dict) -> None:
    value = json.dumps(_lookup(row, field), default=repr)
    if (first := seen.setdefault(hash(value), line)) != line:
        raise _Bad("duplicate id", f"{field} {value} was in line {first}")


def _filter(text: str, row: Mapping[str, Any], name: str) -> str:
    asked = {field: _lookup(row, field) for field in filters.FIELDS[name]}
    decoded = {k: _utf8(v) if isinstance(v, bytes) else v for k, v in asked.items()}
    return filters.FILTERS[name](text, decoded)


def _part(text: str, holdout: float) -> str:
    """The split of a text: equal texts, wherever they are, are in the same."""
    digest = hashlib.sha256(text.encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if at < holdout else "train"
