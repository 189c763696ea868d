"""What the attention kernels cost, told by compilers: no accelerator needed.

    python -m mpt_jax.bench.attention_static --platform tpu --out r.json
    python -m mpt_jax.bench.attention_static --platform tpu --only v5e

Compiles the kernels, and the best ones without ALiBi beside them, with the real
compilers and reads what these print: cycles and registers of the machine code's inner
loop. Deterministic, and anyone's CPU will do; but static: waits for memory, the cost of
a grid step and clocks are not in it, so no figure here is a speed. Exits 1 where a gate
is missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mpt_jax.errors import EXIT_OK, UserError, run_verb

# Each has measure(only) -> rows, gates(rows) -> [(what, value, limit)], PACKAGES and
# COLUMNS.
PLATFORMS = {
    "tpu": "mpt_jax.bench.static_tpu",
    "gpu": "mpt_jax.bench.static_gpu",
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.attention_static", description=__doc__
    )
    add = parser.add_argument
    add("--platform", choices=tuple(PLATFORMS), required=True)
    add("--only", metavar="CHIP", help="one chip; default all")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true")

    def run() -> int:
        flags = parser.parse_args(argv)
        result = bench(flags.platform, flags.only)
        result["command"] = " ".join(
            ["python -m mpt_jax.bench.attention_static", *argv]
        )
        module = importlib.import_module(PLATFORMS[flags.platform])
        print(table(result["rows"], module.COLUMNS))
        missed = 0
        for gate in result["gates"]:
            missed += not gate["met"]
            verdict = "ok" if gate["met"] else "MISSED"
            print(f"{gate['what']}: {gate['value']} (limit {gate['limit']}) {verdict}")
        if flags.out:
            pathlib.Path(flags.out).write_text(json.dumps(result, indent=1) + "\n")
        return 1 if missed else EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(platform: str, only: str | None = None) -> dict[str, Any]:
    """Rows and gates of one platform, with what made them.

    Raises: UserError: a compiler is not installed. RuntimeError: one failed.
    """
    module = importlib.import_module(PLATFORMS[platform])
    versions = {
        package: _version(package, module.__name__) for package in module.PACKAGES
    }
    rows = module.measure(only)
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
        "gates": [
            {"what": what, "value": value, "limit": limit, "met": value <= limit}
            for what, value, limit in module.gates(rows)
        ],
    }


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
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


def _version(package: str, module: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package} is not installed; {module} says how") from None


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
