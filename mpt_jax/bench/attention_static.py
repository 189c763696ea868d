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
import sys
from collections.abc import Sequence
from typing import Any

from mpt_jax.bench import common
from mpt_jax.errors import EXIT_OK, UserError, run_verb

# Each has measure(only) -> rows, gates(rows) -> [(what, value, limit)], PACKAGES and
# COLUMNS.
PLATFORMS = {
    "tpu": "mpt_jax.bench.static_tpu",
    "gpu": "mpt_jax.bench.static_gpu",
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.attention_static", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
        print(common.table(result["rows"], module.COLUMNS))
        missed = 0
        for gate in result["gates"]:
            missed += not gate["met"]
            verdict = "ok" if gate["met"] else "MISSED"
            print(f"{gate['what']}: {gate['value']} (limit {gate['limit']}) {verdict}")
        common.save(result, flags.out)
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
        "commit": common.commit(),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
        "gates": [
            {"what": what, "value": value, "limit": limit, "met": value <= limit}
            for what, value, limit in module.gates(rows)
        ],
    }


def _version(package: str, module: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package} is not installed; {module} says how") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
