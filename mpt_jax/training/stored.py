"""A checkpoint on disk: its layout, its manifest, and reading it on any mesh.

Orbax writes the arrays but keeps no checksum of them: a flipped bit restores as a wrong
weight without a word, and an empty directory named like a step is its latest step. So
each step carries a MANIFEST.json, and nothing is read that does not match it::

    00000100/
      params/, opt_state/      Orbax
      data/process_0-of-1.bin  position in the data, one file per process; one in all
                               where it is the same for any number of them
      meta.json                whatever else the trainer must know again
      MANIFEST.json            size and crc32 of every file, type of every array

checkpoints.py writes these such that a step without a valid manifest is damage, never
an unfinished save.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
from etils import epath
from orbax.checkpoint import v1 as ocp

import mpt_jax
from mpt_jax.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST, META = "MANIFEST.json", "meta.json"
TOKENIZER = "tokenizer"  # the folder of its files; empty where there are none
STEP_NAME = re.compile(r"\d{8,}")
HASH_THREADS = 4  # crc32 runs at 4 GB/s per core, past what most disks deliver


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was saved, with the arrays placed as the abstract trees ask."""

    params: Any
    opt_state: Any
    data: bytes
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A step on disk whose every file has been compared with its manifest.

    arrays: path -> "float32[8, 4]".
    """

    path: epath.Path
    step: int
    arrays: Mapping[str, str]
    meta: dict[str, Any]

    def restore(
        self,
        abstract_params: Any,
        abstract_opt_state: Any,
        *,
        part: tuple[int, int] = (0, 1),
    ) -> Restored:
        """Everything, onto any mesh.

        Args:
          part: (index, count) of the part of the data that this process reads.
          abstract_params, abstract_opt_state: trees of ShapeDtypeStruct whose shardings
            say where the arrays go (an absent one: to this process's first device).
        Raises:
          CheckpointError: listing every array whose name, shape or dtype differs (Orbax
            casts in silence), or data saved by another number of processes.
        """
        position = self._read_data(data_name(*part))
        arrays = self._load(params=abstract_params, opt_state=abstract_opt_state)
        return Restored(**arrays, data=position, meta=self.meta)

    def restore_params(self, abstract_params: Any) -> Any:
        """The parameters alone, as restore() does."""
        return self._load(params=abstract_params)["params"]

    def check_fit(self, **abstract: Any) -> None:
        """Raises: CheckpointError: naming every array of these items (trees) that is
        not stored so."""
        expected = describe(abstract)
        stored = {k: v for k, v in self.arrays.items() if k.split(".")[0] in abstract}
        problems = [
            f"{path}: stored {stored.get(path, 'nowhere')}, expected "
            f"{expected.get(path, 'nowhere')}"
            for path in sorted(stored | expected)
            if stored.get(path) != expected.get(path)
        ]
        if problems:
            raise CheckpointError(
                f"{len(problems)} arrays do not fit:\n  " + "\n  ".join(problems),
                location=str(self.path),
            )

    def _load(self, **abstract: Any) -> dict[str, Any]:
        self.check_fit(**abstract)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None) or first
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        with orbax_errors("restore", self.path):
            return ocp.load_checkpointables(self.path, jax.tree.map(place, abstract))

    def _read_data(self, name: str) -> bytes:
        mine = self.path / "data" / name
        with readable_errors("read the position in the data", self.path):
            if mine.exists():
                return mine.read_bytes()
            saved = ", ".join(sorted(file.name for file in mine.parent.iterdir()))
            raise CheckpointError(
                f"no {mine.name}, only {saved}: a position in the data belongs to the "
                "number of processes that saved it; resume with as many (parameters "
                "alone can be restored by any number)",
                location=str(mine.parent),
            )


def open_checkpoint(path: str | os.PathLike) -> StoredStep:
    """A step's directory, or the newest valid step in a directory of them.

    Takes no lock and changes nothing, so it may run beside a trainer.

    Raises: CheckpointError: there is none, or none is valid.
    """
    root = absolute(path)
    if (root / MANIFEST).exists() or STEP_NAME.fullmatch(root.name):
        return open_step(root)
    if stored := newest_valid(root, list_steps(root)):
        return stored
    raise CheckpointError("there is no checkpoint here", location=str(root))


def restore_params(path: str | os.PathLike, abstract_params: Any) -> Any:
    """The parameters in open_checkpoint(path); see StoredStep.restore."""
    return open_checkpoint(path).restore_params(abstract_params)


def newest_valid(directory: epath.Path, steps: Collection[int]) -> StoredStep | None:
    """The newest of ``steps`` that verifies; None only where there are none to try.

    Raises: CheckpointError: there are some, and all are damaged.
    """
    skipped: list[tuple[int, str]] = []
    for step in sorted(steps, reverse=True):
        try:
            return open_step(directory / step_name(step))
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            skipped.append((step, error.message))
    if not skipped:
        return None
    raise CheckpointError(
        "every checkpoint is damaged, and starting afresh would overwrite them; put a "
        "good copy back, or use another directory:\n  "
        + "\n  ".join(f"step {step}: {reason}" for step, reason in skipped),
        location=str(directory),
    )


def open_step(path: epath.Path, *, verify: bool = True) -> StoredStep:
    """Reads one step; ``verify`` compares every byte with the manifest.

    Raises: CheckpointError: what is wrong with it.
    """
    with readable_errors("read", path):
        manifest = _read_manifest(path)
        problems = _damage(path, manifest["files"]) if verify else []
        if STEP_NAME.fullmatch(path.name) and manifest["step"] != int(path.name):
            problems.append(f"this is a copy of step {manifest['step']}")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError("; ".join(problems[:3]) + more, location=str(path))
        meta = json.loads((path / META).read_text())
        return StoredStep(path, manifest["step"], manifest["arrays"], meta)


# -------------------------------------------------------------------------- manifest


def write_manifest(path: epath.Path, *, step: int, arrays: Mapping[str, str]) -> None:
    """Hashes every file below ``path`` and writes what open_step() will compare."""
    names = sorted(
        str((folder / name).relative_to(path))
        for folder, _, files in path.walk()
        for name in files
    )
    manifest = {
        "step": step,
        "written": now(),
        "mpt_jax": mpt_jax.__version__,
        "jax": jax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "arrays": dict(arrays),
        "files": _checksums(path, names),
    }
    manifest["crc32"] = _crc32_of_json(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise CheckpointError(f"{MANIFEST} is missing", location=str(path))
    try:
        manifest = json.loads(file.read_bytes())
        if manifest.pop("crc32") == _crc32_of_json(manifest):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # not JSON, or JSON of something else
    raise CheckpointError(f"{MANIFEST} is corrupt", location=str(path))


def _damage(path: epath.Path, files: Mapping[str, str]) -> list[str]:
    """One line for each file that is not as the manifest says."""
    return [
        f"{name}: {found}, expected {files[name]}"
        for name, found in _checksums(path, files).items()
        if found != files[name]
    ]


def _checksums(path: epath.Path, names: Collection[str]) -> dict[str, str]:
    def checksum(name: str) -> str:
        if not (path / name).exists():
            return "missing"
        crc32 = n_bytes = 0
        with (path / name).open("rb") as stream:
            while chunk := stream.read(1 << 22):
                crc32, n_bytes = zlib.crc32(chunk, crc32), n_bytes + len(chunk)
        return f"{n_bytes} bytes, crc32 {crc32:08x}"

    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


# ---------------------------------------------------------- shared with checkpoints.py


def describe(items: Mapping[str, Any]) -> dict[str, str]:
    """Path -> type of every array: {"params.wte.weight": "float32[8, 4]"}.

    Raises: ValueError: a leaf is no array or an empty one, or two have one name.
    """
    arrays: dict[str, str] = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(items):
        path = jax.tree_util.keystr(key, simple=True, separator=".")
        if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            raise ValueError(f"{path}: expected an array, got {type(leaf).__name__}")
        if leaf.size == 0:  # Orbax cannot save it
            raise ValueError(f"{path}: expected elements, got shape {leaf.shape}")
        if path in arrays:  # Orbax would write one over the other
            raise ValueError(f"{path}: two arrays have this name")
        arrays[path] = f"{leaf.dtype}{list(leaf.shape)}"
    return arrays


@contextlib.contextmanager
def readable_errors(action: str, path: epath.Path) -> Iterator[None]:
    """Turns any failure inside into one CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # TensorStore puts long paths before the cause and 60 lines of spec after it.
        cause = (str(error).splitlines() or [""])[0]
        cause = cause if len(cause) < 400 else f"{cause[:100]} ... {cause[-300:]}"
        raise CheckpointError(
            f"cannot {action}: {type(error).__name__}: {cause}", location=str(path)
        ) from error


@contextlib.contextmanager
def orbax_errors(action: str, path: epath.Path) -> Iterator[None]:
    """readable_errors, and an Orbax that fails at once and leaves reporting to us."""
    # Its threads log the tracebacks of errors that we raise. Adding twice adds once.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    context = ocp.Context()
    # In the background, a bad path is a timeout after five minutes.
    context.asynchronous.create_directories_asynchronously = False
    with readable_errors(action, path), context:
        yield


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def list_steps(directory: epath.Path) -> list[int]:
    """Finished steps in ascending order, damaged ones included."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(
        int(path.name)
        for path in paths
        if STEP_NAME.fullmatch(path.name) and path.is_dir()
    )


def step_name(step: int) -> str:
    return f"{step:08d}"


def data_name(index: int, count: int) -> str:
    """Of the position of the index-th of ``count`` parts of the data."""
    return f"process_{index}-of-{count}.bin"


def absolute(path: str | os.PathLike) -> epath.Path:
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
