"""Slices and clusters by name, and how fast a mesh axis is on them.

``v5p:4x4x8`` is a TPU slice, ``2*v5e:16x16`` two of them over the data-centre network,
``h100:64`` eight machines of eight GPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpt_jax.config import MeshConfig
from mpt_jax.errors import ConfigError, UserError
from mpt_jax.planning.chips import CHIPS, Chip

if TYPE_CHECKING:
    from jax.sharding import Mesh

# libtpu must not look for the machine it runs on; read once, when it is loaded.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers do not share a chip
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; else it warns that it found none
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """``slices`` slices of ``shape`` chips, or so many GPUs; ``name`` is its text."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def n_devices(self) -> int:
        return self.slices * math.prod(self.shape)


def parse(name: str) -> Topology:
    """The topology of a name such as ``v5e:16x16``.

    >>> parse("2*v5e:16x16").n_devices, parse("h100:16").n_devices
    (512, 16)

    Raises: UserError: another chip, or a shape that it does not come in.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([\w-]+):(\d+(?:x\d+)*)", name)
    if match is None:
        raise UserError(
            f"topology {name!r}: expected CHIP:SHAPE, as v5p:4x4x8 or h100:16"
        )
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    if kind not in CHIPS:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise UserError(
            f"topology {name!r}: {kind!r} is none of {', '.join(CHIPS)}{hint}"
        )
    chip = CHIPS[kind]
    dims = tuple(int(n) for n in shape.split("x"))
    wanted = chip.torus_dims or 1
    if len(dims) != wanted or min(dims) < 1 or slices < 1:
        example = {1: "8", 2: "4x4", 3: "4x4x4"}[wanted]
        raise UserError(
            f"topology {name!r}: a shape of {kind} has {wanted} dim(s), as {example}"
        )
    if not chip.is_tpu and slices > 1:
        raise UserError(f"topology {name!r}: GPUs have no slices; give their number")
    return Topology(name, chip, dims, slices)


def prepare_environment() -> None:
    """Sets what libtpu reads when it loads. Call before JAX is imported."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def make_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """The mesh of ``config`` over devices that need not exist, as train.py lays it out.

    Raises: ConfigError: the mesh cannot lie on the slice. UserError: no libtpu here, or
      it knows no such slice.
    """
    from mpt_jax import partitioning

    try:
        return partitioning.make_mesh(config, _devices(topology))
    except (NotImplementedError, ValueError) as error:
        raise ConfigError([f"mesh: {error}"], location=topology.name) from error


@functools.cache
def _devices(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    shape = "x".join(map(str, topology.shape))
    chip = next(k for k, c in CHIPS.items() if c is topology.chip)
    options: dict[str, Any] = {"chip_config_name": topology.chip.config}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(f"{chip}:{shape}", "tpu", **options)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {topology.name!r}: libtpu refuses: {reason}. It comes with "
            "pip install -e .[aot]"
        ) from error
    return found.devices


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Bytes per second that each device receives in a collective over mesh axes.

    Args: mesh: name -> size, the last varies fastest; devices: of a TPU mesh, in its
      order; None for GPUs.
    """

    chip: Chip
    mesh: Mapping[str, int]
    devices: Sequence[Any] | None = None
    shape: tuple[int, ...] = ()

    def bandwidth(self, axes: tuple[str, ...]) -> float:
        """Of a collective over ``axes``, as rings over all links that they cover."""
        group = self._group(axes)
        if len(group) < 2:
            return math.inf
        return self._torus(group) if self.chip.is_tpu else self._cluster(group)

    def _group(self, axes: tuple[str, ...]) -> np.ndarray:
        """The places in the mesh of the devices that differ in ``axes`` only."""
        names = tuple(self.mesh)
        places = np.arange(math.prod(self.mesh.values())).reshape(
            tuple(self.mesh.values())
        )
        index = tuple(slice(None) if name in axes else 0 for name in names)
        return np.ravel(places[index])

    def _torus(self, group: np.ndarray) -> float:
        """A dim of the torus that closes carries a ring both ways, another one only
        one way's worth: its ends have one neighbour. Between slices each member has its
        part to send, so that all their network counts."""
        slices: dict[int, list[Any]] = {}
        for device in (self.devices[i] for i in group):
            slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
        inside = max(slices.values(), key=len)
        network = len(inside) * self.chip.network_bandwidth
        if len(inside) == 1:
            return network
        lanes = 0
        for axis, size in enumerate(self.shape):
            extent = len({d.coords[axis] for d in inside})
            if extent > 1:
                closed = extent == size and size % self.chip.ring == 0
                lanes += 2 if closed else 1
        links = lanes * self.chip.link_bandwidth
        return min(links, network) if len(slices) > 1 else links

    def _cluster(self, group: np.ndarray) -> float:
        """NVLink inside a machine; across, all network cards of the members at once."""
        machines = [int(i) // self.chip.node for i in group]
        inside = max(len(list(g)) for _, g in itertools.groupby(sorted(machines)))
        if inside == len(group):
            return self.chip.link_bandwidth
        return min(self.chip.link_bandwidth, inside * self.chip.network_bandwidth)
