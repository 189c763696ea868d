"""The parameters of our own checkpoints, one layer at a time.

Orbax saves and loads whole arrays, and an array holds every layer: 39 GB of up_proj in
a 30B. So here Orbax makes a checkpoint of the right names with arrays of one element,
and TensorStore, the library that Orbax stores arrays with, replaces each by one of the
right shape whose layers are then written one by one. What results is an ordinary Orbax
checkpoint, which Orbax reads on any mesh.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from mpt_jax.config import ModelConfig
from mpt_jax.interop import names
from mpt_jax.interop.names import Part

ITEM = "params"  # the folder of the parameters in a checkpoint
CHUNK_BYTES = 16 << 20  # what a device that loads a slice reads at least


class ParamStore:
    """The arrays below ``checkpoint``/params.

    Args:
      checkpoint: absolute path or URL of a step.
    """

    def __init__(self, checkpoint: str | os.PathLike):
        url = os.fspath(checkpoint)
        url = url if "://" in url else f"file://{url}"
        self._base = f"{url}/{ITEM}/"
        self._open: dict[names.Path, Any] = {}

    @classmethod
    def create(cls, checkpoint: str | os.PathLike, cfg: ModelConfig) -> ParamStore:
        """A new checkpoint whose parameters, in param_dtype, are all still to write."""
        structs = names.structs(cfg)
        ones = {path: np.zeros(1, s.dtype) for path, s in structs.items()}
        context = ocp.Context()
        # In the background, a bad path is a timeout after five minutes.
        context.asynchronous.create_directories_asynchronously = False
        logging.getLogger("absl").setLevel(logging.WARNING)
        with context:
            ocp.save_checkpointables(checkpoint, {ITEM: names.unflatten(ones)})
        store = cls(checkpoint)
        # Who finishes the folder syncs it: not each of 400 writes on its own.
        lazily = ts.Context({"file_io_sync": False})
        for path, s in structs.items():
            store._open[path] = ts.open(
                store._spec(path), create=True, delete_existing=True, context=lazily,
                dtype=ts.dtype(s.dtype.name), shape=s.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=_chunk(path, s)),
            ).result()  # fmt: skip
        return store

    def write(self, part: Part, array: np.ndarray) -> None:
        """Stores one layer, or the whole of a parameter without layers."""
        store = self._array(part.path)
        target = store if part.layer is None else store[part.layer]
        target.write(array).result()

    def stream(self, cfg: ModelConfig) -> Iterator[tuple[Part, np.ndarray]]:
        """(part, array) of every layer of every parameter.

        In memory is what Orbax stored in one piece: a layer of what create() made, and
        one device's share of all layers of what a trainer saved.
        """
        parts = [p for t in names.tensors(cfg).values() for p in t.parts]
        if all(self._layers_at_once(p) == 1 for p in parts):  # files fill in order
            for part in parts:
                store = self._array(part.path)
                whole = store if part.layer is None else store[part.layer]
                yield part, whole.read().result()
            return
        by_path: dict[names.Path, list[Part]] = {}
        for part in parts:
            by_path.setdefault(part.path, []).append(part)
        for path, layers in by_path.items():
            store = self._array(path)
            if layers[0].layer is None:
                yield layers[0], store.read().result()
                continue
            step = self._layers_at_once(layers[0])
            for start in range(0, len(layers), step):
                block = store[start : min(start + step, len(layers))].read().result()
                yield from zip(layers[start : start + step], block, strict=True)

    def _layers_at_once(self, part: Part) -> int:
        if part.layer is None:
            return 1
        return self._array(part.path).chunk_layout.read_chunk.shape[0] or 1

    def _spec(self, path: names.Path) -> dict[str, Any]:
        kvstore = {"driver": "ocdbt", "base": self._base, "path": ".".join(path) + "/"}
        return {"driver": "zarr3", "kvstore": kvstore}

    def _array(self, path: names.Path) -> Any:
        if path not in self._open:
            self._open[path] = ts.open(self._spec(path)).result()
        return self._open[path]


def _chunk(path: names.Path, struct: Any) -> list[int]:
    """One layer, cut along its first dim, which fsdp or tensor split."""
    shape = list(struct.shape)
    head = [1] if path[0] == "blocks" else []
    rows, *rest = shape[len(head) :]
    fits = max(CHUNK_BYTES // (math.prod(rest) * struct.dtype.itemsize), 1)
    return [*head, min(rows, fits), *rest]
