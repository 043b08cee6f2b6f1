"""The speed of each precision relative to float32 on the architecture of TrOCR-base, with random weights.

In each round every precision encodes the same images and decodes the same number of tokens in turn; a ratio is the
median over the rounds. Nothing is read: random weights have no error rate (`make eval` measures that, on a real model).
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch

from benchmarks import _trocr_base
from benchmarks._bars import Bar, at_least
from services.runtimes import input_ranges, torch_trocr
from services.runtimes.hardware import detect
from services.runtimes.precision import Precision, StoredInt8, apply_precision, attach, refusal, weight_bytes
from services.runtimes.trocr_rows import Rows

ROUNDS = 5
STEPS = 12
ROWS = 16


@torch.inference_mode()
def run(rounds: int = ROUNDS) -> dict[str, Bar]:
    """Measure; the bars are those of int8_dynamic, which any folder can be served with."""
    hardware = detect()
    torch.set_num_threads(hardware.core_count)
    torch.manual_seed(0)
    original = _trocr_base.build().eval()
    pixels = torch.randn(ROWS, 3, 384, 384)
    with input_ranges.watch(original) as histograms:
        original(pixel_values=pixels[:1], decoder_input_ids=torch.randint(5, 50_000, (1, 8)))
    ranges = {name: histogram.input_range() for name, histogram in histograms.items()}

    works: dict[str, dict[Precision, Callable[[], None]]] = {}
    sizes: dict[Precision, int] = {}
    for precision in get_args(Precision):
        if why := refusal(precision, hardware):
            print(f"  {precision}: {why}", flush=True)
            continue
        model = copy.deepcopy(original)
        attach(model, StoredInt8(ranges=ranges))
        model = apply_precision(model, precision, hardware).to(hardware.device)
        sizes[precision] = weight_bytes(model)
        networks = torch_trocr.TrocrModel(model)
        for what, images, rows in (("encode 1 image", 1, 0), ("decode 1 row", 1, 1), (f"decode {ROWS} rows", 0, ROWS)):
            works.setdefault(what, {})[precision] = _work(networks, pixels, images, rows)
    ratios: dict[tuple[str, Precision], float] = {}
    for what, contenders in works.items():
        for work in contenders.values():
            work()  # the first run of everything is slow
        seconds: dict[Precision, list[float]] = {precision: [] for precision in contenders}
        for _ in range(rounds):
            for precision, work in contenders.items():
                began = time.perf_counter()
                work()
                seconds[precision].append(time.perf_counter() - began)
        for precision, own in seconds.items():
            pairs = zip(seconds["float32"], own, strict=True)
            ratios[what, precision] = statistics.median(theirs / ours for theirs, ours in pairs)
            print(
                f"  {what}, {precision}: {ratios[what, precision]:.2f} x float32, {min(own) * 1000:.0f} ms at best",
                flush=True,
            )
    for precision, size in sizes.items():
        print(
            f"  weights in memory, {precision}: {size / 1e6:.0f} MB, {size / sizes['float32']:.3f} of float32",
            flush=True,
        )
    if "int8_dynamic" not in sizes:
        return {}
    return {
        f"int8_dynamic over float32, {what}": at_least(round(ratios[what, "int8_dynamic"], 2), 1.5) for what in works
    }


def _work(networks: torch_trocr.TrocrModel, pixels: torch.Tensor, images: int, rows: int) -> Callable[[], None]:
    """Encode so many images or, with rows, decode STEPS tokens for so many rows."""
    if not rows:
        return lambda: _drop(networks.encode(pixels[:images]))
    encoded = networks.encode(pixels[:1].expand(rows, -1, -1, -1))
    tokens = list(range(5, 5 + rows))

    def decode() -> None:
        under_way = Rows(networks)
        under_way.join(encoded)
        for _ in range(STEPS):
            under_way.step(tokens)

    return decode


def _drop(_: object) -> None:
    """For work whose result nobody wants."""


if __name__ == "__main__":
    run()
