"""Where the time of a run went, over all its restarts."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mpt_jax import durable

KINDS = (
    "productive", "startup", "compile", "data", "checkpoint", "evaluation", "lost",
)  # fmt: skip


class Goodput:
    """Seconds of a run by what they were spent on.

    startup: until the first step is done, but for its compile. data: the host waited
    for a batch. checkpoint: the loop waited for a save. evaluation: with its compile.
    lost: from the last save of a run that ended without one to the start that resumed
    from it: the steps done again, and the time without a trainer. productive: the rest.
    A checkpoint carries the sums up to it, so that they are always those of the steps
    that count.
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "startup", clock()
        self._began, self.restarts = self._since, 0

    def _turn(self, kind: str) -> str:
        """From now on time is of ``kind``; returns of which it was."""
        now, before = self._clock(), self._kind
        self._seconds[before] += max(0.0, now - self._since)
        self._kind, self._since = kind, now
        return before

    def started(self) -> None:
        """The first step is done."""
        self._turn("productive")

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Time in here is of ``kind``; may nest."""
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON-able."""
        self._turn(self._kind)
        return {
            "seconds": dict(self._seconds),
            "time": self._since,
            "restarts": self.restarts,
        }

    def restore(
        self, state: Mapping[str, Any], *, report: Mapping[str, Any] | None
    ) -> None:
        """Goes on from a checkpoint's, or from the report of an orderly end after it.

        Time between such an end and this start is nobody's.
        """
        orderly = report is not None and report["time"] >= state["time"]
        last = report if orderly else state
        for kind, seconds in last["seconds"].items():
            self._seconds[kind] += seconds
        if not orderly:
            self._seconds["lost"] += max(0.0, self._began - state["time"])
        self.restarts = last["restarts"] + 1

    def share(self) -> float:
        """Of the time so far, what was productive."""
        self._turn(self._kind)
        return self._seconds["productive"] / max(sum(self._seconds.values()), 1e-9)

    def describe(self) -> str:
        """
        >>> goodput = Goodput(iter([0.0, 10.0, 90.0, 90.0, 100.0, 100.0]).__next__)
        >>> goodput.started()
        >>> with goodput.spend("data"):
        ...     pass
        >>> goodput.describe()
        'goodput 90.0% of 0:01:40, 0 restarts: startup 10.0%'
        """
        share = self.share()
        total = max(sum(self._seconds.values()), 1e-9)
        rest = [
            f"{kind} {seconds / total:.1%}"
            for kind, seconds in self._seconds.items()
            if kind != "productive" and seconds / total >= 0.0005
        ]
        minutes, seconds = divmod(round(total), 60)
        clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        found = f": {', '.join(rest)}" if rest else ""
        return f"goodput {share:.1%} of {clock}, {self.restarts} restarts{found}"

    def write(self, path: pathlib.Path) -> None:
        """The report, at an orderly end."""
        report = {**self.state(), "goodput": self.share()}
        text = json.dumps(report, indent=1) + "\n"
        durable.replace(path, lambda temporary: temporary.write_text(text))


def read_report(path: pathlib.Path) -> dict[str, Any] | None:
    """What write() wrote; None where there is none, or it is damaged."""
    try:
        report = json.loads(path.read_text())
        return report if report["time"] and report["seconds"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
