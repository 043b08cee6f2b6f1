"""What Prometheus sees of an engine process: its places, its pulse, its memory and its models."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kit.engine_host import EngineHost
from services.kit.metrics import Metrics


class LoadedModel(Protocol):
    """A model in the engine's memory, as each service describes its own."""

    @property
    def name(self) -> str: ...

    @property
    def runtime(self) -> str: ...

    @property
    def version(self) -> str: ...


def register(
    metrics: Metrics, host: EngineHost, models: Callable[[], Iterable[tuple[LoadedModel, int]]] = lambda: ()
) -> None:
    """Show the engine on the metrics page.

    models: answers those that are loaded and the bytes of their weights; called by the page's thread.
    """
    metrics.registry.register(_EngineCollector(metrics, host, models))


class _EngineCollector(Collector):
    def __init__(
        self, metrics: Metrics, host: EngineHost, models: Callable[[], Iterable[tuple[LoadedModel, int]]]
    ) -> None:
        self._metrics = metrics
        self._host = host
        self._models = models

    def collect(self) -> Iterator[Metric]:
        host = self._host
        yield _gauge("inkwell_engine_slots", "Calls that the engine is given at a time.", host.admission.slots)
        yield _gauge(
            "inkwell_engine_step_age_seconds",
            "Seconds that the engine's step under way has taken; 0 while none is.",
            host.step_age_s,
        )
        yield _gauge(
            "inkwell_engine_silent_seconds",
            "Seconds since the engine was last heard of; 0 while it is not running. It beats every second.",
            host.silent_s,
        )
        yield from self._process()
        yield from self._loaded()

    def _process(self) -> Iterator[Metric]:
        pid = self._host.pid
        memory = _gauge("inkwell_engine_memory_bytes", "Resident memory of the engine process.")
        seconds = CounterMetricFamily("inkwell_engine_cpu_seconds", "Processor time of the engine process.")
        if pid is not None:
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    memory.add_metric([], process.memory_info().rss)
                    spent = process.cpu_times()
                    seconds.add_metric([], spent.user + spent.system)
            except psutil.Error:
                pass  # it ended just now, and has neither
        yield memory
        yield seconds

    def _loaded(self) -> Iterator[Metric]:
        weights = GaugeMetricFamily(
            "inkwell_model_weight_bytes",
            "Weights in memory of each model that is loaded.",
            labels=["model", "runtime", "version"],
        )
        for model, weight_bytes in self._models() if self._host.ready else ():
            # "torch 2.13.0" is the same runtime as "torch 2.13.1".
            runtime = model.runtime.partition(" ")[0]
            weights.add_metric([self._metrics.model_label(model.name), runtime, model.version], weight_bytes)
        yield weights


def _gauge(name: str, documentation: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
