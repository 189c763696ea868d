"""The plan as text and as JSON, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mpt_jax.config import TrainConfig
from mpt_jax.planning.chips import GIB
from mpt_jax.planning.figures import Figures, Roofline
from mpt_jax.planning.topology import Topology

MIB = 2**20
# Of a peak by formula (analytic.py): what the compiler rounds, pads and prefetches.
FORMULA_ERROR = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one configuration on one topology.

    needed: bytes of the peak, which stands without figures where the compiler gave up;
    estimate: the formula's beside the compiler's; advice: the nearest change that fits,
    in words, where this does not; detail: what generation is to hold.
    """

    what: str
    config: TrainConfig
    topology: Topology
    needed: int
    figures: Figures | None = None
    roofline: Roofline | None = None
    estimate: int | None = None
    advice: str = ""
    detail: str = ""

    @property
    def spare_gib(self) -> float:
        return self.topology.chip.hbm_gib - self.needed / GIB

    @property
    def fits(self) -> bool:
        return self.spare_gib >= 0

    @property
    def safe(self) -> bool:
        """Fits even if the formula, where there is no more, saw too little."""
        analytic = self.figures is not None and self.figures.source == "analytic"
        margin = FORMULA_ERROR * self.needed if analytic else 0.0
        return self.spare_gib * GIB >= margin

    @property
    def verdict(self) -> str:
        if self.fits:
            near = "" if self.safe else ", which is within the formula's error"
            return f"fits, with {self.spare_gib:.2f} GiB to spare{near}"
        change = f"; nearest change that does: {self.advice}" if self.advice else ""
        return f"does not fit, by {-self.spare_gib:.2f} GiB{change}"


def to_dict(plan: Plan) -> dict[str, Any]:
    """All of ``plan`` as plain values, for JSON."""
    config, topology = plan.config, plan.topology
    training = {
        "global_batch_size": config.global_batch_size,
        "seq_len": config.seq_len,
        "microbatches": config.microbatches,
        "remat": config.model.remat,
        "optimizer": config.optim.name,
    }
    values: dict[str, Any] = {
        "what": plan.what,
        "topology": topology.name,
        "devices": f"{topology.n_devices} x {topology.chip.device_kind}",
        **({"load": plan.detail} if plan.detail else training),
        "n_layers": config.model.n_layers,
        "fits": plan.fits,
        "verdict": plan.verdict,
        "peak_gib": round(plan.needed / GIB, 3),
        "hbm_gib": topology.chip.hbm_gib,
    }
    if plan.estimate is not None:
        values["peak_gib_by_formula"] = round(plan.estimate / GIB, 3)
    if plan.figures is not None:
        figures = dataclasses.asdict(plan.figures)
        figures["memory"]["temporaries"] = plan.figures.memory.temporaries
        figures["collective_bytes_per_token"] = _per_token(plan.figures)
        values |= figures
    if plan.roofline is not None:
        values["roofline_seconds"] = dataclasses.asdict(plan.roofline)
    return values


def _per_token(f: Figures) -> float:
    """Bytes that a device receives for each token that it trains on."""
    return round(f.collective_bytes * f.n_devices / f.tokens, 1)


def table(plan: Plan) -> str:
    """The plan for people."""
    sections = [("", _head(plan))]
    if plan.figures is not None:
        sections += [
            ("per device", _memory(plan)),
            ("FLOPs", _flops(plan.figures)),
            ("collectives", _collectives(plan.figures)),
        ]
    if plan.roofline is not None:
        sections.append(("roofline", _roofline(plan.figures, plan.roofline)))
    sections.append(("verdict", [plan.verdict]))
    return "\n".join(
        f"{title if n == 0 else '':<14}{line}".rstrip()
        for title, lines in sections
        for n, line in enumerate(lines)
    )


def _head(plan: Plan) -> list[str]:
    c, t, f = plan.config, plan.topology, plan.figures
    sizes = f.mesh if f is not None else dataclasses.asdict(c.mesh)
    mesh = " x ".join(f"{name}={size}" for name, size in sizes.items())
    training = (
        f"{c.global_batch_size:,} x {c.seq_len:,} tokens, microbatches "
        f"{c.microbatches}, remat {c.model.remat}, {c.optim.name}"
    )
    lines = [
        f"{plan.what} on {t.name}: {t.n_devices} x {t.chip.device_kind}, {mesh}",
        plan.detail or training,
    ]
    if f is not None and f.compile_seconds is not None:
        lines.append(f"compiled by libtpu in {f.compile_seconds:.0f} s")
    elif f is not None:
        lines.append("analytic: by formula, nothing was compiled")
    return lines


def _memory(plan: Plan) -> list[str]:
    m = plan.figures.memory
    rows = {
        "parameters": m.parameters,
        "optimizer": m.optimizer,
        "KV cache": m.cache,
        "batch": m.batch,
        "temporaries": m.temporaries,
        "peak": m.peak,
    }
    lines = [f"{k:<12}{v / GIB:9.3f} GiB" for k, v in rows.items() if v]
    lines[-1] += f" of {plan.topology.chip.hbm_gib} GiB"
    if plan.estimate is not None:
        lines[-1] += f" ({plan.estimate / GIB:.3f} by formula)"
    if m.host:
        lines.append(f"{'in the host':<12}{m.host / GIB:9.3f} GiB")
    return lines


def _flops(f: Figures) -> list[str]:
    if f.causal_flops == f.model_flops:  # generation: there is no other half
        formula = f"{f.model_flops:.4g} by 2 N + 4 layers d_model length"
    else:
        formula = (
            f"{f.model_flops:.4g} a step by 6 N + 12 layers d_model length "
            f"({f.causal_flops:.4g} with causal attention)"
        )
    return [f"{formula}, {f.executed_flops:.4g} executed"]


def _collectives(f: Figures) -> list[str]:
    if not f.collectives:
        return ["none"]
    lines = [
        f"{'kind':<20}{'axes':<16}{'calls':>6}{'count':>7}{'MiB received':>14}  overlap"
    ]
    for c in f.collectives:
        lines.append(
            f"{c.kind:<20}{'+'.join(c.axes):<16}{c.calls:>6}{c.count:>7}"
            f"{c.bytes / MIB:>14,.1f}  {'asynchronous' if c.asynchronous else 'waits'}"
        )
    lines.append(
        f"in all {f.collective_bytes / MIB:,.1f} MiB a device, "
        f"{_per_token(f) / 2**10:,.1f} KiB a token"
    )
    return lines


def _roofline(f: Figures, r: Roofline) -> list[str]:
    parts = [f"compute {_time(r.compute)}", f"HBM {_time(r.hbm)}"]
    parts += [f"host {_time(r.host)}"] if r.host else []
    parts += [f"network ({k}) {_time(v)}" for k, v in r.network.items()]
    return [
        ", ".join(parts),
        f"step >= {_time(r.overlapped)}, limited by {r.limit}: MFU <= {r.mfu:.1%} "
        f"({r.mfu_causal:.1%} causal), {f.tokens / r.overlapped / f.n_devices:,.0f} "
        "tokens/s a device",
        f"with what the program waits for: step >= {_time(r.exposed)}, "
        f"MFU <= {r.mfu_exposed:.1%}",
    ]


def _time(seconds: float) -> str:
    """
    >>> _time(0.01234), _time(2.5), _time(0.00004)
    ('12.34 ms', '2.500 s', '0.04 ms')
    """
    if math.isfinite(seconds) and seconds < 1:
        return f"{seconds * 1000:.2f} ms"
    return f"{seconds:.3f} s"
