"""Prometheus metrics that every service has, on a registry and a port of their own.

Names and labels are an interface: dashboards and alerts hang on them.
"""

import threading
import time
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from inkwell.version import __version__

# When a series began is known from the process's start. Telling it of each would be half of the page.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Calls take from a millisecond (a refusal) to minutes (a large picture on a CPU).
_CALL_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_LABEL_VALUES_MOST = 64
_ANONYMOUS = "anonymous"  # the tenant of calls whose caller is not known
# How a tenant's call ended, by its status code. What is not here is a mistake of the caller's: "wrong".
_ENDS = {
    "OK": "ok",
    "CANCELLED": "cancelled",
    "RESOURCE_EXHAUSTED": "refused",
    "DEADLINE_EXCEEDED": "late",
    "UNAVAILABLE": "failed",
    "INTERNAL": "failed",
    "UNKNOWN": "failed",
    "DATA_LOSS": "failed",
}


# From a first token on a card to a first step on a busy CPU.
FIRST_PROGRESS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TENANTS = 100


class CappedLabel:
    """Keeps label values that clients choose from growing without bound: the first are kept, the rest is `other`."""

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
    """The metrics of one server. `registry` takes what a service adds of its own.

    tenants: callers that are counted one by one, the first to come; the others are counted together, as `other`.
    """

    def __init__(self, service: str, *, tenants: int = TENANTS) -> None:
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
        build = Gauge(
            "inkwell_build_info", "Always 1; the labels say what runs.", ["service", "version"], registry=self.registry
        )
        build.labels(service, __version__).set(1)
        self._tenant_label = CappedLabel(tenants)
        self._tenant_requests = Counter(
            "inkwell_tenant_requests",
            "Calls that ended, by who made them and how: ok, cancelled, refused (too many), late (deadline), failed"
            " (ours), or wrong (theirs).",
            ["tenant", "outcome"],
            registry=self.registry,
        )
        self._tenant_seconds = Counter(
            "inkwell_tenant_request_seconds",
            "Seconds that the calls of each caller took, from arrival to end, added up.",
            ["tenant"],
            registry=self.registry,
        )
        self._drain_began: float | None = None
        drained = Gauge(
            "inkwell_drain_seconds", "Seconds since the service began to drain, 0 before.", registry=self.registry
        )
        drained.set_function(lambda: 0.0 if self._drain_began is None else time.monotonic() - self._drain_began)
        self._drain_grace = Gauge(
            "inkwell_drain_grace_seconds",
            "Seconds that draining may take: the pause for load balancers and the grace.",
            registry=self.registry,
        )
        # The look-up by labels costs more than the counting.
        self._counts: dict[tuple[str, str, str, str], tuple[Counter, Histogram]] = {}
        self._tenant_counts: dict[tuple[str, str], tuple[Counter, Counter]] = {}

    def ended(
        self,
        method: str,
        code: str,
        *,
        model: str,
        hardware: str,
        seconds: float,
        tenant: str = "",
        trace_id: str = "",
    ) -> None:
        """Count a call that ended, and the seconds that it took.

        tenant: who made it, empty if that is not known. trace_id: under which it is found among the traces, at most 128
        characters; empty if it was not traced.
        """
        key = (method, code, self.model_label(model), hardware)
        counts = self._counts.get(key)
        if counts is None:
            counts = (self.requests.labels(self.service, *key), self.request_seconds.labels(self.service, method))
            self._counts[key] = counts
        counts[0].inc()
        counts[1].observe(seconds, {"trace_id": trace_id} if trace_id else None)
        whose = (self._tenant_label(tenant or _ANONYMOUS), _ENDS.get(code, "wrong"))
        theirs = self._tenant_counts.get(whose)
        if theirs is None:
            theirs = (self._tenant_requests.labels(*whose), self._tenant_seconds.labels(whose[0]))
            self._tenant_counts[whose] = theirs
        theirs[0].inc()
        theirs[1].inc(seconds)

    def drains_within(self, seconds: float) -> None:
        """Show how long draining may take at most."""
        self._drain_grace.set(seconds)

    def draining(self) -> None:
        """The service begins to drain."""
        self._drain_began = time.monotonic()

    def follow_certificate(self, expires: Callable[[], float]) -> None:
        """Show when the server's certificate expires; `expires` answers that in seconds of Unix time."""
        gauge = Gauge(
            "inkwell_certificate_expires_seconds",
            "When the certificate that is served expires, in seconds of Unix time.",
            registry=self.registry,
        )
        gauge.set_function(expires)


class MetricsPage:
    """The HTTP page that Prometheus scrapes, served by a thread of its own.

    Exemplars, which lead from a series to traces, are in the OpenMetrics form only; Prometheus asks for that one.
    """

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
