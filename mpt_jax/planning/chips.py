"""Chip facts as data: memory, bandwidth and links of what one can rent.

Compute peaks stay in training/metrics.py, by device kind, where MFU takes them.
"""

from __future__ import annotations

import dataclasses

from mpt_jax.training.metrics import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; bandwidths in bytes per second.

    hbm_gib: what a program may use, for a TPU the limit that libtpu compiles against
    (the sheet's figure less what the runtime keeps). link_bandwidth: one direction of
    one link to a neighbour (TPU), or of all links into the node's switch (GPU).
    torus_dims, ring: how many dims of neighbours a slice has, and the number of chips
    from which a dim closes to a ring (multiples of it do). node: devices that share the
    fast network of a GPU machine. network_bandwidth: per device, out of the slice or
    machine. host_bandwidth: per device, to or from its host. config: libtpu's name of
    the mode where two cores are one device.
    """

    device_kind: str
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    source: str
    host_bandwidth: float = 16e9  # PCIe 3 x16: of TPUs nothing is published
    torus_dims: int = 0
    ring: int = 0
    node: int = 0
    config: str = "default"

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak

    @property
    def is_tpu(self) -> bool:
        return self.torus_dims > 0

    @property
    def lanes(self) -> int:
        """Elements that the last dim of an array in memory is a multiple of."""
        return 128 if self.is_tpu else 1


_GOOGLE = "Cloud TPU docs, system architecture of {}; hbm_gib: libtpu 0.0.42.1"
_NVIDIA = (
    "data sheet of {} (PCIe both ways); network: {}; hbm_gib: the sheet less 1.5 for "
    "the runtime"
)

CHIPS: dict[str, Chip] = {
    # Links: the docs' bandwidth per chip over its ports, one of two directions.
    "v4": Chip(
        "TPU v4", 30.75, 1228e9, 50e9, 6.25e9, torus_dims=3, ring=4, config="megacore",
        source=_GOOGLE.format("v4: 2400 Gbps over 6 links; network: as v5p's"),
    ),
    "v5e": Chip(
        "TPU v5 lite", 15.75, 819e9, 50e9, 3.125e9, torus_dims=2, ring=16,
        source=_GOOGLE.format("v5e: 400 GB/s both ways over 4 links; 6.4 Tbps a pod"),
    ),
    "v5p": Chip(
        "TPU v5", 95.74, 2765e9, 100e9, 6.25e9, torus_dims=3, ring=4,
        source=_GOOGLE.format("v5p: 1200 GB/s both ways over 6 links; 50 Gbps a chip"),
    ),
    "v6e": Chip(
        "TPU v6 lite", 31.25, 1638e9, 100e9, 12.5e9, torus_dims=2, ring=16,
        source=_GOOGLE.format("v6e: 800 GB/s both ways over 4 links; 25.6 Tbps a pod"),
    ),
    "a100-40": Chip(
        "NVIDIA A100-SXM4-40GB", 38.0, 1555e9, 300e9, 25e9, node=8,
        source=_NVIDIA.format("A100 SXM, NVLink 600 GB/s both ways", "200 Gbps each"),
        host_bandwidth=32e9,
    ),
    "a100-80": Chip(
        "NVIDIA A100-SXM4-80GB", 77.7, 2039e9, 300e9, 25e9, node=8,
        source=_NVIDIA.format("A100 SXM, NVLink 600 GB/s both ways", "200 Gbps each"),
        host_bandwidth=32e9,
    ),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", 77.7, 3350e9, 450e9, 50e9, node=8,
        source=_NVIDIA.format("H100 SXM, NVLink 900 GB/s both ways", "400 Gbps each"),
        host_bandwidth=64e9,
    ),
}  # fmt: skip
