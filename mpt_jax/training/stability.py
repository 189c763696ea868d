"""When a loss is not finite, or out of proportion: detection only, train.py acts."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from mpt_jax.config import StabilityConfig


class Verdict(enum.Enum):
    OK = "ok"
    SKIPPED = "skipped"  # not finite: the train step did not apply it
    SPIKE = "spike"
    NONFINITE_LIMIT = "nonfinite limit"  # more of them in a row than allowed


class SpikeDetector:
    """Judges one step after the other.

    An outlier is a loss over spike_factor * mean of the last spike_window good losses;
    there is none until that many are known. More than spike_patience outliers in a row
    are a spike. More than max_skips non-finite steps in a row are NONFINITE_LIMIT;
    where nonfinite is "stop", already the first.

    Other than LLM Foundry's KillLossSpike: outliers stay out of the mean, which would
    otherwise rise until the spike looks normal; the window does not grow with the run;
    there is no cap on the loss itself. A spike is reported once: then the window starts
    anew, so that a run that goes on is judged by its new level.

    Source: llm-foundry@8c8dd48:llmfoundry/callbacks/kill_loss_spike_callback.py.
    """

    def __init__(self, config: StabilityConfig):
        self._config = config
        self._max_skips = 0 if config.nonfinite == "stop" else config.max_skips
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._outliers = self._skips = 0
        self.reason = ""  # of the last verdict that was not OK, for the user
        self.bad_since = 0  # first step of the row of bad ones that it ended
        self._outlier_since = self._skip_since = 0  # the rows may overlap

    def observe(self, step: int, loss: float, finite: bool) -> Verdict:
        """Judges ``step``; every step once, in order, also those that were skipped.

        Args: finite: whether loss and gradient were, that is, whether it was applied.
        """
        if not (finite and math.isfinite(loss)):
            return self._observe_nonfinite(step, loss)
        self._skips = 0
        c, full = self._config, len(self._losses) == self._config.spike_window
        mean = math.fsum(self._losses) / c.spike_window
        if not (full and loss > c.spike_factor * mean):
            self._outliers = 0
            self._losses.append(loss)
            return Verdict.OK
        self._outliers += 1
        if self._outliers == 1:
            self._outlier_since = step
        if self._outliers <= c.spike_patience:
            return Verdict.OK
        self.reason = (
            f"step {step}: loss {loss:.4f} is over {c.spike_factor:g} x {mean:.4f} "
            f"(mean of the last {c.spike_window}), {self._outliers} steps in a row"
        )
        self.bad_since = self._outlier_since
        self._outliers = 0
        self._losses.clear()
        return Verdict.SPIKE

    def _observe_nonfinite(self, step: int, loss: float) -> Verdict:
        self._skips += 1
        if self._skips == 1:
            self._skip_since = step
        self.bad_since = self._skip_since
        what = "gradient" if math.isfinite(loss) else "loss"
        self.reason = (
            f"step {step}: {what} is not finite, {self._skips} in a row "
            f"({self._max_skips} allowed)"
        )
        over = self._skips > self._max_skips
        return Verdict.NONFINITE_LIMIT if over else Verdict.SKIPPED

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; goes into the checkpoint."""
        return {
            "losses": list(self._losses),
            "outliers": self._outliers,
            "skips": self._skips,
            "outlier_since": self._outlier_since,
            "skip_since": self._skip_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``; a changed spike_window keeps the newest losses."""
        self._losses = deque(state["losses"], maxlen=self._config.spike_window)
        self._outliers, self._skips = state["outliers"], state["skips"]
        self._outlier_since = state["outlier_since"]
        self._skip_since = state["skip_since"]
