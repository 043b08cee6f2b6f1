"""What Prometheus sees of the routing. Every label value comes from the configuration or from a closed set."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.ejection import Standing
from services.gateway.endpoint import State
from services.gateway.pools import Fleet

NO_POOL = "none"  # of calls that were refused before a pool was chosen


class GatewayMetrics:
    """Counters of calls and retries, and gauges read from the fleet when they are asked for."""

    def __init__(self, registry: CollectorRegistry, fleet: Fleet) -> None:
        self._requests = Counter(
            "inkwell_gateway_requests",
            "Calls that ended, by the pool that served them last and by status code.",
            ["pool", "method", "code"],
            registry=registry,
        )
        self._retries = Counter(
            "inkwell_gateway_retries",
            "Attempts that failed in a pool and were made again: elsewhere, or at the same endpoint after a wait.",
            ["pool", "reason"],
            registry=registry,
        )
        # The registry's own look-up by labels costs more than the rest of the bookkeeping of a call.
        self._children: dict[tuple[str, str, str], Counter] = {}
        registry.register(_FleetCollector(fleet))

    def ended(self, pool: str, method: str, code: str) -> None:
        """Count a call that ended."""
        key = (pool, method, code)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(pool, method, code)
        child.inc()

    def retried(self, pool: str, reason: str) -> None:
        """Count a retry; reason: "elsewhere" or "waited"."""
        self._retries.labels(pool, reason).inc()


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        in_flight = GaugeMetricFamily("inkwell_gateway_in_flight", "Calls under way, by pool.", labels=["pool"])
        endpoints = GaugeMetricFamily(
            "inkwell_gateway_endpoints", "Endpoints, by pool and state.", labels=["pool", "state"]
        )
        ejected = GaugeMetricFamily(
            "inkwell_gateway_ejected",
            "Endpoints that are left out for their failures, or on trial after that, by pool.",
            labels=["pool"],
        )
        ejections = CounterMetricFamily(
            "inkwell_gateway_ejections",
            "Times that an endpoint was left out for its failures, by pool and reason.",
            labels=["pool", "reason"],
        )
        for pool in self._fleet.pools:
            ejected.add_metric([pool.name], sum(e.record.standing is not Standing.IN for e in pool.endpoints))
            for reason, count in pool.ejections.items():
                ejections.add_metric([pool.name, reason], count)
            in_flight.add_metric([pool.name], sum(endpoint.in_flight for endpoint in pool.endpoints))
            for state in State:
                endpoints.add_metric([pool.name, state.value], pool.count(state))
        yield ejected
        yield ejections
        yield in_flight
        yield endpoints
