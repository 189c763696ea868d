"""What a run says while it runs: a bar on a terminal, plain lines everywhere else.

``say`` and ``Guard`` keep the promise that a broken sink (closed pipe, full disk) costs
its output and one warning, never the training.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress


class Guard:
    """Survives the failures of one sink; warns of the first, then quietly tries on.

    >>> guard = Guard("metrics.jsonl", warn=print)
    >>> for _ in range(2):
    ...     with guard:
    ...         raise OSError("disk full")
    warning: metrics.jsonl: OSError: disk full; training goes on
    """

    def __init__(self, sink: str, warn: Callable[[str], None] | None = None):
        self._sink, self._warn, self._warned = sink, warn or say, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self._warned:
            self._warned = True
            name = type(error).__name__
            self._warn(f"warning: {self._sink}: {name}: {error}; training goes on")
        return True


def say(text: str) -> None:
    """Prints a line to stderr; once that is gone, says so on stdout and is silent."""
    with _STDERR:
        # One write: others, in threads and processes, write there too.
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _stderr_failed(warning: str) -> None:
    _silence(sys.stderr)
    try:
        print(warning, flush=True)
    except (OSError, ValueError):  # ValueError: I/O operation on closed file
        _silence(sys.stdout)


_STDERR = Guard("stderr", warn=_stderr_failed)


def _silence(stream: IO[str]) -> None:
    """Points a broken stream at /dev/null.

    Python flushes it once more at exit, and exits with 120 when that fails too.
    """
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", "loss {:.4f}".format),
    ("tokens_per_second", "{:,.0f} tok/s".format),
    ("mfu", "mfu {:.1%}".format),
    ("data_wait_share", "data {:.1%}".format),
    ("eta_seconds", lambda seconds: f"eta {_duration(seconds)}"),
)


def describe(metrics: Mapping[str, float]) -> str:
    """The metrics worth a glance, those that are there.

    >>> describe({"loss": 3.21451, "mfu": 0.4123, "eta_seconds": 192, "z": 1.0})
    'loss 3.2145  mfu 41.2%  eta 0:03:12'
    """
    return "  ".join(show(metrics[name]) for name, show in SHOWN if name in metrics)


class Progress:
    """Shows steps and events on stderr; a context manager.

    On a terminal a live bar with the events above it, otherwise one line per update:
    ``step    120/2000  loss 3.2145  12,345 tok/s  mfu 41.2%  data 1.3%  eta 0:03:12``.

    Args:
      unit: what is counted, where it is not steps.
      enabled: False shows nothing (every process of a job but the first).
      tty: whether stderr is a terminal; default: ask it.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        unit: str = "step",
        enabled: bool = True,
        tty: bool | None = None,
    ):
        self._total, self._enabled, self._bar = total_steps, enabled, None
        self._unit = unit
        self._guard = Guard("progress bar")
        if enabled and (_stderr_is_terminal() if tty is None else tty):
            with self._guard:
                self._bar = _start_bar(total_steps, start_step)

    @property
    def live(self) -> bool:
        """Whether it is a bar; an update prints no line then."""
        return self._bar is not None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` is done; ``metrics`` may hold more than is shown."""
        if self._bar is not None:
            with self._guard:
                task = self._bar.task_ids[0]
                self._bar.update(
                    task, completed=step, metrics=describe(metrics), refresh=True
                )
        elif self._enabled:
            say(f"{self._unit} {step:>6}/{self._total}  {describe(metrics)}".rstrip())

    def message(self, text: str) -> None:
        """An event, such as "checkpoint 120 saved"; prints above the bar."""
        if self._bar is not None:
            from rich.text import Text  # as Text, [brackets] are no markup

            with self._guard:
                self._bar.console.print(Text(text), soft_wrap=True)
        elif self._enabled:
            say(text)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen; harmless twice."""
        if self._bar is not None:
            with self._guard:
                self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _stderr_is_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # stderr is None, or closed
        return False


def _start_bar(total_steps: int, start_step: int) -> rich.progress.Progress:
    import rich.console
    import rich.progress as rp  # 0.1 s, and only a terminal needs it

    class Console(rich.console.Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end the program: SystemExit

    bar = rp.Progress(
        rp.MofNCompleteColumn(),
        rp.BarColumn(bar_width=None),
        rp.TextColumn("{task.fields[metrics]}"),
        console=Console(stderr=True, force_terminal=True),
        refresh_per_second=2,
        expand=True,
        redirect_stdout=False,  # what a user sends to a file must arrive there
    )
    bar.add_task("", total=total_steps, completed=start_step, metrics="")
    bar.start()
    return bar
