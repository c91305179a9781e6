"""What /metrics says: counts, and how long requests took, in Prometheus' format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glmtune.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics")
_OTHER = "other"


class Metrics:
    """The numbers of one server.

    Args:
        scheduler: whose state is reported.
    """

    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()
        self.registry.register(_OfScheduler(scheduler))
        self._requests = Counter(
            "glmtune_requests", "Requests by path and status.", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "glmtune_first_token_seconds", "From a request to the first token of its answers.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "glmtune_request_seconds", "From a request to the end of its answers.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def count(self, path: str, status: int) -> None:
        """Count a request; paths that are not ours are one."""
        self._requests.labels(path if path in _PATHS else _OTHER, str(status)).inc()

    def text(self) -> bytes:
        """All numbers."""
        return generate_latest(self.registry)


class _OfScheduler(Collector):
    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """The scheduler's numbers now."""
        scheduler = self.scheduler
        for name, text, value in (
            ("slots", "Answers that can be generated at a time.", len(scheduler.slots.rows)),
            ("running", "Answers that are being generated.", len(scheduler.running)),
            ("waiting", "Answers that wait for a slot.", scheduler.num_waiting),
        ):
            yield GaugeMetricFamily(f"glmtune_{name}", text, value)
        for name, text, value in (
            ("generated_tokens", "Tokens of answers.", scheduler.num_tokens),
            ("prompt_tokens", "Tokens of prompts that were read.", scheduler.num_prompt_tokens),
            ("steps", "Steps, each of which adds a token to every answer.", scheduler.num_steps),
        ):
            yield CounterMetricFamily(f"glmtune_{name}", text, value)
