"""Whether something fits, asked before it is allocated."""

from __future__ import annotations

import pathlib
import re

import jax

from mpt_jax.errors import UserError
from mpt_jax.partitioning import current_mesh

_GIB = 2**30
_MEMINFO = pathlib.Path("/proc/meminfo")


def check(device_bytes: int, what: str, *, hint: str = "") -> None:
    """Nothing, where the machine does not tell what is free.

    Raises: UserError: ``what`` needs ``device_bytes`` on each device of the mesh, and
      some has less: how much is needed, there and missing.
    """
    mesh = current_mesh()
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    if devices[0].platform == "cpu":  # they share the host's memory
        _compare(device_bytes * len(devices), _host_bytes(), what, "this machine", hint)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            _compare(device_bytes, free, what, str(device), hint)


def _host_bytes() -> int | None:
    """What Linux could still give; None elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _compare(needed: int, free: int | None, what: str, where: str, hint: str) -> None:
    if free is None or needed <= free:
        return
    raise UserError(
        f"{what} needs {needed / _GIB:.2f} GiB, and {where} has {free / _GIB:.2f} GiB "
        f"free: {(needed - free) / _GIB:.2f} GiB are missing"
        + (f"; {hint}" if hint else "")
    )
