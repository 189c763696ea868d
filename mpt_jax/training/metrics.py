"""What a step costs and how fast steps go: FLOPs, peaks and the throughput meter."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable, Iterator

from mpt_jax.config import ModelConfig

# Dense bfloat16 FLOP/s of one JAX device, by jax.Device.device_kind. Whole names only:
# a PCIe card or a MIG slice is not its bigger sibling. From the data sheets of NVIDIA
# (half of the sparse figures) and of Google Cloud TPU.
PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"(NVIDIA )?A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA H100 \d+GB HBM3|NVIDIA H200", 989e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H(100|200) NVL", 835e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where we do not know it.

    >>> peak_flops("TPU v5 lite"), peak_flops("cpu")
    (197000000000000.0, None)
    """
    for pattern, peak in PEAK_FLOPS:
        if re.fullmatch(pattern, device_kind):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward FLOPs of one token; ``causal`` halves the attention term.

    ``full`` counts the whole S x S square, as LLM Foundry does, so that MFUs compare;
    ``causal`` counts what a kernel that skips the upper triangle has to do.
    """

    full: float
    causal: float


def flops_per_token(
    model_config: ModelConfig, seq_len: int, n_params: int
) -> FlopsPerToken:
    """6 N + 12 n_layers d_model S.

    Each of N weights multiplies and adds once forward and twice backward; Q K^T and P V
    are 2 S d_model FLOPs each per layer, three times over. A tied wte is the head,
    hence counted; an untied one is only looked up, hence not; nor is recomputation.

    Args: n_params: size of the parameter tree (a tied embedding is in it once).
    Source: llm-foundry@8c8dd48:llmfoundry/models/mpt/modeling_mpt.py:flops_per_batch,
      llmfoundry/models/utils/mpt_param_count.py:mpt_get_active_params.
    """
    m = model_config
    lookup = 0 if m.tie_word_embeddings else m.vocab_size * m.d_model
    weights = 6 * (n_params - lookup)
    attention = 12 * m.n_layers * m.d_model * seq_len
    return FlopsPerToken(full=weights + attention, causal=weights + attention / 2)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speed over the window; None where nothing is measured or known yet."""

    tokens_per_second: float | None = None
    data_wait_share: float | None = None
    eta_seconds: float | None = None
    mfu: float | None = None
    mfu_causal: float | None = None

    def metrics(self) -> dict[str, float]:
        """The known ones, by name."""
        pairs = dataclasses.asdict(self).items()
        return {name: value for name, value in pairs if value is not None}


class Throughput:
    """Tokens per second, MFU, data wait and ETA over the last ``window`` logs.

    Host time only means device time once a result is on the host: call ``log(step)``
    after reading the metrics of that step. ``restart(step)`` forgets the window: after
    the first step (whose time is compilation) and after a rollback.

    Args:
      flops: of one token; None for no MFU.
      peak_flops: FLOP/s of all devices together; None for no MFU.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        tokens_per_step: int,
        flops: FlopsPerToken | None = None,
        peak_flops: float | None = None,
        window: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        self._flops, self._peak, self._clock = flops, peak_flops, clock
        self._paused = self._waited = 0.0
        # (step, seconds of training, seconds of them in next(batch)), oldest first.
        self._marks: deque[tuple[int, float, float]] = deque(maxlen=window + 1)
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Measures from here: ``step`` is done, the next one is step + 1."""
        self._marks.clear()
        self._mark(step)

    def _mark(self, step: int) -> None:
        self._marks.append((step, self._clock() - self._paused, self._waited))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here (evaluation, checkpoints) is nobody's; pauses may nest."""
        begin, before = self._clock(), self._paused
        try:
            yield
        finally:  # an assignment, so that an inner pause is not counted twice
            self._paused = before + self._clock() - begin

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time in here, around next(batch), is the input pipeline's."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    def log(self, step: int) -> Rates:
        """The rates up to ``step``, whose results are on the host.

        Raises: ValueError: ``step`` is before the last log; a rollback needs restart.
        """
        if step < self._marks[-1][0]:
            raise ValueError(f"step: got {step} after {self._marks[-1][0]}")
        self._mark(step)
        (first, begin, waited), (_, end, waited_end) = self._marks[0], self._marks[-1]
        if step == first or end <= begin:
            return Rates()
        seconds = end - begin
        tokens_per_second = (step - first) * self._tokens_per_step / seconds
        rates = Rates(
            tokens_per_second=tokens_per_second,
            data_wait_share=(waited_end - waited) / seconds,
            eta_seconds=(self._total_steps - step) * seconds / (step - first),
        )
        if self._flops is None or self._peak is None:
            return rates
        per_flop = tokens_per_second / self._peak
        return dataclasses.replace(
            rates,
            mfu=per_flop * self._flops.full,
            mfu_causal=per_flop * self._flops.causal,
        )
