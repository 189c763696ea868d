"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mpt_jax.serving.jobs import Worker

# Seconds: a token of a small model to an answer of thousands.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The counters of one server; those of its engine are read when asked for."""

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self._worker = worker
        self._registry.register(self)
        self.requests = Counter(
            "mpt_http_requests", "Answered requests, by path and status.",
            ("path", "status"), registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "mpt_first_token_seconds", "From a whole request to its first news.",
            buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self.answer = Histogram(
            "mpt_answer_seconds", "From a whole request to the end of its answer.",
            buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers; Prometheus' client calls this."""
        engine, counters = self._worker.engine, self._worker.engine.counters
        for name, text, value in (
            ("mpt_slots", "Slots of the KV cache.", engine.n_slots),
            ("mpt_slots_busy", "Slots with a request.", engine.n_running),
            ("mpt_queue", "Requests without a slot.", engine.n_waiting),
            ("mpt_healthy", "1 while the engine lives.", int(self._worker.healthy)),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("mpt_prompt_tokens", "Of admitted requests.", counters.prompt_tokens),
            ("mpt_cached_tokens", "Not computed anew.", counters.cached_tokens),
            ("mpt_prefix_hits", "Prompts begun from a cache.", counters.prefix_hits),
            ("mpt_generated_tokens", "Drawn.", counters.generated_tokens),
        ):
            yield CounterMetricFamily(name, text, value)
        ends = CounterMetricFamily("mpt_finished", "Ended.", labels=("reason",))
        for reason, n in dict(counters.finished).items():
            ends.add_metric((reason,), n)
        yield ends
