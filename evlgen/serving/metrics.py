"""What a server measures of itself, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters and gauges of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, num_waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "evlgen_requests",
            "Requests for texts, by HTTP status; streams by how they ended.",
            ["status"],
            registry=registry,
        )
        self.refusals = Counter(
            "evlgen_refusals", "Requests that were refused, by cause.", ["code"], registry=registry
        )
        self.seconds = Histogram(
            "evlgen_request_seconds",
            "From the head of a request to its answer, of those that were answered.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.admitted = Gauge("evlgen_requests_in_progress", "Requests in the server.", registry=registry)
        waiting = Gauge("evlgen_requests_waiting", "Requests that are in no batch yet.", registry=registry)
        waiting.set_function(num_waiting)
        self.batch_size = Histogram(
            "evlgen_batch_size",
            "Requests of a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "evlgen_batch_seconds", "Seconds a batch takes.", buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("evlgen_tokens", "Tokens read and written.", ["kind"], registry=registry)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Counts a batch."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)
