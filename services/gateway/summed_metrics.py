"""The metrics of several processes of one gateway as those of one: counted together, and going on when one ends."""

from collections.abc import Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar

# Each process has its own; a sum of them says nothing, so they keep a label `process`.
_OF_ONE_PROCESS = ("process_", "python_")
# Gauges of what each process has a part of are added. Of what all see alike, or each for itself, one must do: the
# largest, where 0 is well or nothing; the smallest, where the one that fares worst counts.
ADDED = frozenset(
    (
        "inkwell_requests_in_flight",
        "inkwell_queue_depth",
        "inkwell_engine_calls",
        "inkwell_gateway_in_flight",
        "inkwell_gateway_admitted",
        "inkwell_gateway_waiting",
        "inkwell_gateway_limit",
        "inkwell_gateway_retry_budget",
    )
)
LARGEST = frozenset(
    (
        "inkwell_ready",
        "inkwell_build_info",
        "inkwell_drain_seconds",
        "inkwell_drain_grace_seconds",
        "inkwell_gateway_endpoints",
        "inkwell_gateway_ejected",
        "inkwell_gateway_access_file_wrong",
        "inkwell_gateway_config_refused",
    )
)
SMALLEST = frozenset(("inkwell_gateway_limits_shared", "inkwell_certificate_expires_seconds"))
_ACCUMULATING = frozenset(("counter", "histogram", "summary"))

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Example(msgspec.Struct, frozen=True, array_like=True):
    """One event that a sample counted: its labels, what was observed, and when in seconds of Unix time."""

    labels: dict[str, str]
    value: float
    timestamp: float


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One value, under the name that Prometheus sees."""

    name: str
    labels: dict[str, str]
    value: float
    example: Example | None = None


class Family(msgspec.Struct, frozen=True, array_like=True):
    """All samples of one metric; `type` as in Prometheus' text format."""

    name: str
    documentation: str
    type: str
    samples: list[Sample]


def collect(registry: CollectorRegistry) -> list[Family]:
    """What a registry holds now."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [Sample(s.name, dict(s.labels), s.value, _example(s.exemplar)) for s in metric.samples],
        )
        for metric in registry.collect()
    ]


def accumulated(parts: Iterable[Iterable[Family]]) -> list[Family]:
    """Counters and histograms of processes that ended, added up. Without them a total would fall when one ends."""
    return _added(
        family
        for part in parts
        for family in part
        if family.type in _ACCUMULATING and not family.name.startswith(_OF_ONE_PROCESS)
    )


def merge(running: Mapping[str, Iterable[Family]], ended: Iterable[Family] = ()) -> list[Metric]:
    """The metrics of the whole.

    running: those of each process, by the value of its `process` label. ended: from `accumulated`.
    """
    families: list[Family] = list(ended)
    for process, part in running.items():
        for family in part:
            if family.name.startswith(_OF_ONE_PROCESS):
                labelled = [
                    Sample(s.name, {**s.labels, "process": process}, s.value, s.example) for s in family.samples
                ]
                families.append(Family(family.name, family.documentation, family.type, labelled))
            else:
                families.append(family)
    merged = []
    for family in _added(families):
        metric = Metric(family.name, family.documentation, family.type)
        for sample in family.samples:
            shown = sample.example
            exemplar = None if shown is None else Exemplar(shown.labels, shown.value, shown.timestamp)
            metric.add_sample(sample.name, sample.labels, sample.value, exemplar=exemplar)
        merged.append(metric)
    return merged


def _added(families: Iterable[Family]) -> list[Family]:
    found: dict[str, tuple[Family, dict[_Key, Sample]]] = {}
    for family in families:
        _, samples = found.setdefault(family.name, (family, {}))
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            other = samples.get(key)
            if other is None:
                samples[key] = sample
            else:
                samples[key] = Sample(
                    sample.name, sample.labels, _one(family, sample, other), _newer(sample.example, other.example)
                )
    return [
        Family(first.name, first.documentation, first.type, list(samples.values())) for first, samples in found.values()
    ]


def _one(family: Family, sample: Sample, other: Sample) -> float:
    if family.name in LARGEST:
        return max(sample.value, other.value)
    if family.name in SMALLEST:
        return min(sample.value, other.value)
    return sample.value + other.value


def _example(exemplar: Exemplar | None) -> Example | None:
    if exemplar is None:
        return None
    return Example(dict(exemplar.labels), exemplar.value, float(exemplar.timestamp or 0.0))


def _newer(one: Example | None, other: Example | None) -> Example | None:
    return max((found for found in (one, other) if found is not None), key=lambda e: e.timestamp, default=None)
