"""Checkpoints of a run: saved in the background, complete or not there at all.

In the run's directory, on a file system that renames folders in one piece::

    .lock               flock of the one trainer, with its host and pid
    .saving-00000120/   unfinished; a leftover after kill -9, removed at the next start
    .deleting-00000080/ being removed
    00000100/           finished (stored.py): renamed to this once all of it is on disk

Hence a step without a valid manifest is damage, never an unfinished save. Every process
calls save() and latest_valid(); process 0 alone locks, hashes, renames and deletes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Awaitable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mpt_jax import durable
from mpt_jax.config import CheckpointConfig
from mpt_jax.errors import CheckpointError
from mpt_jax.training import stored as disk
from mpt_jax.training.stored import (
    Restored,
    StoredStep,
    open_checkpoint,
    restore_params,
)

__all__ = ["Checkpoints", "Restored", "StoredStep", "open_checkpoint", "restore_params"]

logger = logging.getLogger(__name__)

SAVING, DELETING, LOCK = ".saving-", ".deleting-", ".lock"
ROOM_FACTOR = 1.1  # Orbax's metadata, and block rounding


class Checkpoints:
    """The checkpoints of a run, held by its one trainer; a context manager.

    Errors of a save in the background are raised by the next save(), wait() or close().

    Args:
      directory: made if absent.
    Raises:
      CheckpointError: at once, where it is no directory, cannot be written, or another
        trainer has it.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
        self.directory = disk.absolute(directory)
        self.last_step: int | None = None  # the last one saved or resumed
        self._config = config
        self._primary = jax.process_index() == 0
        self._abandoned: set[int] = set()  # damaged, or newer than a damaged one
        self._timer: float | None = None
        self._saving: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        # Kept open: the kernel frees the lock with it, after kill -9 too.
        self._lock = self._open() if self._primary else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return self.close()
        if jax.process_count() == 1:  # else a peer may be dead, and Orbax waits for it
            try:
                self.close()
            except CheckpointError as second:  # must not hide the first
                logger.error("%s", second)

    def steps(self) -> list[int]:
        """Finished steps in ascending order, damaged ones included."""
        return disk.list_steps(self.directory)

    def latest_valid(self, *, before: int | None = None) -> StoredStep | None:
        """The newest valid step (below ``before``) to resume from; None: start afresh.

        Logs each damaged step that it skips. All newer steps, damaged or not, are given
        up: later saves replace and remove them. With ``before``, a rollback, they go at
        once: a crash before the next save must not resume from them.

        Raises: CheckpointError: there are steps, all of them damaged.
        """
        self.wait()
        stored, refusal, answer = None, None, -1
        if self._primary:
            usable = [s for s in self.steps() if s not in self._abandoned]
            usable = [s for s in usable if before is None or s < before]
            try:
                stored = disk.newest_valid(self.directory, usable)
                answer = stored.step if stored else -1
            except CheckpointError as error:
                refusal, answer = error, -2
        answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
        if answer == -2:
            raise refusal or CheckpointError("process 0 found only damaged checkpoints")
        if answer >= 0 and stored is None:
            stored = disk.open_step(self._path(answer), verify=False)
        newer = {s for s in self.steps() if s > answer}
        if before is not None and stored is not None and self._primary:
            for step in newer:
                self._remove(step)
            newer = set()
        self._abandoned |= newer
        self.last_step = stored.step if stored else None
        return stored

    def due(self, step: int, *, now: float) -> bool:
        """Whether every_steps or every_minutes asks for a save after ``step``.

        Args:
          now: time.monotonic(), the same for all processes (send process 0's). The
            first call starts the clock and each True restarts it.
        """
        self._timer = now if self._timer is None else self._timer
        steps, minutes = self._config.every_steps, self._config.every_minutes
        late = minutes is not None and now - self._timer >= 60 * minutes
        if step == self.last_step or not (late or (steps and step % steps == 0)):
            return False
        self._timer = now
        return True

    def save(
        self,
        step: int,
        *,
        params: Any,
        opt_state: Any,
        data: bytes | None,
        meta: Mapping[str, Any],
        tokenizer: Mapping[str, bytes] | None = None,
        part: tuple[int, int] = (0, 1),
        wait: bool = False,
    ) -> None:
        """Starts a save, once the previous one has finished.

        The arrays may be donated when this returns: by then Orbax has copied them, or
        holds references that keep XLA from reusing their memory.

        Args:
          params, opt_state: trees of arrays (counters are arrays too), however sharded.
          data: position in the data, opaque; None from all but one of the processes
            that read the same part of the data.
          part: (index, count) of that part.
          meta: JSON-able, the same on every process.
          tokenizer: its files, which travel along.
          wait: return only when the step is finished.
        Raises:
          CheckpointError: of the previous save, or there is no room for this one.
          ValueError: a leaf is no array or an empty one, or two have one name.
          TypeError: meta is not JSON-able.
        """
        items = {"params": params, "opt_state": opt_state}
        arrays, meta_json = disk.describe(items), json.dumps(meta, indent=1)
        self.wait()
        if self._primary:
            self._remove_leftovers()
            later = [s for s in self.steps() if s >= step and s not in self._abandoned]
            if later:  # keeping the newest would delete this one
                raise CheckpointError(
                    f"cannot save step {step}, as step {later[-1]} exists; resume from "
                    "that, or use another directory",
                    location=str(self.directory),
                )
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
        target = self.directory / (SAVING + disk.step_name(step))
        files = {} if data is None else {disk.data_name(*part): data}
        items["data"] = _ProcessData(files)
        with disk.orbax_errors(f"save step {step}", self.directory):
            response = ocp.save_checkpointables_async(target, items, overwrite=True)

        def finish() -> None:
            with disk.readable_errors(f"save step {step}", self.directory):
                response.result()
                if self._primary:
                    (target / disk.META).write_text(meta_json)
                    (target / disk.TOKENIZER).mkdir()
                    for name, content in (tokenizer or {}).items():
                        (target / disk.TOKENIZER / name).write_bytes(content)
                    disk.write_manifest(target, step=step, arrays=arrays)
                    self._commit(target, step)

        self._saving, self.last_step = self._thread.submit(finish), step
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the save under way, if any, is finished; raises its CheckpointError."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """wait(), then lets another trainer have the directory."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                self._lock.close()

    def _path(self, step: int) -> epath.Path:
        return self.directory / disk.step_name(step)

    def _open(self) -> Any:
        """Makes, locks and probes the directory; returns the lock file."""
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError("not a directory", location=str(self.directory))
        refused = contextlib.ExitStack()
        with disk.readable_errors("write here", self.directory), refused:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = refused.enter_context(_lock(self.directory))
            self._remove_leftovers()
            probe = self.directory / f"{SAVING}probe"
            probe.mkdir()
            (probe / "file").write_text("can this be written, synced and renamed?")
            durable.fsync(probe / "file")
            self._rename(probe, f"{DELETING}probe").rmtree()
            refused.pop_all()
            return lock

    def _rename(self, path: epath.Path, name: str) -> epath.Path:
        try:
            return path.rename(self.directory / name)
        except OSError as error:
            raise CheckpointError(
                f"cannot rename a folder: {error.strerror}; expected a file system "
                "that does so in one piece (of Cloud Storage, a bucket with a "
                "hierarchical namespace)",
                location=str(path),
            ) from None

    def _remove_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if path.name.startswith((SAVING, DELETING)):
                logger.info("removing the unfinished %s", path)
                path.rmtree() if path.is_dir() else path.unlink()

    def _check_room(self, n_bytes: int) -> None:
        need, free = n_bytes * ROOM_FACTOR, shutil.disk_usage(self.directory).free
        if need > free:
            keep = self._config.keep
            raise CheckpointError(
                f"a checkpoint needs {need / 2**30:.3g} GiB and {free / 2**30:.3g} GiB "
                f"are free (keep={keep} needs room for {keep + 1}: the oldest goes "
                "when the newest is finished)",
                location=str(self.directory),
            )

    def _commit(self, target: epath.Path, step: int) -> None:
        """Turns the complete ``target`` into the step; removes those not kept."""
        # Against power loss, as older steps go next; kill -9 does not need it.
        durable.fsync_tree(target)
        if self._path(step).exists():  # an abandoned one: an older step is valid
            self._remove(step)
        self._rename(target, disk.step_name(step))
        durable.fsync(self.directory)
        logger.info("saved %s", self._path(step))
        self._abandoned.discard(step)
        steps = self.steps()
        kept = [s for s in steps if s not in self._abandoned][-self._config.keep :]
        for old in set(steps).difference(kept):
            self._remove(old)

    def _remove(self, step: int) -> None:
        """Hides a step, then deletes it: half a step must not look like damage."""
        hidden = self._rename(self._path(step), DELETING + disk.step_name(step))
        shutil.rmtree(hidden, ignore_errors=True)  # the next save takes the rest


class _ProcessData:
    """One process's files, in the form in which Orbax saves custom objects."""

    def __init__(self, files: Mapping[str, bytes]):
        self._files = files

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write() -> None:
            folder = await directory.await_creation()
            for name, content in self._files.items():
                (folder / name).write_bytes(content)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("StoredStep reads the file itself")


def _lock(directory: epath.Path) -> Any:
    """The lock file, locked until it is closed; subprocesses do not inherit it."""
    file = open(directory / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise CheckpointError(
            f"another trainer is writing here ({holder}); stop it, or use another "
            "directory",
            location=str(directory),
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}, started {disk.now()}\n")
    file.flush()
    return file
