"""Which rows of a global batch this process reads, and their way to its devices."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows that this process's devices hold: the index-th of count such parts.

    There are fewer parts than processes where an axis of the model, not of the batch,
    spans several: those hold, and read, the same rows. first: of these processes, this
    is the one that saves how far they have read. Rows need not be neighbours: a mesh
    may lay the devices of a host apart.
    """

    rows: tuple[int, ...]
    index: int
    count: int
    first: bool
    batch_size: int  # of all parts


def share(sharding: NamedSharding, shape: tuple[int, int]) -> Share:
    """This process's share of batches of ``shape`` (B, L)."""
    spans = collections.defaultdict(set)
    for device, (rows, _) in sharding.devices_indices_map(shape).items():
        spans[device.process_index].add(rows.indices(shape[0])[:2])
    parts = {process: tuple(sorted(found)) for process, found in spans.items()}
    here = jax.process_index()
    mine = parts[here]
    return Share(
        rows=tuple(row for begin, end in mine for row in range(begin, end)),
        index=sorted(set(parts.values())).index(mine),
        count=len(set(parts.values())),
        first=here == min(p for p, part in parts.items() if part == mine),
        batch_size=shape[0],
    )


def place(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, share: Share
) -> dict[str, Any]:
    """Global arrays (B, L) from this process's rows of them, (len(share.rows), L).

    The copies to the devices go on while the step before runs.
    """
    at = {row: i for i, row in enumerate(share.rows)}

    def put(rows_BL: np.ndarray) -> jax.Array:
        shape = (share.batch_size, *rows_BL.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(share.batch_size)
            return rows_BL[at[begin] : at[begin] + end - begin, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(rows_BL) for name, rows_BL in batch.items()}
