"""`python -m services.ocr.compare DIR`: a table of precision by error rate, size and speed, of one model.

DIR holds labelled lines as for `evaluate`. Every precision that the machine can compute reads the same lines through
the real engine. Speeds are compared within rounds, in which each precision reads the same lines in turn, so that what
else the machine does falls on all of them; the ratio is the median over the rounds.

"int8_static" needs lines to find input ranges on: those of --ranges-from, or else up to 64 lines of DIR (every fourth
at most), which then nobody is scored on.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from services.kit.engine_api import Engine
from services.kit.images import Limits
from services.ocr.domain import BEAM_WIDTH_MOST, EngineInfo, ModelInfo, TorchPrecision
from services.ocr.evaluate import LABELS, BadFolder, Label, LineReport, evenly, read_labels, read_lines, settings_for
from services.ocr.settings import Settings

PRECISIONS: tuple[TorchPrecision, ...] = get_args(TorchPrecision)
# Of the lines scored, taken evenly, so many are read in each round of the comparison of speeds.
ROUND_LINE_COUNT = 48
RANGE_LINE_COUNT = 64


class Format(StrEnum):
    """How the table is printed."""

    auto = "auto"
    table = "table"
    tsv = "tsv"
    json = "json"


@dataclass(frozen=True)
class Row:
    """One precision. Ratios are to float32; None where the machine cannot compute so, and `why_not` says why."""

    precision: TorchPrecision
    cer: float | None = None
    cer_change: float | None = None
    disk_bytes: int | None = None
    disk_ratio: float | None = None
    memory_bytes: int | None = None
    memory_ratio: float | None = None
    speed_ratio: float | None = None
    lines_per_second: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """The table and what it was measured on."""

    model: str
    beam_width: int
    line_count: int  # scored
    range_line_count: int  # not scored: the input ranges of int8_static were found on them
    range_lines: str  # where those are from
    round_count: int
    hardware: str
    threads: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Contender:
    engine: Engine
    info: ModelInfo
    disk_bytes: int


def compare(
    settings: Settings,
    scored: Sequence[Label],
    range_lines: Sequence[Label],
    *,
    range_source: str,
    beam_width: int = 0,
    rounds: int = 5,
) -> Comparison:
    """Measure the settings' default model at every precision. beam_width 0: the model's own.

    Raises CheckpointError for a model that cannot be used.
    """
    from services.runtimes.hardware import detect

    hardware = detect()
    with tempfile.TemporaryDirectory() as scratch:
        contenders, refusals = _contenders(settings, range_lines, Path(scratch))

        def read(precision: TorchPrecision, labels: Sequence[Label]) -> list[LineReport]:
            engine = contenders[precision].engine
            return read_lines(engine, labels, settings, model=settings.default_model_name, beam_width=beam_width)[1]

        cers = {}
        for precision in contenders:
            lines = read(precision, scored)
            cers[precision] = sum(line.edits for line in lines) / sum(len(line.text) for line in lines)
        timed = evenly(scored, ROUND_LINE_COUNT)
        seconds: dict[TorchPrecision, list[float]] = {precision: [] for precision in contenders}
        for number in range(rounds):
            order = list(contenders)
            for precision in order[number % len(order) :] + order[: number % len(order)]:
                began = time.perf_counter()
                read(precision, timed)
                seconds[precision].append(time.perf_counter() - began)

    base = contenders["float32"]
    rows = []
    for precision in PRECISIONS:
        if precision in refusals:
            rows.append(Row(precision, why_not=refusals[precision]))
            continue
        own = contenders[precision]
        ratios = [theirs / ours for theirs, ours in zip(seconds["float32"], seconds[precision], strict=True)]
        rows.append(
            Row(
                precision,
                cer=cers[precision],
                cer_change=cers[precision] - cers["float32"],
                disk_bytes=own.disk_bytes,
                disk_ratio=own.disk_bytes / base.disk_bytes,
                memory_bytes=own.info.weight_bytes,
                memory_ratio=own.info.weight_bytes / base.info.weight_bytes,
                speed_ratio=statistics.median(ratios),
                lines_per_second=len(timed) / statistics.median(seconds[precision]),
            )
        )
    return Comparison(
        model=base.info.name,
        beam_width=beam_width or base.info.default_decoding.beam_width,
        line_count=len(scored),
        range_line_count=len(range_lines),
        range_lines=range_source,
        round_count=rounds,
        hardware=hardware.name,
        threads=settings.threads or hardware.core_count,
        rows=tuple(rows),
    )


def _contenders(
    settings: Settings, range_lines: Sequence[Label], scratch: Path
) -> tuple[dict[TorchPrecision, _Contender], dict[TorchPrecision, str]]:
    """An engine for each precision that the machine can compute, and why it cannot compute the others."""
    from services.ocr.engine.main import create_engine
    from services.ocr.quantize import quantize
    from services.runtimes import checkpoints
    from services.runtimes.hardware import detect
    from services.runtimes.precision import refusal

    name = settings.default_model_name
    hardware = detect()
    refusals = {precision: why for precision in PRECISIONS if (why := refusal(precision, hardware))}
    source = checkpoints.fetch(
        checkpoints.resolve(settings.models[name]), allow_pickled_weights=settings.allow_pickled_weights
    )
    sizes = _disk_bytes(source, settings)
    contenders: dict[TorchPrecision, _Contender] = {}
    for precision in PRECISIONS:
        if precision in refusals:
            continue
        folder, disk_bytes = source, sizes[precision]
        if precision == "int8_static":
            folder = scratch / "int8_static"
            disk_bytes = quantize(source, folder, precision, range_lines, settings).file_bytes
        own = settings.model_copy(
            update={
                "models": {name: str(folder)},
                "precision": precision,
                "runtime": "torch",
                "load_at_start": None,
                "read_documents": False,
            }
        )
        engine = create_engine(own.model_dump_json())
        info = engine.info()
        assert isinstance(info, EngineInfo)
        contenders[precision] = _Contender(engine, info.models[0], disk_bytes)
    return contenders, refusals


def _disk_bytes(source: Path, settings: Settings) -> dict[TorchPrecision, int]:
    """Bytes of the model's tensors saved at each precision."""
    from services.runtimes import int8, int8_folder, torch_trocr
    from services.runtimes.hardware import detect
    from services.runtimes.precision import weight_bytes

    model = torch_trocr.load(
        source,
        device="cpu",
        precision="float32",
        hardware=detect(),
        allow_pickled_weights=settings.allow_pickled_weights,
    )
    whole = weight_bytes(model)
    rounded = int8_folder.tensor_bytes(model, int8.round_weights(model))
    sizes: dict[TorchPrecision, int] = {}
    for precision in PRECISIONS:
        sizes[precision] = whole if precision == "float32" else whole // 2 if "float" in precision else rounded
    return sizes


_HEADER = (
    "precision",
    "CER",
    "change",
    "disk MB",
    "disk ratio",
    "memory MB",
    "memory ratio",
    "speed ratio",
    "lines/s",
    "",
)


def _cells(row: Row) -> tuple[str, ...]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row.precision,
        text(row.cer, ".4f"),
        text(row.cer_change, "+.4f"),
        text(None if row.disk_bytes is None else row.disk_bytes / 1e6, ".2f"),
        text(row.disk_ratio, ".3f"),
        text(None if row.memory_bytes is None else row.memory_bytes / 1e6, ".2f"),
        text(row.memory_ratio, ".3f"),
        text(row.speed_ratio, ".2f"),
        text(row.lines_per_second, ".1f"),
        row.why_not,
    )


def notes(comparison: Comparison) -> list[str]:
    """What the figures were measured on, a line each."""
    lines = [
        f"{comparison.model}, {comparison.line_count} lines, beam width {comparison.beam_width}; {comparison.hardware},"
        f" {comparison.threads} threads; ratios are to float32, speed is the median of {comparison.round_count} rounds",
        f"input ranges of int8_static from {comparison.range_line_count} lines of {comparison.range_lines}",
    ]
    if comparison.line_count < 100:
        lines.append(
            f"{comparison.line_count} lines are too few to tell precisions apart: give a folder of some hundred"
            " labelled lines (make eval DIR=...)"
        )
    return lines


def show(comparison: Comparison, form: Format, console: Console) -> None:
    """Print it; `auto` is a table on a terminal, tab-separated lines into a pipe."""
    if form is Format.json:
        print(json.dumps(asdict(comparison), ensure_ascii=False))
        return
    if form is Format.tsv or (form is Format.auto and not console.is_terminal):
        print("\t".join((*_HEADER[:-1], "note")))
        for row in comparison.rows:
            print("\t".join(_cells(row)))
        for note in notes(comparison):
            print(f"# {note}")
        return
    table = Table(*_HEADER, title="Precision")
    for row in comparison.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for note in notes(comparison):
        console.print(note, highlight=False)


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help=f"folder with {LABELS} (columns file, text)")],
    model: Annotated[
        str, typer.Option(help="name of a configured model, or a source: a folder or owner/name@revision")
    ] = "",
    ranges_from: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="other labelled lines, for the input ranges of int8_static"),
    ] = None,
    beam_width: Annotated[
        int, typer.Option(min=0, max=BEAM_WIDTH_MOST, help="beams, 1 is greedy; 0 takes the model's own default")
    ] = 0,
    limit: Annotated[int, typer.Option(min=0, help="take only so many lines, evenly; 0 takes all")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="rounds that compare the speeds")] = 5,
    form: Annotated[Format, typer.Option("--format", help="auto: a table on a terminal, else tsv")] = Format.auto,
) -> None:
    """Print a table of precision by error rate, size and speed of one model, through the real engine."""
    try:
        settings = settings_for(model)
        limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
        labels = read_labels(folder, limits)
        labels = evenly(labels, limit) if limit else labels
        if ranges_from is not None:
            range_lines, range_source = evenly(read_labels(ranges_from, limits), RANGE_LINE_COUNT), str(ranges_from)
        elif len(labels) < 2:
            raise BadFolder([f"{folder}: it has one line; int8_static needs another (--ranges-from)"])
        else:
            range_lines = evenly(labels, min(RANGE_LINE_COUNT, max(1, len(labels) // 4)))
            labels = [label for label in labels if label not in range_lines]
            range_source = f"{folder}, which are not scored"
    except BadFolder as bad:
        for problem in bad.problems:
            print(problem, file=sys.stderr)
        raise typer.Exit(2) from None
    except ValidationError as error:
        for detail in error.errors():
            print(f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None

    # Late: the checks above answer at once, this takes seconds.
    from transformers.utils import logging as transformers_logging

    from services.runtimes.checkpoints import CheckpointError

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        comparison = compare(
            settings, labels, range_lines, range_source=range_source, beam_width=beam_width, rounds=rounds
        )
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    show(comparison, form, Console())


def main() -> None:
    """Entry point."""
    typer.run(command)


if __name__ == "__main__":
    main()
