"""Metrics of several processes as one."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from services.gateway.summed_metrics import ADDED, LARGEST, SMALLEST, accumulated, collect, merge
from tests.support import gateway


class Process:
    """What a gateway process has of each kind."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("calls", "Calls.", ["code"], registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", buckets=(1, 2), registry=self.registry)
        self.in_flight = Gauge("inkwell_gateway_in_flight", "Under way.", registry=self.registry)
        self.endpoints = Gauge("inkwell_gateway_endpoints", "Endpoints.", ["state"], registry=self.registry)
        ProcessCollector(registry=self.registry)


def values(metrics: list[Metric]) -> dict[str, float]:
    """As Prometheus reads them: "name{label=value,…}" -> value."""

    class Fixed(Collector):
        def collect(self) -> list[Metric]:
            return metrics

    registry = CollectorRegistry()
    registry.register(Fixed())
    return {
        s.name + (str(sorted(s.labels.items())) if s.labels else ""): s.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for s in family.samples
    }


def test_counters_histograms_and_gauges_are_added() -> None:
    a, b = Process(), Process()
    a.calls.labels("OK").inc(3)
    b.calls.labels("OK").inc(4)
    b.calls.labels("INTERNAL").inc()
    a.seconds.observe(0.5)
    b.seconds.observe(1.5)
    a.in_flight.set(2)
    b.in_flight.set(5)
    found = values(merge({"0": collect(a.registry), "1": collect(b.registry)}))
    assert found["calls_total[('code', 'OK')]"] == 7
    assert found["calls_total[('code', 'INTERNAL')]"] == 1
    assert found["seconds_bucket[('le', '1.0')]"] == 1
    assert found["seconds_bucket[('le', '+Inf')]"] == found["seconds_count"] == 2
    assert found["seconds_sum"] == 2
    assert found["inkwell_gateway_in_flight"] == 7


def test_what_all_processes_see_alike_is_counted_once() -> None:
    a, b = Process(), Process()
    a.endpoints.labels("ready").set(3)
    b.endpoints.labels("ready").set(2)  # has not heard of the third yet
    found = values(merge({"0": collect(a.registry), "1": collect(b.registry)}))
    assert found["inkwell_gateway_endpoints[('state', 'ready')]"] == 3


def test_what_is_of_one_process_keeps_its_name() -> None:
    found = values(merge({"0": collect(Process().registry), "supervisor": collect(Process().registry)}))
    assert found["process_resident_memory_bytes[('process', '0')]"] > 0
    assert found["process_resident_memory_bytes[('process', 'supervisor')]"] > 0


def test_totals_do_not_fall_when_a_process_ends_but_what_it_had_under_way_is_gone() -> None:
    first, second, other = Process(), Process(), Process()
    for process, count in ((first, 10), (second, 20), (other, 5)):
        process.calls.labels("OK").inc(count)
        process.seconds.observe(0.5)
        process.in_flight.set(1)
    ended = accumulated(((), collect(first.registry)))
    ended = accumulated((ended, collect(second.registry)))
    found = values(merge({"1": collect(other.registry)}, ended))
    assert found["calls_total[('code', 'OK')]"] == 35
    assert found["seconds_count"] == 3
    assert found["inkwell_gateway_in_flight"] == 1
    assert "process_resident_memory_bytes[('process', '0')]" not in found


async def test_it_is_known_of_every_gauge_of_the_gateway_how_those_of_processes_make_one() -> None:
    async with gateway.running(
        {"name": "a", "service": "ocr", "hardware": "cpu", "targets": ["127.0.0.1:1"]}, wait=False
    ) as running:
        families = collect(running.server.metrics.registry)
    gauges = {f.name for f in families if f.type == "gauge" and not f.name.startswith(("process_", "python_"))}
    assert gauges - ADDED - LARGEST - SMALLEST == set()


def test_of_two_examples_the_newer_one_is_shown() -> None:
    a, b = Process(), Process()
    a.seconds.observe(0.5, {"trace_id": "older"})
    b.seconds.observe(0.6, {"trace_id": "newer"})
    b.seconds.observe(1.5, {"trace_id": "alone"})
    merged = merge({"0": collect(a.registry), "1": collect(b.registry)})
    (seconds,) = (metric for metric in merged if metric.name == "seconds")
    shown = {s.labels["le"]: s.exemplar.labels["trace_id"] for s in seconds.samples if s.exemplar is not None}
    assert shown == {"1.0": "newer", "2.0": "alone"}
