"""Ends a process that no longer makes steps, so that something can restart it.

A peer that is alive but stuck keeps its heartbeats up: JAX waits for it for ever, on
every process of the job. All their watchdogs end them, and say who it is. The watching
thread needs the GIL, which JAX gives back while it waits for a device or a peer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

from mpt_jax.errors import EXIT_STUCK

TICKS = 10  # looks per allowed time: a stuck process ends after 1.0 to 1.1 of it
# In a pause, where a compilation or a save waits for a peer that is stuck: not for ever
PAUSE_FACTOR = 4
REPORT_SECONDS = 10.0  # then it ends, reported or not: stderr may be what is stuck


class Watchdog:
    """Exits with 75 after ``seconds`` without a beat; a context manager.

    The stacks of all threads go to stderr and to ``dump_path``. Time is counted in
    looks of the watching thread, not by the clock: a process that was stopped (Ctrl-Z)
    or slept with its laptop did not look, and lives on.

    Args:
      seconds: longest time for a step; 0 is off.
      blame: says which processes the others wait for; "" where that is not known.
      tell: gets the exit code and the reason first, for the other processes.
    """

    def __init__(
        self,
        seconds: float,
        dump_path: str | os.PathLike[str],
        *,
        blame: Callable[[], str] = lambda: "",
        tell: Callable[[int, str], object] = lambda code, why: None,
        die: Callable[[int], object] = os._exit,
    ):
        self._seconds, self._dump_path = seconds, pathlib.Path(dump_path)
        self._beats = self._batches = 0
        self._step: int | None = None
        self._doing: list[str] = []  # the innermost last
        self._paused = 0
        self._blame, self._tell = blame, tell
        self._closed, self._die = threading.Event(), die
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """``step`` is done."""
        self._step = step
        self._beats += 1

    def enter(self) -> None:
        """A batch is there, and the next step begins, which needs all processes."""
        self._batches += 1

    def where(self) -> tuple[int, str]:
        """How many batches there were, and what the process does now."""
        return self._batches, self._last_step() + "".join(self._doing[-1:])

    def _last_step(self) -> str:
        return "no step yet" if self._step is None else f"last step {self._step}"

    @contextlib.contextmanager
    def pause(self, doing: str = "busy") -> Iterator[None]:
        """Long but legitimate work (compilation, evaluation, saving); may nest."""
        self._paused += 1
        try:
            with self._says(f", {doing}"):
                yield
        finally:
            self._beats += 1
            self._paused -= 1

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """The report says so when it is this that takes too long."""
        with self._says(f", waiting for {what}"):
            yield

    @contextlib.contextmanager
    def _says(self, doing: str) -> Iterator[None]:
        self._doing.append(doing)
        try:
            yield
        finally:
            self._doing.pop()

    def close(self) -> None:
        self._closed.set()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _watch(self) -> None:
        seen, idle = (0, 0), 0
        while not self._closed.wait(self._seconds / TICKS):
            now = self._beats, self._paused
            seen, idle = now, 0 if now != seen else idle + 1
            if idle >= TICKS * (PAUSE_FACTOR if self._paused else 1):
                seconds = self._seconds * idle / TICKS
                report = threading.Thread(
                    target=self._report, args=(seconds,), daemon=True
                )
                report.start()
                report.join(REPORT_SECONDS)
                self._die(EXIT_STUCK)

    def _report(self, seconds: float) -> None:
        blame = self._blame()
        why = f"no step for {seconds:g} s, {self.where()[1]}{blame and f'; {blame}'}"
        self._tell(EXIT_STUCK, why)
        host, pid = socket.gethostname(), os.getpid()
        headline = (
            f"watchdog on host {host} (pid {pid}): {why}; exit {EXIT_STUCK}, stacks in "
            f"{self._dump_path}\n"
        ).encode()
        with contextlib.suppress(OSError):
            os.write(2, headline)
        with tempfile.TemporaryFile() as file:  # local, unlike perhaps dump_path
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        with contextlib.suppress(OSError):
            os.write(2, stacks)
        with contextlib.suppress(OSError):
            self._dump_path.parent.mkdir(parents=True, exist_ok=True)
            self._dump_path.write_bytes(headline + stacks)
