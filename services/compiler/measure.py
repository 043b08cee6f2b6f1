"""How fast a built model is against torch on this machine; brief, as machines are noisy and compiles are waited for."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from services.compiler.export.exported import ExportedGraph
from services.compiler.targets.axes import sizes
from services.runtimes.artifacts.manifest import Measured
from services.runtimes.sessions.interface import Session

_COMPONENT_SECONDS = 1.5
_WHOLE_SECONDS = 8.0
_ROUNDS_LEAST, _ROUNDS_MOST = 3, 25
# The usual size of an axis is that between its ends; that of a batch may be more than a torch run should take here.
_USUAL_MOST = 8


def ratio(base: Callable[[], object], other: Callable[[], object], seconds: float) -> float:
    """How many times as fast `other` is as `base`: the median over rounds in which both take their turn."""
    base(), other()
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < _ROUNDS_LEAST or (time.perf_counter() - began < seconds and len(ratios) < _ROUNDS_MOST):
        first, second = (base, other) if len(ratios) % 2 == 0 else (other, base)
        one, two = _seconds(first), _seconds(second)
        ratios.append(one / two if first is base else two / one)
    return statistics.median(ratios)


def component(graph: ExportedGraph, session: Session) -> Measured:
    """A graph's speed against its torch module."""
    usual = {axis.name: max(axis.low, min(sizes(axis)[1], _USUAL_MOST)) for axis in graph.axes}
    feeds = graph.example(usual)

    def on_torch() -> object:
        with torch.inference_mode():
            return graph.reference(feeds)

    return Measured(
        f"{graph.component}: speed against torch float32",
        ratio(on_torch, lambda: session.run(feeds), _COMPONENT_SECONDS),
        f"at {_told(usual)}",
    )


def whole(base: Callable[[], object], other: Callable[[], object]) -> float:
    """The whole model's speed against torch."""
    return ratio(base, other, _WHOLE_SECONDS)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _told(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in axes.items()) or "its only shape"
