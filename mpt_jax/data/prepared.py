"""Prepared data on disk: the tokens of every document, checksummed, read by index.

    DIR/manifest.json     what is here; written last: without it, DIR is unfinished
    DIR/SOURCE/train-00000-of-00004.tokens   little-endian uint16 or uint32, end to end
                                    .index   int64: where in it each document ends
                                    .crc     uint32: crc32 of each BLOCK bytes of it

The files are plain arrays: ``np.memmap(path, "<u2")`` has the tokens. Rows are made
when read, so that one folder serves every seq_len, packing and mixture. Each block
is checked against its crc32 whenever a row is read from it, in 8 us: no wrong byte is
ever trained on, whatever happens to the disk after opening, and opening costs no pass
over the data. The manifest has the sha256 of each file and of itself. Of ``.index`` and
``.crc`` it is checked at opening, as is every size; of all, by verify(). No TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpt_jax import durable
from mpt_jax.errors import DataError

FORMAT = 1
BLOCK = 32 * 1024  # bytes that share a checksum: a row of 2,048 reads one or two
MANIFEST = "manifest.json"
KINDS = ("tokens", "index", "crc")
MAX_OPEN_FILES = 128  # of one source; a process may open 1,024


@dataclasses.dataclass(frozen=True)
class Shard:
    """The files of one shard: ``path`` and a suffix, relative to the folder."""

    path: str
    documents: int
    tokens: int
    sha256: Mapping[str, str]  # by suffix

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Bytes of each file."""
        data = self.tokens * dtype.itemsize
        blocks = -(-data // BLOCK)
        return {"tokens": data, "index": 8 * self.documents, "crc": 4 * blocks}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    shards: of each source, by split. tokenizer: name, fingerprint, vocab_size, eos_id.
    report: of each source and split, what was read, kept and dropped, and why.
    """

    dtype: str
    tokenizer: Mapping[str, Any]
    request: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Sequence[Shard]]]
    report: Mapping[str, Any]

    def tokens(self, source: str, split: str) -> int:
        return sum(shard.tokens for shard in self.shards[source][split])

    def fingerprint(self, source: str) -> str:
        """Of every token of a source: equal only if all are."""
        digests = [
            (split, shard.sha256["tokens"], shard.sha256["index"])
            for split, shards in sorted(self.shards[source].items())
            for shard in shards
        ]
        return hashlib.sha256(repr((self.dtype, digests)).encode()).hexdigest()[:16]


def token_dtype(vocab_size: int) -> str:
    """The narrower of uint16 and uint32 that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------- writing


def replace(path: Path, content: bytes) -> None:
    """Writes ``path`` at once or not at all, and to the disk."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        durable.fsync(temporary)

    durable.replace(path, write)


def write_shard(
    root: Path, path: str, documents: Iterable[np.ndarray], *, dtype: str
) -> Shard:
    """Writes the files of a shard from the ids of its documents.

    A file gets its name when all three are whole, and on the disk.
    Raises: DataError: ids that ``dtype`` does not hold, or none. OSError.
    """
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex  # Beam may run a shard twice at a time
    parts = {k: target.with_name(f".{target.name}.{k}.{unique}") for k in KINDS}
    try:
        with contextlib.ExitStack() as stack:
            writer = _Writer(
                {k: stack.enter_context(open(p, "wb")) for k, p in parts.items()}
            )
            for ids in documents:
                _check_document(ids, dtype, f"{target}, document {writer.documents}")
                writer.write(ids.astype(dtype))
            writer.finish()
        for kind, part in parts.items():
            os.replace(part, f"{target}.{kind}")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    digests = {kind: digest.hexdigest() for kind, digest in writer.hashes.items()}
    return Shard(path, writer.documents, writer.tokens, digests)


def _check_document(ids: np.ndarray, dtype: str, location: str) -> None:
    limit = np.iinfo(dtype).max
    if ids.size == 0 or ids.min() < 0 or ids.max() > limit:
        message = f"expected ids in 0 to {limit}, got {ids}"
        raise DataError(message, location=location)


class _Writer:
    """The three files of a shard as they grow; memory holds less than a BLOCK."""

    def __init__(self, files: Mapping[str, BinaryIO]):
        self._files, self._rest = files, b""
        self.hashes = {kind: hashlib.sha256() for kind in files}
        self.documents = self.tokens = 0

    def write(self, ids: np.ndarray) -> None:
        self.documents, self.tokens = self.documents + 1, self.tokens + ids.size
        self._put("index", np.array(self.tokens, "<i8").tobytes())
        content = self._rest + ids.tobytes()
        whole = len(content) // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            self._put_block(content[at : at + BLOCK])
        self._rest = content[whole:]

    def finish(self) -> None:
        if self._rest:
            self._put_block(self._rest)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _put_block(self, block: bytes) -> None:
        self._put("tokens", block)
        self._put("crc", np.array(zlib.crc32(block), "<u4").tobytes())

    def _put(self, kind: str, content: bytes) -> None:
        self._files[kind].write(content)
        self.hashes[kind].update(content)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """The last file of a folder: from now on it can be read."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    content["sha256"] = _digest(content)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    replace(root / MANIFEST, text.encode())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------- reading


def read_manifest(root: Path) -> Manifest:
    """Raises: DataError: no manifest (an unfinished folder), or a damaged one."""
    path = root / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("sha256")
    except FileNotFoundError:
        if root.is_dir() and any(root.iterdir()):
            message = (
                f"no {MANIFEST}: it was not finished; run the same python -m "
                "mpt_jax.prepare again, it goes on where it stopped"
            )
        else:
            message = "no prepared data here; python -m mpt_jax.prepare makes it"
        raise DataError(message, location=str(root)) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", location=str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError("not a manifest; it is damaged", location=str(path)) from None
    if _digest(content) != checksum:
        raise DataError("damaged: its checksum is wrong", location=str(path))
    if content.pop("format") != FORMAT:
        message = f"of another format than {FORMAT}: prepare the data again"
        raise DataError(message, location=str(path))
    content["shards"] = {
        source: {
            split: tuple(Shard(**shard) for shard in shards)
            for split, shards in splits.items()
        }
        for source, splits in content["shards"].items()
    }
    return Manifest(**content)


def check_files(root: Path, manifest: Manifest, *, kinds: Sequence[str]) -> None:
    """Every size, and the sha256 of ``kinds``. Raises: DataError: naming the file."""
    dtype = np.dtype(manifest.dtype)
    for splits in manifest.shards.values():
        for shard in (shard for shards in splits.values() for shard in shards):
            for kind, size in shard.sizes(dtype).items():
                check_file(Path(f"{root / shard.path}.{kind}"), size=size)
                if kind in kinds:
                    _check_hash(root, shard, kind)


def check_file(path: Path, *, size: int) -> None:
    """Raises: DataError: missing, or of another size."""
    try:
        found = path.stat().st_size
    except OSError as error:
        message = f"a shard of the prepared data is missing: {error.strerror}"
        raise DataError(message, location=str(path)) from None
    if found != size:
        message = f"{found} bytes, the manifest says {size}; prepare the data again"
        raise DataError(message, location=str(path))


def _check_hash(root: Path, shard: Shard, kind: str) -> None:
    path = Path(f"{root / shard.path}.{kind}")
    if sha256_of(path) != shard.sha256[kind]:
        message = "its sha256 is not the manifest's: damaged; prepare the data again"
        raise DataError(message, location=str(path))


def verify(root: Path) -> Manifest:
    """Reads every byte. Raises: DataError: naming the first file that is not right."""
    manifest = read_manifest(root)
    check_files(root, manifest, kinds=KINDS)
    return manifest


class Tokens:
    """The documents of one source and split as one long array, read by position.

    Raises: DataError: at opening, a file that is missing, of another size, or an index
      that is not the manifest's.
    """

    def __init__(self, root: Path, manifest: Manifest, *, source: str, split: str):
        self._root, self._dtype = root, np.dtype(manifest.dtype)
        self._shards = [s for s in manifest.shards[source][split] if s.tokens]
        self._firsts = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        self.n_tokens = int(self._firsts[-1])
        self.n_documents = sum(shard.documents for shard in self._shards)
        for shard in self._shards:
            for kind, size in shard.sizes(self._dtype).items():
                check_file(Path(f"{root / shard.path}.{kind}"), size=size)
            for kind in ("index", "crc"):
                _check_hash(root, shard, kind)
        self._crcs = [self._load(shard, "crc", "<u4") for shard in self._shards]
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor

    @functools.cached_property
    def ends_N(self) -> np.ndarray:
        """Where each document ends, in tokens from the start; 8 bytes a document."""
        ends = [self._load(shard, "index", "<i8") for shard in self._shards]
        firsts = self._firsts.tolist()
        shifted = [e + first for e, first in zip(ends, firsts, strict=False)]
        return np.concatenate([np.zeros(0, np.int64), *shifted])

    def _load(self, shard: Shard, kind: str, dtype: str) -> np.ndarray:
        return np.fromfile(f"{self._root / shard.path}.{kind}", dtype)

    def read(self, start: int, size: int) -> Iterator[np.ndarray]:
        """Tokens [start, start + size), in the parts that the shards have of them.

        Raises: DataError: a shard is missing, cut short or damaged by now.
        """
        end = start + size
        at = int(np.searchsorted(self._firsts, start, side="right")) - 1
        while start < end:
            first, last = int(self._firsts[at]), int(self._firsts[at + 1])
            stop = min(end, last)
            yield self._read_shard(at, start - first, stop - first)
            start, at = stop, at + 1

    def _read_shard(self, at: int, first: int, stop: int) -> np.ndarray:
        """Not through a memory map: there, a file cut short ends the process."""
        shard, size = self._shards[at], self._dtype.itemsize
        begin, end = first * size // BLOCK, -(-stop * size // BLOCK)  # blocks
        path = f"{self._root / shard.path}.tokens"
        try:
            content = os.pread(
                self._descriptor(at, path), (end - begin) * BLOCK, begin * BLOCK
            )
        except OSError as error:
            message = f"cannot read a shard: {error.strerror}"
            raise DataError(message, location=path) from None
        missing = min(end * BLOCK, shard.tokens * size) - begin * BLOCK - len(content)
        if missing > 0:
            message = f"cut short since it was opened: {missing} bytes are missing"
            raise DataError(message, location=path)
        for block in range(begin, end):
            here = (block - begin) * BLOCK
            if zlib.crc32(content[here : here + BLOCK]) != self._crcs[at][block]:
                message = (
                    f"the {BLOCK} bytes from {block * BLOCK} are not what was written: "
                    "their checksum is wrong; prepare the data again"
                )
                raise DataError(message, location=path)
        here = first * size - begin * BLOCK
        return np.frombuffer(content, self._dtype, stop - first, here)

    def _descriptor(self, at: int, path: str) -> int:
        if at not in self._open:
            if len(self._open) == MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[at] = os.open(path, os.O_RDONLY)
        return self._open[at]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
