"""A place in a data stream as bytes, with what it is a place in.

Restoring into another stream would silently train on the wrong data (tf.data goes on
with the old one), so the header of a position must equal that of its reader.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from mpt_jax.config import TrainConfig
from mpt_jax.errors import CheckpointError


def header(config: TrainConfig, *, split: str, **more: Any) -> dict[str, Any]:
    """What a position and its reader must agree on; ``more`` is JSON too."""
    common = {
        "source": config.data.source,
        "split": split,
        "seed": config.seed,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size,
    }
    return common | more


def pack(header: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """A SHA-256, then a zip of header.json and ``files``."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, content in {"header.json": json.dumps(header), **files}.items():
            # ZipInfo's fixed date: the same position is the same bytes. Level 1 halves
            # the shuffle buffer in 20 ms.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 1)
    return hashlib.sha256(body.getvalue()).digest() + body.getvalue()


def unpack(state: bytes, header: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of ``state``. Raises: CheckpointError: damaged, or of another run."""
    digest, body = state[:32], state[32:]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError("the data position is damaged: its checksum is wrong")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    saved = json.loads(files.pop("header.json"))
    if found := differences(saved, header):
        raise CheckpointError(
            "the data position is of another run:\n  " + "\n  ".join(found)
        )
    return files


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each field, at any depth, whose values are not equal."""
    saved, now = _flat(saved), _flat(now)
    return [
        f"{name}: saved with {saved.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in header.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
