"""Finding the range of what goes into each layer, for "int8_static".

While lines are read, a histogram of every layer's input is kept. The range then taken is the one with the least mean
squared error of rounding to 8 bits: it may cut off the rarest values so that the usual ones are rounded finer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from services.runtimes.int8 import InputRange, quantizable

_BINS = 2048
_CODES = 255
# Ranges tried: these shares of the way from zero to the least and to the greatest value seen.
_SHARES = torch.linspace(0.04, 1.0, 49, dtype=torch.float64)
_PASSES = 3


class Histogram:
    """Counts of values in equal bins over -limit to limit; the limit doubles when a value lies beyond."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._limit = 2.0**-10
        self._least = 0.0
        self._greatest = 0.0

    def add(self, values: Tensor) -> None:
        """Count finite values of any shape."""
        values = values.detach().float()
        least, greatest = (float(end) for end in values.aminmax())
        self._least, self._greatest = min(self._least, least), max(self._greatest, greatest)
        while max(-self._least, self._greatest) > self._limit:
            self._limit *= 2
            # Two bins become one; the old range is the middle half of the new one.
            pairs = self._counts.view(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(pairs, (_BINS // 4, _BINS // 4))
        self._counts += torch.histc(values, _BINS, -self._limit, self._limit).double()

    def input_range(self) -> InputRange:
        """The range with the least squared error."""
        edges = torch.linspace(-self._limit, self._limit, _BINS + 1, dtype=torch.float64)
        centres = (edges[1:] + edges[:-1]) / 2
        used = self._counts > 0
        centres, counts = centres[used], self._counts[used]
        low = torch.tensor([self._least], dtype=torch.float64)
        high = torch.tensor([self._greatest], dtype=torch.float64)
        for _ in range(_PASSES):
            # One end after the other: trying all pairs takes long and finds hardly better ones.
            lows = _SHARES * self._least
            low = lows[_squared_errors(lows, high, centres, counts).argmin()].view(1)
            highs = _SHARES * self._greatest
            high = highs[_squared_errors(low, highs, centres, counts).argmin()].view(1)
        scale, zero_point = _range(low, high)
        return InputRange(float(scale), int(zero_point))


def _range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the ranges between these ends."""
    scale = ((high - low) / _CODES).clamp_min(1e-12)
    return scale, (-low / scale).round().clamp(0, _CODES)


def _squared_errors(low: Tensor, high: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """What rounding so many of each value by each range costs in all."""
    scale, zero_point = (end[:, None] for end in _range(low, high))
    codes = (values / scale + zero_point).round_().clamp_(0, _CODES)
    return ((codes - zero_point).mul_(scale).sub_(values).square_() * counts).sum(1)


@contextmanager
def watch(model: Any) -> Iterator[dict[str, Histogram]]:
    """Keep histograms of the inputs of a VisionEncoderDecoderModel's linear and convolution layers, by name.

    A layer that is never run has none.
    """
    histograms: dict[str, Histogram] = {}

    def watching(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            histograms.setdefault(name, Histogram()).add(inputs[0])

        return hook

    handles = [
        layer.register_forward_pre_hook(watching(name))
        for name, layer in quantizable(model).items()
        if not isinstance(layer, nn.Embedding)
    ]
    try:
        yield histograms
    finally:
        for handle in handles:
            handle.remove()
