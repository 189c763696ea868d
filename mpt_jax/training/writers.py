"""Where metrics go: metrics.jsonl, TensorBoard events and the loss-curve PNG.

metrics.jsonl is the record (one JSON object per line: step, wall_time, every metric);
the PNG is drawn from it, and so spans resumptions. A sink that fails warns once and the
training goes on. TensorFlow is never imported.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpt_jax import durable
from mpt_jax.config import LogConfig
from mpt_jax.errors import UserError
from mpt_jax.training.progress import Guard, say

Record = dict[str, Any]


def _encode(value: Any) -> Any:
    """A number as JSON has it; nan and infinities as strings, since JSON lacks them."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (int, float)):
        raise TypeError(f"a metric must be a number, got {value!r}")
    return value if math.isfinite(value) else str(value)


def _parse(line: bytes) -> Record | None:
    """The record of a whole line; None for a torn one."""
    try:
        record = json.loads(line)
        if not line.endswith(b"\n") or not isinstance(record["step"], int):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    numbers = ("nan", "inf", "-inf")
    return {k: float(v) if v in numbers else v for k, v in record.items()}


def read_metrics(path: pathlib.Path) -> Iterator[Record]:
    """The records of a metrics.jsonl in order, with nan and inf as floats again."""
    with open(path, "rb") as lines:
        yield from filter(None, map(_parse, lines))


class _Jsonl:
    """Appends records; flushed per line, so a kill tears at most the last one."""

    def __init__(self, path: pathlib.Path):
        self._path, self._file = path, None

    def rewind(self, step: int) -> None:
        """Drops lines after ``step`` (all of them for 0, a fresh start) and torn ones.

        Lines of step 0 go too: a fresh start will evaluate there again.
        """
        self.close()
        lines: list[bytes] = []
        if self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True)
        records = map(_parse, lines)
        kept = [
            line
            for line, record in zip(lines, records, strict=True)
            if record and record["step"] <= step and step > 0
        ]
        if kept != lines:
            durable.replace(self._path, lambda path: path.write_bytes(b"".join(kept)))

    def write(self, step: int, wall_time: float, metrics: Mapping[str, Any]) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab")
        record = {"step": step, "wall_time": wall_time, **metrics}
        # After a failed flush (full disk) the buffer keeps its bytes and the next flush
        # goes on where it stopped: lines stay whole, and none is lost if space returns.
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class _TensorBoard:
    """Scalars in an event file of TensorBoard's format.

    Written with tensorboard's protos and record framing: its EventFileWriter would
    import TensorFlow where that is installed, and write from a thread of its own.
    """

    def __init__(self, directory: pathlib.Path):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._directory, self._proto, self._framing = directory, event_pb2, RecordWriter
        self._records = None

    def _append(self, **event: Any) -> None:
        if self._records is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            self._records = self._framing(open(self._directory / name, "wb"))
            self._append(file_version="brain.Event:2")
        self._records.write(self._proto.Event(**event).SerializeToString())
        self._records.flush()

    def rewind(self, step: int) -> None:
        """Tells readers to forget what earlier events say of later steps."""
        first = step + 1 if step else 0
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._append(wall_time=time.time(), step=first, session_log=start)

    def write(self, step: int, wall_time: float, metrics: Mapping[str, Any]) -> None:
        values = [
            {"tag": tag, "simple_value": float(value)} for tag, value in metrics.items()
        ]
        self._append(wall_time=wall_time, step=step, summary={"value": values})

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None


class MetricsWriter:
    """Writes the metrics of a run under ``workdir``; a context manager.

    Args:
      start_step: the step resumed from; what is recorded of later steps is dropped.
      enabled: False writes nothing (every process of a job but the first).
      warn: told once per sink that fails.
    Raises: UserError: a package that ``config`` asks for is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: LogConfig,
        *,
        start_step: int = 0,
        enabled: bool = True,
        warn: Callable[[str], None] = say,
        clock: Callable[[], float] = time.time,
    ):
        self._directory, self._clock = pathlib.Path(workdir), clock
        self._sinks: list[tuple[Guard, _Jsonl | _TensorBoard]] = []
        self._plot: Guard | None = None
        if not enabled:
            return
        self._sinks.append((Guard("metrics.jsonl", warn), _Jsonl(self.jsonl_path)))
        if config.tensorboard:
            try:
                board = _TensorBoard(self._directory / "tensorboard")
            except ImportError as error:
                raise _missing("tensorboard", "log.tensorboard") from error
            self._sinks.append((Guard("tensorboard", warn), board))
        if config.plot:
            if importlib.util.find_spec("matplotlib") is None:
                raise _missing("matplotlib", "log.plot")
            self._plot = Guard("loss.png", warn)
        self.rewind(start_step)

    @property
    def jsonl_path(self) -> pathlib.Path:
        return self._directory / "metrics.jsonl"

    @property
    def plot_path(self) -> pathlib.Path:
        return self._directory / "loss.png"

    def rewind(self, step: int) -> None:
        """Drops what is recorded of steps after ``step``: they will be run again."""
        for guard, sink in self._sinks:
            with guard:
                sink.rewind(step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records numbers (Python's, NumPy's or JAX's scalars) of ``step``."""
        encoded = {name: _encode(value) for name, value in metrics.items()}
        wall_time = self._clock()
        for guard, sink in self._sinks:
            with guard:
                sink.write(step, wall_time, encoded)

    def close(self) -> None:
        """Closes the files and draws the loss curve."""
        for guard, sink in self._sinks:
            with guard:
                sink.close()
        if self._plot is not None:
            with self._plot:
                draw_loss_curve(self.jsonl_path, self.plot_path)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _missing(package: str, field: str) -> UserError:
    return UserError(
        f"needs the {package} package: pip install {package}, or set {field}=false",
        location=field,
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the twentieth of the curve around each point.

    Centred, so without lag; narrower at the steep start, one-sided at the end.

    >>> _smooth([4.0, 1.0, 4.0, 3.0])
    [4.0, 3.0, 2.6666666666666665, 3.5]
    """
    sums, n = [0.0, *itertools.accumulate(values)], len(values)
    half = max(n // 40, 1)
    spans = [(i - min(half, i), min(i + min(half, i) + 1, n)) for i in range(n)]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def draw_loss_curve(jsonl_path: pathlib.Path, png_path: pathlib.Path) -> None:
    """Draws loss, its running mean, validation_loss and learning_rate over the steps.

    Draws nothing while there is no finite loss.
    """
    records = list(read_metrics(jsonl_path)) if jsonl_path.exists() else []

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [r for r in records if math.isfinite(r.get(name, math.nan))]
        return [r["step"] for r in found], [r[name] for r in found]

    steps, losses = series("loss")
    if not steps:
        return
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#4c78a8", alpha=0.3, linewidth=1, label="train")
    axes.plot(steps, _smooth(losses), color="#4c78a8", linewidth=2, label="train, mean")
    axes.plot(*series("validation_loss"), "o-", color="#e45756", label="validation",
              markersize=4, linewidth=1)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.spines[["top"]].set_visible(False)
    rate = axes.twinx()
    rate.plot(*series("learning_rate"), ":", color="#9d9d9d", linewidth=1.2,
              label="learning rate")  # fmt: skip
    rate.set_ylabel("learning rate", color="#7d7d7d")
    rate.set_ylim(bottom=0)
    rate.spines[["top"]].set_visible(False)
    drawn = [line for line in (*axes.lines, *rate.lines) if len(line.get_xdata())]
    axes.legend(handles=drawn, frameon=False)
    durable.replace(png_path, lambda path: figure.savefig(path, format="png"))
