"""How many lines TrOCR-base reads: transformers' `generate` against Inkwell, at the same precision.

The architecture is TrOCR-base in full with random weights; texts have 8 to 40 tokens, forced. Each round every
contender reads the same lines on the same cores, one contender after the other; the figures are medians over the rounds
of lines a second, and of ratios within a round. `generate` has the batch size that a trial before found best. Memory
is watched with the embedded model, over 2,000 lines. What the compiler makes of the model is compared with `generate`
one by one, at the precisions that this processor has instructions for.

As a program of its own (`python -m benchmarks.ocr_throughput --help`) it takes fewer lines or rounds, and draws.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, VisionEncoderDecoderModel

from benchmarks import _chart, _compiled, _trocr_base
from benchmarks._bars import Bar, at_least, at_most, print_report
from benchmarks._contenders import Engine, Generate, served
from benchmarks._trocr_base import Line
from services import local
from services.ocr.settings import Settings

ROUNDS = 5
LINES = 48  # a multiple of the batch sizes, so that `generate` has no batch with holes
CALLERS = 16
BATCH_SIZES = (2, 4, 8, 16)
MEMORY_LINES = 2000
MEMORY_WARM_UP = 400

CALIBRATION_LINES = 16

ONE_BY_ONE = "generate, one by one"
ENGINE = "Inkwell, engine without gRPC"
TORCH = "torch float32"

Read = Callable[[Sequence[Line]], list[list[int]]]


def run(
    lines: int = LINES,
    rounds: int = ROUNDS,
    figure: Path | None = None,
    store: Path | None = None,
    *,
    compiled: bool = True,
) -> dict[str, Bar]:
    """Ratios of lines a second, and the growth of memory in percent.

    store: keeps the artifacts from one run to the next. compiled: compare what the compiler makes of the model too,
    which takes some minutes to make.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trocr-base-"))) / "trocr-base"
        _trocr_base.save(folder, _trocr_base.build())
        runtimes: dict[str, dict[str, Any]] = {TORCH: {"precision": "float32", "runtime": "torch"}}
        if compiled:
            location = str(store or stack.enter_context(tempfile.TemporaryDirectory(prefix="artifacts-")))
            runtimes |= _compile(str(folder), location)
        bars = _speed(str(folder), runtimes, _trocr_base.lines(lines, seed=1), rounds, figure)
    bars["memory_growth_percent"] = at_most(_memory_growth(), 3.0)
    return bars


def _compile(folder: str, location: str) -> dict[str, dict[str, Any]]:
    """Settings by name of what the service can run compiled models on."""
    calibration = _trocr_base.lines(CALIBRATION_LINES, seed=2)
    settings = {}
    for precision in _compiled.best_precisions():
        _compiled.compile_model(folder, "openvino", precision, location, calibration)
        settings[f"OpenVINO {precision}"] = {
            "runtime": "openvino",
            "precision": precision,
            "artifact_store": location,
        }
    return settings


def _speed(
    folder: str, runtimes: dict[str, dict[str, Any]], lines: Sequence[Line], rounds: int, figure: Path | None
) -> dict[str, Bar]:
    with ExitStack() as stack:
        # Read back as the services read it, so that all compute with the same weights.
        model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

        best = _best_batch_size(model, processor, lines)
        batched = f"generate, batches of {best}"
        contenders: dict[str, Read] = {
            ONE_BY_ONE: Generate(model, processor, 1).read,
            batched: Generate(model, processor, best).read,
        }
        for name, settings in runtimes.items():
            service = served(_settings(folder, **settings), CALLERS)
            contenders[_served_name(name)] = stack.enter_context(service).read
        engine = stack.enter_context(closing(Engine(_settings(folder, **runtimes[TORCH]), CALLERS)))
        contenders[ENGINE] = engine.read

        rates = _rates(contenders, lines, rounds)
        _print_rates(rates)
        if figure is not None:
            medians = {name: statistics.median(values) for name, values in rates.items()}
            _chart.draw(figure, "TrOCR-base, lines a second on two cores", medians)

    served_torch = rates[_served_name(TORCH)]
    bars = {
        "torch_over_static_batch": at_least(_ratio(served_torch, rates[batched]), 1.3),
        "grpc_over_engine": at_least(_ratio(served_torch, rates[ENGINE]), 0.95),
    }
    over_one_by_one = [_ratio(rates[_served_name(name)], rates[ONE_BY_ONE]) for name in runtimes if name != TORCH]
    if over_one_by_one:
        bars["openvino_over_one_by_one"] = at_least(max(over_one_by_one), 5.5)
    return bars


def _served_name(runtime: str) -> str:
    return f"Inkwell over gRPC, {CALLERS} callers, {runtime}"


def _settings(folder: str, **settings: Any) -> Settings:
    return Settings(models={"trocr-base": folder}, read_documents=False, **settings)


def _best_batch_size(model: VisionEncoderDecoderModel, processor: Any, lines: Sequence[Line]) -> int:
    """Each size reads the first lines once."""
    trial = lines[: max(BATCH_SIZES)]
    Generate(model, processor, 1).read(trial[:1])
    seconds = {size: _seconds(Generate(model, processor, size).read, trial) for size in BATCH_SIZES}
    print("  generate, lines a second by batch size:", end=" ")
    print(", ".join(f"{size}: {len(trial) / taken:.2f}" for size, taken in seconds.items()), flush=True)
    return min(seconds, key=lambda size: seconds[size])


def _rates(contenders: dict[str, Read], lines: Sequence[Line], rounds: int) -> dict[str, list[float]]:
    """Lines a second by contender and round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    wanted: list[list[int]] = []
    for read in contenders.values():  # the first run of everything is slow
        read(lines[:2])
    for number in range(rounds):
        for name, read in contenders.items():
            # One by one is so slow that fewer lines must do: its time is proportional to them.
            own = lines[: max(1, len(lines) // 4)] if name == ONE_BY_ONE else lines
            began = time.perf_counter()
            texts = read(own)
            rates[name].append(len(own) / (time.perf_counter() - began))
            if not wanted:
                wanted = texts
            elif number == 0:
                equal = sum(a == b for a, b in zip(texts, wanted, strict=False))
                print(f"  {name}: {equal} of {len(wanted)} texts as `generate` reads them one by one", flush=True)
        last = ", ".join(f"{values[-1]:.2f}" for values in rates.values())
        print(f"  round {number + 1} of {rounds}, lines/s: {last}", flush=True)
    return rates


def _seconds(read: Read, lines: Sequence[Line]) -> float:
    began = time.perf_counter()
    read(lines)
    return time.perf_counter() - began


def _ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def _print_rates(rates: dict[str, list[float]]) -> None:
    for name, values in rates.items():
        ratio = _ratio(values, rates[ONE_BY_ONE])
        print(f"  {name}: {statistics.median(values):.2f} lines/s ({min(values):.2f} to {max(values):.2f}),", end=" ")
        print(f"{ratio:.2f} × one by one", flush=True)


def _memory_growth() -> float:
    """Percent that front and engine grow over MEMORY_LINES lines once they are warm."""
    samples = [path.read_bytes() for path in sorted(local.SAMPLES.glob("*.png"))]
    # Various lengths, as batches are in service.
    lines = [
        Line(png, count)
        for png, count, _ in zip(
            itertools.cycle(samples), itertools.cycle((64, 7, 30, 48, 15)), range(MEMORY_LINES), strict=False
        )
    ]
    with served(Settings(read_documents=False), CALLERS) as service:
        service.read(lines[:MEMORY_WARM_UP])
        before = service.memory_bytes()
        service.read(lines)
        after = service.memory_bytes()
    print(
        f"  front and engine: {before / 1e6:.0f} MB, {after / 1e6:.0f} MB after {MEMORY_LINES} more lines", flush=True
    )
    return 100 * (after / before - 1)


def main() -> None:
    """The last line is the JSON object of the bars."""
    parser = argparse.ArgumentParser(description="Lines a second of TrOCR-base: generate against Inkwell")
    parser.add_argument("--lines", type=int, default=LINES, help="lines a contender and round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--figure", type=Path, help="SVG file to draw the lines a second into")
    parser.add_argument("--store", type=Path, help="folder that keeps compiled models from run to run")
    parser.add_argument("--no-compiled", action="store_true", help="torch only: compiling takes minutes")
    options = parser.parse_args()
    print_report(
        "ocr_throughput",
        run(options.lines, options.rounds, options.figure, options.store, compiled=not options.no_compiled),
    )


if __name__ == "__main__":
    main()
