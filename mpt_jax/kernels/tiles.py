"""Tile sizes of the Pallas kernels, per device, as data.

A tile is ``rows`` queries by ``columns`` keys: what one step of a kernel's inner loop
computes. bench/attention_static.py judges the TPU entries without a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Rows and columns of a tile, forward and backward, and the memory to plan for.

    resident_bytes: how much of a row's keys and values (forward), or queries and their
    gradients (backward), may stay in VMEM; longer rows come in chunks of that size.
    vmem_bytes: all VMEM of one core; the rest is for the temporaries of a tile.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    resident_bytes: int
    vmem_bytes: int


# By jax's device_kind.
TPU: dict[str, TpuTiles] = {
    "TPU v4": TpuTiles((512, 512), (512, 512), 8 * MIB, 16 * MIB),
    "TPU v5 lite": TpuTiles((512, 512), (512, 512), 96 * MIB, 128 * MIB),
    "TPU v5": TpuTiles((512, 512), (512, 512), 48 * MIB, 64 * MIB),
    "TPU v6 lite": TpuTiles((512, 512), (512, 512), 96 * MIB, 128 * MIB),
    # Compiles; its cycles are not measured.
    "TPU7x": TpuTiles((512, 512), (512, 512), 48 * MIB, 64 * MIB),
}
# What topology descriptions and some releases call the same chips.
TPU |= {"TPU v5e": TPU["TPU v5 lite"], "TPU v5p": TPU["TPU v5"]}
TPU |= {"TPU v6e": TPU["TPU v6 lite"]}


class GpuTile(NamedTuple):
    """A block of one Triton kernel, its warps, and the blocks it loads ahead plus 1."""

    rows: int
    columns: int
    warps: int
    stages: int


class GpuTiles(NamedTuple):
    """The tile of each of the three kernels."""

    forward: GpuTile
    dq: GpuTile
    dkv: GpuTile

    def fitted(self, n_rows: int, n_columns: int, smallest: int) -> GpuTiles:
        """Cut to powers of 2 that are less than twice the rows and the columns."""
        limits = [max(smallest, 1 << (n - 1).bit_length()) for n in (n_rows, n_columns)]

        def fit(tile: GpuTile) -> GpuTile:
            rows, columns = map(min, (tile.rows, tile.columns), limits)
            return tile._replace(rows=rows, columns=columns)

        return GpuTiles(*map(fit, self))


# By architecture and padded head_dim, for 16-bit inputs: of the tiles without register
# spills those with the fewest instructions per logit.
GPU: dict[str, dict[int, GpuTiles]] = {
    "ampere": {
        64: GpuTiles(
            GpuTile(128, 64, 4, 2), GpuTile(64, 64, 4, 2), GpuTile(64, 64, 4, 2)
        ),
        128: GpuTiles(
            GpuTile(128, 64, 8, 2), GpuTile(128, 32, 8, 2), GpuTile(128, 64, 8, 2)
        ),
        256: GpuTiles(
            GpuTile(64, 32, 8, 2), GpuTile(64, 32, 8, 1), GpuTile(32, 32, 8, 1)
        ),
    },
    "hopper": {
        64: GpuTiles(
            GpuTile(128, 128, 8, 2), GpuTile(128, 128, 8, 2), GpuTile(64, 64, 4, 2)
        ),
        128: GpuTiles(
            GpuTile(128, 128, 8, 2), GpuTile(128, 64, 8, 2), GpuTile(64, 128, 8, 2)
        ),
        256: GpuTiles(
            GpuTile(128, 64, 8, 2), GpuTile(64, 32, 8, 2), GpuTile(32, 32, 8, 2)
        ),
    },
}
# float32 has no tensor cores in full precision: small tiles that fit the registers.
GPU_FLOAT32 = GpuTiles(
    GpuTile(32, 32, 8, 1), GpuTile(32, 16, 4, 1), GpuTile(16, 32, 4, 1)
)
_HOPPER = ("H100", "H200", "GH200", "H800", "H20")


# A soft-cap or a loop over the heads of a group takes registers that the largest dkv
# tile has not.
_HOPPER_CROWDED_DKV = GpuTile(32, 64, 4, 2)


def gpu_tiles(
    device_kind: str, itemsize: int, padded_dim: int, *, crowded: bool = False
) -> GpuTiles:
    """For inputs of ``itemsize`` bytes; unknown devices get what Ampere can hold.

    crowded: the call has a soft-cap or grouped heads.
    """
    if itemsize == 4:
        return GPU_FLOAT32
    hopper = any(name in device_kind for name in _HOPPER)
    sizes = GPU["hopper" if hopper else "ampere"]
    best = sizes[min((d for d in sizes if d >= padded_dim), default=max(sizes))]
    if hopper and crowded and padded_dim == 128:
        return best._replace(dkv=_HOPPER_CROWDED_DKV)
    return best
