"""Memory and speed of conversion: ``python -m mpt_jax.bench.convert``.

    python -m mpt_jax.bench.convert --preset mpt-1b --dtype float32 --file_gb 1
    python -m mpt_jax.bench.convert --preset mpt-7b --dtype bfloat16 --dir /big/disk

A folder as MosaicML writes it, of random weights, becomes one of our checkpoints, and
that each of the formats, every time in a process of its own. Reported are the most
memory that the process ever had beyond what it had before (pages of mapped files
included), over the largest file, and the bytes a second, over those of copying the
folder. Needs Linux, and room for twice the weights; nothing of it stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mpt_jax import presets
from mpt_jax.bench.common import beside, provenance, save, table
from mpt_jax.config import ModelConfig
from mpt_jax.errors import EXIT_OK, run_verb

COLUMNS = (
    "what", "seconds", "gb_per_second", "of_copying", "peak_mb", "of_largest_file",
)  # fmt: skip
FORMATS = ("mosaicml", "hf", "gguf")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.convert", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", default="mpt-1b-redpajama-200b", choices=sorted(presets.PRESETS))
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--file_gb", type=float, default=1.0, help="size of the folder's files")
    add(
        "--formats",
        nargs="*",
        choices=FORMATS,
        default=["mosaicml"],
        help="that hold this model; mosaicml holds any",
    )
    add("--dir", metavar="DIR", help="where there is room; default: /tmp or $TMPDIR")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags = parser.parse_args(argv)
        with tempfile.TemporaryDirectory(dir=flags.dir) as folder:
            result = provenance("convert", argv) | bench(flags, pathlib.Path(folder))
        print(table(result["rows"], COLUMNS))
        save(result, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(flags: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """A row for copying, and one for each conversion."""
    source, ours, out = folder / "source", folder / "ours", folder / "out"
    cfg = dataclasses.replace(presets.model(flags.preset), param_dtype=flags.dtype)
    make_folder(source, cfg, file_bytes=int(flags.file_gb * 1e9))
    files = [file.stat().st_size for file in source.glob("*.safetensors")]
    rows: list[dict[str, Any]] = []

    def note(what: str, seconds: float, peak: int | None) -> None:
        row: dict[str, Any] = {
            "what": what,
            "seconds": round(seconds, 2),
            "gb_per_second": round(sum(files) / 1e9 / seconds, 3),
            "of_copying": round(copying / seconds, 3),
        }
        if peak is not None:
            row["peak_mb"] = round(peak / 1e6)
            row["of_largest_file"] = round(peak / max(files), 2)
        rows.append(row)

    copying = _copied(source, out)
    note("copy", copying, None)
    shutil.rmtree(out)
    note("to ours", *measured(source, ours, "mpt_jax"))
    shutil.rmtree(source)
    for format in flags.formats:
        note(f"to {format}", *measured(ours, out, format))
        shutil.rmtree(out)
    return {
        "preset": flags.preset,
        "dtype": flags.dtype,
        "weights_gb": round(sum(files) / 1e9, 3),
        "largest_file_gb": round(max(files) / 1e9, 3),
        "rows": rows,
    }


def make_folder(out: pathlib.Path, cfg: ModelConfig, *, file_bytes: int) -> None:
    """Random weights of ``cfg.param_dtype`` in MosaicML's layout."""
    import numpy as np

    from mpt_jax.interop import names, write
    from mpt_jax.interop.formats import DTYPES

    rng = np.random.default_rng(0)

    def parts() -> Iterator[tuple[names.Part, np.ndarray]]:
        for tensor in names.tensors(cfg).values():
            for part in tensor.parts:
                array = rng.standard_normal(part.shape, np.float32)
                yield part, array.astype(DTYPES[cfg.param_dtype])

    write.write_folder(
        out, parts(), cfg, kind="mosaicml", dtype=cfg.param_dtype, tokens={},
        max_file_bytes=file_bytes,
    )  # fmt: skip


def measured(source: pathlib.Path, out: pathlib.Path, format: str) -> tuple[float, int]:
    """Seconds and most bytes of memory of one conversion; "mpt_jax": to ours."""
    with beside(_conversion, str(source), str(out), format) as run:
        return run(None)


def _conversion(
    source: str, out: str, format: str
) -> Callable[[None], tuple[float, int]]:
    import jax

    from mpt_jax import convert, loading  # noqa: F401  their memory is not what counts
    from mpt_jax.interop import gguf_write, store, write  # noqa: F401

    jax.devices()

    def run(_: None) -> tuple[float, int]:
        begin = time.perf_counter()
        with _Memory() as memory:
            if format == "mpt_jax":
                convert.convert_from(source, out)
            else:
                convert.convert_to(source, out, format=format)
        return time.perf_counter() - begin, memory.grown

    return run


class _Memory:
    """Watches this process; ``grown``: its most resident bytes less those at first."""

    def __enter__(self) -> _Memory:
        self._first = self._most = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._most - self._first

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _copied(source: pathlib.Path, out: pathlib.Path) -> float:
    """Seconds of copying a folder until it is on the disk."""
    begin = time.perf_counter()
    shutil.copytree(source, out)
    for file in out.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
