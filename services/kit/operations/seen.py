"""What Prometheus sees of operations and of the database that keeps them."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kit.operations.kinds import Outcome
from services.kit.operations.log import Replica, Row

# A small model is compiled in seconds, a large one with its calibration in an hour.
_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800, 3600, 10800)


class OperationsMetrics:
    """The metrics of one service's operations in this process.

    running: how many run here. clock_ms: milliseconds of Unix time, as the log's.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        clock_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._clock_ms = clock_ms
        self._ended = Counter(
            "inkwell_operations", "Operations that ended here, by how.", ["kind", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            "inkwell_operation_seconds",
            "Time from being asked for an operation until its end.",
            ["kind"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.running = Gauge("inkwell_operations_running", "Operations that run here.", registry=registry)
        self._waiting = Gauge(
            "inkwell_operations_waiting",
            "Operations that wait in the database, which replicas share, as of the last look.",
            registry=registry,
        )
        self._database = _DatabaseCollector()
        registry.register(self._database)

    def ended(self, row: Row, outcome: Outcome) -> None:
        """Count an operation that ended here."""
        self._ended.labels(row.kind, type(outcome).__name__.lower()).inc()
        # Clocks of replicas may differ.
        self._seconds.labels(row.kind).observe(max(0, self._clock_ms() - row.created_ms) / 1000)

    def waiting(self, count: int) -> None:
        """So many wait."""
        self._waiting.set(count)

    def beat(self) -> None:
        """This process has written to the database that it lives."""
        self._database.beat_at = time.monotonic()

    def replicas(self, replicas: list[Replica]) -> None:
        """How far the database's replicas are behind."""
        self._database.replicas = replicas


class _DatabaseCollector(Collector):
    def __init__(self) -> None:
        self.beat_at: float | None = None
        self.replicas: list[Replica] = []

    def collect(self) -> Iterator[Metric]:
        silent = GaugeMetricFamily(
            "inkwell_operations_silent_seconds",
            "Seconds since this process could last write to the operations' database.",
        )
        if self.beat_at is not None:
            silent.add_metric([], time.monotonic() - self.beat_at)
        behind = GaugeMetricFamily(
            "inkwell_postgres_lag_bytes",
            "Bytes that a replica of the operations' database is behind. Takes membership of pg_monitor.",
            labels=["replica"],
        )
        late = GaugeMetricFamily(
            "inkwell_postgres_lag_seconds",
            "Seconds that a replica of the operations' database is behind; 0 while nothing is written.",
            labels=["replica"],
        )
        for replica in self.replicas:
            behind.add_metric([replica.name], replica.lag_bytes)
            late.add_metric([replica.name], replica.lag_s)
        yield silent
        yield behind
        yield late
