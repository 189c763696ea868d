"""Writes a folder of safetensors: MosaicML's layout, and Hugging Face's.

Every byte has its place before the first is written (the sizes follow from the config),
so parameters may come in any order, one layer at a time, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from mpt_jax import durable
from mpt_jax.config import ModelConfig
from mpt_jax.errors import CheckpointError, InternalError, UserError
from mpt_jax.interop import configs, names
from mpt_jax.interop.formats import DTYPES
from mpt_jax.interop.names import Part
from mpt_jax.interop.read import check

Parts = Iterable[tuple[Part, np.ndarray]]

MAX_FILE_BYTES = 5_000_000_000  # as transformers shards
ROOM_FACTOR = 1.05
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go: file, offset and dtype."""

    file: pathlib.Path
    offset: int
    dtype: np.dtype


class Canvas:
    """Files in which every tensor has its place; fill() writes them part by part.

    Args:
      tensors: what parts there are, by their name.
      places: one for each tensor.
    """

    def __init__(
        self, tensors: Mapping[str, names.Tensor], places: Mapping[str, Place]
    ):
        self._rows: dict[tuple[names.Path, int | None], tuple[str, int]] = {}
        for name, tensor in tensors.items():
            start = 0
            for part in tensor.parts:
                self._rows[part.path, part.layer] = (name, start)
                start += part.rows
        self._places = places
        self._checksums: dict[tuple[names.Path, int | None], int] = {}

    def fill(self, parts: Parts) -> None:
        """Writes every part, rounded to the dtype of its place.

        Raises: CheckpointError: tensors with a value that is too large for it.
        """
        too_large: set[str] = set()
        with contextlib.ExitStack() as stack:
            paths = {place.file for place in self._places.values()}
            files = {f: stack.enter_context(open(f, "r+b")) for f in paths}
            for part, array in parts:
                name, start = self._rows[part.path, part.layer]
                place, rows = self._places[name], self._to_place(part, array)
                if place.dtype != array.dtype and not _finite(rows):
                    too_large.add(f"{name}: too large for {place.dtype}")
                data = rows.reshape(-1).view(np.uint8)
                files[place.file].seek(place.offset + start * data.size // part.rows)
                files[place.file].write(data)
                self._checksums[part.path, part.layer] = zlib.crc32(data)
        if too_large:
            raise CheckpointError("\n  ".join(sorted(too_large)))
        if missing := self._rows.keys() - self._checksums.keys():
            raise InternalError(f"never written: {sorted(map(str, missing))}")

    def compare(self, parts: Parts) -> None:
        """Raises CheckpointError unless ``parts`` are what fill() wrote."""
        left = dict(self._checksums)
        for part, array in parts:
            data = self._to_place(part, array).reshape(-1).view(np.uint8)
            if left.pop((part.path, part.layer), None) != zlib.crc32(data):
                name, _ = self._rows[part.path, part.layer]
                raise CheckpointError(
                    f"{name}: reads back otherwise than it was written; is the disk "
                    "sound?"
                )
        if left:
            raise CheckpointError(f"{len(left)} arrays do not read back")

    def _to_place(self, part: Part, array: np.ndarray) -> np.ndarray:
        name, _ = self._rows[part.path, part.layer]
        rows = np.ascontiguousarray(names.to_theirs(part, array))
        with np.errstate(over="ignore"):
            return rows.astype(self._places[name].dtype, copy=False)


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


@contextlib.contextmanager
def unfinished(out: pathlib.Path, *, n_bytes: int) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes ``out`` when the block ends without an error.

    It lies in a hidden folder beside ``out``, locked while it is written. What is left
    of a killed run there is removed by the next.

    Args:
      n_bytes: about how much will be written, to be refused early.
    Raises: UserError: ``out`` exists, or another process writes it. CheckpointError: no
      room.
    """
    if out.is_symlink() or (
        out.exists() and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise UserError("exists already; name a new folder", location=str(out))
    hidden = out.parent / f".{out.name}.unfinished"
    try:
        hidden.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write here: {error.strerror}", location=str(out)
        ) from None
    lock = os.open(hidden, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another process is writing this"
            raise UserError(message, location=str(out)) from None
        target = hidden / "new"
        shutil.rmtree(target, ignore_errors=True)
        try:
            _check_room(out, n_bytes)
            yield target
            durable.fsync_tree(target)
            target.rename(out)
            durable.fsync(out.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:  # most likely the disk is full
        raise CheckpointError(
            f"cannot be written: {error}", location=str(out)
        ) from error
    finally:
        os.close(lock)


def _check_room(out: pathlib.Path, n_bytes: int) -> None:
    need, free = n_bytes * ROOM_FACTOR, shutil.disk_usage(out.parent).free
    if need > free:
        raise CheckpointError(
            f"needs {need / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free",
            location=str(out),
        )


def count_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors."""
    return sum(t.size for t in names.tensors(cfg).values()) * DTYPES[dtype].itemsize


def write_folder(
    out: pathlib.Path,
    parts: Parts,
    cfg: ModelConfig,
    *,
    kind: Literal["hf", "mosaicml"],
    dtype: str,
    tokens: Mapping[str, Any],
    tokenizer: Iterable[pathlib.Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes ``out``: config.json, safetensors, their index, the tokenizer's files.

    Args:
      parts: every layer of every parameter, in any order.
      dtype: of the weights; parts are rounded to it.
      tokens: bos_token_id and so on, for the config.
      tokenizer: files to copy.
    Raises: UserError: transformers would ignore fields of the config (kind "hf").
      CheckpointError: the disk is full; what was written reads back otherwise.
    """
    if kind == "hf" and (ignored := configs.hf_ignores(cfg)):
        raise UserError(
            "transformers' MptForCausalLM would load this model and compute something "
            "else, without a word. --format mosaicml holds any model. It has:\n  "
            + "\n  ".join(ignored)
        )
    config = configs.write(cfg, dtype=dtype, tokens=tokens, for_hf=kind == "hf")
    with unfinished(out, n_bytes=count_bytes(cfg, dtype)) as folder:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in tokenizer:
            shutil.copyfile(file, folder / file.name)
        tensors = names.tensors(cfg)
        places = _lay_out(folder, tensors, dtype, max_file_bytes)
        canvas = Canvas(tensors, places)
        canvas.fill(parts)
        canvas.compare(check(folder).stream())


def _lay_out(
    folder: pathlib.Path, tensors: Mapping[str, names.Tensor], dtype: str, limit: int
) -> dict[str, Place]:
    """Writes the headers of the files and their index; says what goes where."""
    size = DTYPES[dtype].itemsize
    groups: list[list[names.Tensor]] = [[]]
    room = limit
    for tensor in tensors.values():
        if groups[-1] and tensor.size * size > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.size * size
    places: dict[str, Place] = {}
    for i, group in enumerate(groups):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        places |= _write_header(folder / name, group, dtype)
    if len(groups) > 1:
        total = sum(t.size for t in tensors.values()) * size
        weight_map = {name: place.file.name for name, place in places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    return places


def _write_header(
    file: pathlib.Path, group: list[names.Tensor], dtype: str
) -> dict[str, Place]:
    """The format: 8 bytes of length, JSON of that length, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in group:
        start, end = end, end + tensor.size * DTYPES[dtype].itemsize
        header[tensor.name] = {
            "dtype": _SAFETENSORS[dtype], "shape": tensor.shape,
            "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    base = 8 + len(text)
    return {
        t.name: Place(file, base + header[t.name]["data_offsets"][0], DTYPES[dtype])
        for t in group
    }
