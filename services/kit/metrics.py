"""Prometheus metrics that every service has, on a registry and a port of their own.

Names and labels are an interface: dashboards and alerts hang on them.
"""

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# Calls take from a millisecond (a refusal) to minutes (a large picture on a CPU).
_CALL_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_LABEL_VALUES_MOST = 64


class CappedLabel:
    """Keeps label values that clients choose from growing without bound: the first 64 are kept, the rest is `other`."""

    def __init__(self, most: int = _LABEL_VALUES_MOST) -> None:
        self._seen: set[str] = set()
        self._most = most

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) < self._most:
            self._seen.add(value)
            return value
        return "other"


class Metrics:
    """The metrics of one server. `registry` takes what a service adds of its own."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        # Per process: CPU, memory, file descriptors, garbage collection.
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.model_label = CappedLabel()
        self.requests = Counter(
            "inkwell_requests",
            "Calls that ended, by how.",
            ["service", "method", "code", "model", "hardware"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "inkwell_request_seconds",
            "Time from a call's arrival to its end.",
            ["service", "method"],
            buckets=_CALL_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "inkwell_requests_in_flight", "Calls under way, refused ones excluded.", registry=self.registry
        )
        self.queue_seconds = Histogram(
            "inkwell_queue_seconds",
            "Time from a call's admission until the engine was given it.",
            buckets=_CALL_BUCKETS,
            registry=self.registry,
        )
        self.queue_depth = Gauge("inkwell_queue_depth", "Admitted calls that wait.", registry=self.registry)
        self.running = Gauge("inkwell_engine_calls", "Calls inside the engine.", registry=self.registry)
        self.refused = Counter(
            "inkwell_refused", "Calls refused at the door, by reason.", ["reason"], registry=self.registry
        )
        self.cancelled = Counter(
            "inkwell_cancelled",
            "Calls that their caller gave up, by where they stood: queued or running.",
            ["phase"],
            registry=self.registry,
        )
        self.engine_restarts = Counter(
            "inkwell_engine_restarts", "Times that the engine process ended unasked.", registry=self.registry
        )
        self.ready = Gauge("inkwell_ready", "1 while the service is ready for calls.", registry=self.registry)
        # The look-up by labels costs more than the counting.
        self._counts: dict[tuple[str, str, str, str], tuple[Counter, Histogram]] = {}

    def ended(self, method: str, code: str, *, model: str, hardware: str, seconds: float) -> None:
        """Count a call that ended, and the seconds that it took."""
        key = (method, code, self.model_label(model), hardware)
        counts = self._counts.get(key)
        if counts is None:
            counts = (self.requests.labels(self.service, *key), self.request_seconds.labels(self.service, method))
            self._counts[key] = counts
        counts[0].inc()
        counts[1].observe(seconds)

    def follow_certificate(self, expires: Callable[[], float]) -> None:
        """Show when the server's certificate expires; `expires` answers that in seconds of Unix time."""
        gauge = Gauge(
            "inkwell_certificate_expires_seconds",
            "When the certificate that is served expires, in seconds of Unix time.",
            registry=self.registry,
        )
        gauge.set_function(expires)


class MetricsPage:
    """The HTTP page that Prometheus scrapes, served by a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, registry=registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
