"""Counters for Prometheus, under the names that vLLM's dashboards know."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 60.0)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Metrics:
    """A registry of its own. Every metric has the label `model_name`."""

    def __init__(self, model: str) -> None:
        import prometheus_client as prometheus

        self.registry = prometheus.CollectorRegistry()
        self._library = prometheus

        def make(kind: Any, name: str, help_text: str, **more: Any) -> Any:
            return kind(f"vllm:{name}", help_text, ["model_name"], registry=self.registry, **more).labels(model)

        gauge, counter, histogram = prometheus.Gauge, prometheus.Counter, prometheus.Histogram
        self.running = make(gauge, "num_requests_running", "Requests in the batch.")
        self.waiting = make(gauge, "num_requests_waiting", "Requests in the queue.")
        self.prompt_tokens = make(counter, "prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = make(counter, "generation_tokens", "Tokens that were generated.")
        self.aborted = make(counter, "request_aborted", "Requests that their client left.")
        self.first = make(
            histogram, "time_to_first_token_seconds", "From the request to its first token.", buckets=_SECONDS
        )
        self.between = make(
            histogram, "time_per_output_token_seconds", "Between two tokens of a choice.", buckets=_BETWEEN
        )
        self.whole = make(
            histogram, "e2e_request_latency_seconds", "From the request to its last token.", buckets=_SECONDS
        )
        self._finished = prometheus.Counter(
            "vllm:request_success", "Choices by how they ended.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._model = model

    def finished(self, reason: str) -> None:
        """A choice came to its end."""
        self._finished.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """The page."""
        return bytes(self._library.generate_latest(self.registry))


class Timer:
    """The times of one choice, on the clock of `time.perf_counter`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = time.perf_counter()
        self._last: float | None = None

    def tokens(self, times: Sequence[float], finish: str | None) -> None:
        """Tokens became known at these times; `finish` says how the choice ended, if it did."""
        metrics = self._metrics
        metrics.generation_tokens.inc(len(times))
        for now in times:
            if self._last is None:
                metrics.first.observe(now - self._begin)
            else:
                metrics.between.observe(now - self._last)
            self._last = now
        if finish:
            metrics.whole.observe(times[-1] - self._begin)
            metrics.finished(finish)
