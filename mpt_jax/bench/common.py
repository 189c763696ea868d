"""What the benchmarks share: where a figure comes from, and fair turns for two."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# What a figure may hang on; the versions of those installed are reported.
_PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "tensorflow", "seqio", "tokenizers",
    "sentencepiece", "torch", "transformers", "datasets", "mosaicml-streaming",
)  # fmt: skip


def provenance(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a result must say to be compared: command, commit, versions, machine.

    Args: name: of the module below mpt_jax.bench.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": " ".join([f"python -m mpt_jax.bench.{name}", *argv]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Of this checkout, "+" where files differ from it; "unknown" outside one."""
    here = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", here, *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--", "..") else "")


def save(result: Mapping[str, Any], out: str | None) -> None:
    """Writes ``result`` as JSON to the file ``out``, if there is one."""
    if out:
        pathlib.Path(out).write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; a missing value is a dash.

    >>> print(table([{"chip": "v5e", "cycles": 1169}, {"chip": "v4"}],
    ...             ["chip", "cycles"]))
    chip  cycles
    v5e     1169
    v4         -
    """
    lines = [list(columns), *([_text(r.get(c)) for c in columns] for r in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    numeric = [any(isinstance(r.get(c), int | float) for r in rows) for c in columns]

    def cell(text: str, n: int) -> str:
        return text.rjust(widths[n]) if numeric[n] else text.ljust(widths[n])

    rendered = ("  ".join(cell(t, n) for n, t in enumerate(line)) for line in lines)
    return "\n".join(line.rstrip() for line in rendered)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def interleave(
    runs: Mapping[str, Callable[[Any], Any]], rounds: int, *, warm_up: Any, timed: Any
) -> dict[str, list[tuple[float, Any]]]:
    """(seconds, result) of ``run(timed)`` for each run and round, round about.

    ``run(warm_up)``, untimed, comes before each: it warms caches, clocks and
    allocators, and takes back the memory that the kernel may have reclaimed while the
    other ran.
    """
    samples: dict[str, list[tuple[float, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(warm_up)
            begin = time.perf_counter()
            result = run(timed)
            samples[name].append((time.perf_counter() - begin, result))
    return samples


@contextlib.contextmanager
def beside(
    build: Callable[..., Callable[[Any], Any]], *args: Any
) -> Iterator[Callable[[Any], Any]]:
    """``build(*args)``, a function, in a process of its own; yields its like here.

    Two frameworks in one process share an allocator, and threads that wait by spinning.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, build, *args), daemon=True)
    process.start()
    there.close()

    def receive() -> Any:
        result, error = here.recv()
        if error is not None:
            raise error
        return result

    def run(argument: Any) -> Any:
        here.send(argument)
        return receive()

    try:
        receive()
        yield run
    finally:
        here.close()
        process.join()


def _serve(
    pipe: multiprocessing.connection.Connection, build: Callable, *args: Any
) -> None:
    try:
        run = build(*args)
        pipe.send((None, None))
        while True:
            pipe.send((run(pipe.recv()), None))
    except (EOFError, BrokenPipeError):  # the other side is done
        pass
    except Exception as error:
        pipe.send((None, error))
