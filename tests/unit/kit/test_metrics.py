"""What every service counts: callers up to a bound, examples that lead to traces, and how draining goes."""

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from inkwell.version import __version__
from services.kit.metrics import Metrics


def text(registry: CollectorRegistry) -> str:
    return str(generate_latest(registry).decode())  # type: ignore[no-untyped-call]


def samples(registry: CollectorRegistry, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The samples of that name, by the values of those labels."""
    page = text(registry)
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.name == name
    }


def end(metrics: Metrics, code: str = "OK", *, tenant: str = "", trace_id: str = "", seconds: float = 0.25) -> None:
    metrics.ended("m", code, model="", hardware="", seconds=seconds, tenant=tenant, trace_id=trace_id)


def test_calls_are_counted_by_who_made_them_and_how_they_ended() -> None:
    metrics = Metrics("ocr")
    codes = ("OK", "OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE", "NOT_FOUND")
    for code in codes:
        end(metrics, code, tenant="key/app")
    end(metrics)
    assert samples(metrics.registry, "inkwell_tenant_requests_total", "tenant", "outcome") == {
        ("key/app", "ok"): 2,
        ("key/app", "refused"): 1,
        ("key/app", "late"): 1,
        ("key/app", "cancelled"): 1,
        ("key/app", "failed"): 1,
        ("key/app", "wrong"): 1,
        ("anonymous", "ok"): 1,
    }
    seconds = samples(metrics.registry, "inkwell_tenant_request_seconds_total", "tenant")
    assert seconds == {("key/app",): 0.25 * len(codes), ("anonymous",): 0.25}


def test_callers_beyond_the_bound_are_counted_together() -> None:
    metrics = Metrics("ocr", tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        end(metrics, tenant=tenant)
    assert samples(metrics.registry, "inkwell_tenant_requests_total", "tenant", "outcome") == {
        ("a", "ok"): 2,
        ("b", "ok"): 1,
        ("other", "ok"): 2,
    }


def test_with_no_tenants_all_are_counted_together() -> None:
    metrics = Metrics("ocr", tenants=0)
    end(metrics, tenant="a")
    assert samples(metrics.registry, "inkwell_tenant_requests_total", "tenant", "outcome") == {("other", "ok"): 1}


def test_an_example_leads_to_the_trace_of_a_call_that_took_as_long() -> None:
    metrics = Metrics("ocr")
    end(metrics, trace_id="a" * 32, seconds=0.3)
    end(metrics, seconds=7)  # not traced
    page = text(metrics.registry)
    buckets = {
        sample.labels["le"]: sample.exemplar
        for family in text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.name == "inkwell_request_seconds_bucket" and sample.exemplar is not None
    }
    assert {le: example.labels for le, example in buckets.items()} == {"0.5": {"trace_id": "a" * 32}}
    assert buckets["0.5"].value == 0.3


def test_what_runs_is_named() -> None:
    assert samples(Metrics("ocr").registry, "inkwell_build_info", "service", "version") == {("ocr", __version__): 1}


def test_draining_is_seen_from_its_begin_on() -> None:
    metrics = Metrics("ocr")
    metrics.drains_within(32)
    assert samples(metrics.registry, "inkwell_drain_seconds") == {(): 0}
    metrics.draining()
    assert samples(metrics.registry, "inkwell_drain_seconds")[()] > 0
    assert samples(metrics.registry, "inkwell_drain_grace_seconds") == {(): 32}
