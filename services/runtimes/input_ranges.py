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
        best, least_error = InputRange(1.0, 0), float("inf")
        # Where there are no values on one side of zero there is nothing to try on that side.
        for low in _SHARES * self._least if self._least < 0 else [torch.tensor(0.0)]:
            high = (_SHARES * self._greatest if self._greatest > 0 else torch.zeros(1, dtype=torch.float64))[:, None]
            scale = ((high - low) / _CODES).clamp_min(1e-12)
            zero_point = (-low / scale).round().clamp(0, _CODES)
            codes = (centres / scale + zero_point).round().clamp(0, _CODES)
            errors = (((codes - zero_point) * scale - centres) ** 2 * counts).sum(1)
            place = int(errors.argmin())
            if float(errors[place]) < least_error:
                least_error = float(errors[place])
                best = InputRange(float(scale[place, 0]), int(zero_point[place, 0]))
        return best


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
