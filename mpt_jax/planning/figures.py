"""What a plan consists of, whoever found it out: the compiler or a formula."""

from __future__ import annotations

import dataclasses
import math

from mpt_jax.planning.collectives import Collective
from mpt_jax.planning.topology import Fabric


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. peak: at the worst moment of a step, all in all;
    temporaries: what then is neither state nor batch; host: not in the device's own
    memory, and not in peak."""

    parameters: int
    optimizer: int
    batch: int
    peak: int
    cache: int = 0
    host: int = 0

    @property
    def temporaries(self) -> int:
        return self.peak - self.parameters - self.optimizer - self.batch - self.cache


@dataclasses.dataclass(frozen=True)
class Figures:
    """One step of a program on a mesh.

    source: "compiled" or "analytic"; tokens: of all devices; model_flops: of all
    devices by LLM Foundry's formula (the whole square of attention), causal_flops with
    half of it, executed_flops with recomputation; hbm_bytes, host_bytes: what one
    device moves; compile_seconds: None where nothing was compiled.
    """

    source: str
    mesh: dict[str, int]
    tokens: int
    memory: Memory
    model_flops: float
    causal_flops: float
    executed_flops: float
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    host_bytes: int = 0
    compile_seconds: float | None = None

    @property
    def n_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def collective_bytes(self) -> int:
        return sum(c.bytes for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of a step's seconds.

    compute, hbm, host: of one device at its peaks; network: per mesh axes, of what is
    sent over them; overlapped: the longest of all, all axes at once; exposed: what is
    not asynchronous in the program waits for the rest, and so do the axes for each
    other.
    """

    compute: float
    hbm: float
    host: float
    network: dict[str, float]
    overlapped: float
    exposed: float
    limit: str
    mfu: float
    mfu_exposed: float
    mfu_causal: float


def roofline(figures: Figures, fabric: Fabric) -> Roofline:
    """The bounds of ``figures`` on ``fabric``."""
    chip, n = fabric.chip, figures.n_devices
    compute = figures.executed_flops / n / chip.flops
    hbm = figures.hbm_bytes / chip.hbm_bandwidth
    host = figures.host_bytes / chip.host_bandwidth
    network: dict[str, float] = {}
    waiting = 0.0
    for c in figures.collectives:
        seconds = c.bytes / fabric.bandwidth(c.axes)
        name = "+".join(c.axes)
        network[name] = network.get(name, 0.0) + seconds
        waiting += 0.0 if c.asynchronous else seconds
    bounds = {"compute": compute, "HBM": hbm, "host": host}
    bounds |= {f"network ({name})": seconds for name, seconds in network.items()}
    limit = max(bounds, key=bounds.get)
    overlapped = bounds[limit]
    total = sum(network.values())
    exposed = waiting + max(compute, hbm, host, total - waiting)
    at_peak = n * chip.flops
    return Roofline(
        compute=compute,
        hbm=hbm,
        host=host,
        network=network,
        overlapped=overlapped,
        exposed=exposed,
        limit=limit,
        mfu=figures.model_flops / at_peak / overlapped,
        mfu_exposed=figures.model_flops / at_peak / exposed,
        mfu_causal=figures.causal_flops / at_peak / overlapped,
    )
