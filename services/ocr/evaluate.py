"""`python -m services.ocr.evaluate DIR`: character and word error rates over a folder of labelled lines.

DIR holds labels.tsv, tab-separated without quoting, with a header that names the columns `file` (relative to DIR) and
`text`; of other columns only `writer` is read, and only by fine-tuning. The images go through the same decoding and the
same engine as calls do.
"""

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from pydantic import ValidationError
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table

from services.kit.engine_api import Engine, Failed, Finished, Raw
from services.kit.faults import Fault
from services.kit.images import Limits
from services.ocr import images, reliability
from services.ocr.domain import BEAM_WIDTH_MOST, EngineInfo, ModelInfo, ReadJob, Recognition
from services.ocr.settings import Settings

LABELS = "labels.tsv"
WORST_COUNT = 5


@dataclass(frozen=True)
class Label:
    """One row of labels.tsv."""

    file: str
    path: Path
    text: str
    writer: str = ""  # empty where labels.tsv has no such column


@dataclass(frozen=True)
class LineReport:
    """How one line was read. `cer` is its edits over the characters of its label."""

    file: str
    text: str
    read: str
    edits: int
    cer: float
    confidence: float  # what callers are told
    own_confidence: float  # the best hypothesis' own, before any calibration
    blank: bool
    repetition_suspected: bool


@dataclass(frozen=True)
class Report:
    """Error rates are edits over the label's characters (words), summed over all lines, so long lines weigh more."""

    model: str
    beam_width: int
    line_count: int
    cer: float
    wer: float
    exact_rate: float  # lines read without a mistake
    lines_per_second: float  # decoding of the images included, loading of the model not
    # Mean distance between the confidence told and the share of right characters (reliability.py).
    calibration_error: float
    confidence_calibrated: bool
    blank_count: int  # lines taken for empty
    repetition_count: int  # lines whose text goes round in circles
    worst: tuple[LineReport, ...]  # most edits for their length first


class BadFolder(Exception):
    """What is wrong with the folder, a line of text each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def read_labels(folder: Path, limits: Limits) -> list[Label]:
    """Read and check labels.tsv and the images it names; raises BadFolder listing every bad row by its line number."""
    path = folder / LABELS
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFolder([f"{path}: cannot be read: {error}"]) from None
    # Not splitlines: a label may hold one of the rarer line separators.
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = rows[0] if rows else []
    missing = [column for column in ("file", "text") if column not in header]
    if missing:
        raise BadFolder([f"{path}:1: the header has no column {' and no column '.join(missing)}"])
    labels: list[Label] = []
    problems: list[str] = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        values = dict(zip(header, row, strict=False))
        file = values.get("file", "")
        label = Label(file, folder / file, values.get("text", ""), values.get("writer", ""))
        problem = _problem(label, len(row), len(header), limits)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        else:
            labels.append(label)
    if not labels and not problems:
        problems.append(f"{path}: it has no rows")
    if problems:
        raise BadFolder(problems)
    return labels


def evenly(labels: Sequence[Label], count: int) -> list[Label]:
    """At most so many labels, evenly taken from all: neighbours are often of one writer."""
    if len(labels) <= count:
        return list(labels)
    return [labels[number * len(labels) // count] for number in range(count)]


def _problem(label: Label, columns: int, wanted: int, limits: Limits) -> str | None:
    if columns != wanted:
        return f"{columns} columns where the header has {wanted}"
    if not label.file or not label.text:
        return "file or text is empty"
    try:
        images.decode(label.path.read_bytes(), limits)
    except OSError as error:
        return f"{label.file}: {error.strerror}"
    except Fault as fault:
        return f"{label.file}: {fault.data.fields[0].description}"
    return None


def evaluate(engine: Engine, labels: Sequence[Label], settings: Settings, *, model: str, beam_width: int = 0) -> Report:
    """Read every label's image with the engine, as many at a time as the service would; beam_width 0: the model's."""
    began = time.perf_counter()
    found, lines, width = read_lines(engine, labels, settings, model=model, beam_width=beam_width)
    return _report(found, width, lines, time.perf_counter() - began)


def read_lines(
    engine: Engine, labels: Sequence[Label], settings: Settings, *, model: str, beam_width: int = 0
) -> tuple[ModelInfo, list[LineReport], int]:
    """How every line was read, in the order of the labels, by which model and with how many beams."""
    info = engine.info()
    assert isinstance(info, EngineInfo)
    found = info.find(model)
    assert found is not None
    decoding = found.default_decoding
    if beam_width:
        decoding = msgspec.structs.replace(decoding, beam_width=beam_width)
    decoding = msgspec.structs.replace(decoding, hypothesis_count=1)
    limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
    reads: dict[int, Recognition] = {}
    waiting = iter(enumerate(labels))
    under_way = 0
    while len(reads) < len(labels):
        for number, label in islice(waiting, settings.max_jobs - under_way):
            line = images.decode(label.path.read_bytes(), limits)
            job = ReadJob(found.name, line, decoding, partials=False)
            engine.submit(str(number), Raw(msgspec.msgpack.encode(job)))
            under_way += 1
        for event in engine.step():
            if isinstance(event, Finished):
                reads[int(event.job)] = msgspec.msgpack.decode(event.payload, type=Recognition)
                under_way -= 1
            elif isinstance(event, Failed):
                raise RuntimeError(f"{labels[int(event.job)].file}: {event.fault.message}")
    return found, list(_lines(labels, reads)), decoding.beam_width


def _lines(labels: Sequence[Label], reads: dict[int, Recognition]) -> Iterator[LineReport]:
    for number, label in enumerate(labels):
        read = reads[number]
        best = read.hypotheses[0]
        edits = Levenshtein.distance(label.text, best.text)
        yield LineReport(
            file=label.file,
            text=label.text,
            read=best.text,
            edits=edits,
            cer=edits / len(label.text),
            confidence=read.confidence,
            own_confidence=best.confidence,
            blank=read.blank,
            repetition_suspected=read.repetition_suspected,
        )


def _report(model: ModelInfo, beam_width: int, lines: list[LineReport], seconds: float) -> Report:
    word_edits = sum(Levenshtein.distance(line.text.split(), line.read.split()) for line in lines)
    return Report(
        model=model.name,
        beam_width=beam_width,
        line_count=len(lines),
        cer=sum(line.edits for line in lines) / sum(len(line.text) for line in lines),
        wer=word_edits / max(1, sum(len(line.text.split()) for line in lines)),
        exact_rate=sum(line.edits == 0 for line in lines) / len(lines),
        lines_per_second=len(lines) / seconds,
        calibration_error=reliability.expected_calibration_error(
            [line.confidence for line in lines], [reliability.right_share(line.edits, line.text) for line in lines]
        ),
        confidence_calibrated=model.confidence_calibrated,
        blank_count=sum(line.blank for line in lines),
        repetition_count=sum(line.repetition_suspected for line in lines),
        worst=tuple(sorted(lines, key=lambda line: -line.cer)[:WORST_COUNT]),
    )


def show(report: Report, console: Console) -> None:
    """Print a table on a terminal, plain lines into a pipe."""
    figures = {
        "model": report.model,
        "beam width": str(report.beam_width),
        "lines": str(report.line_count),
        "CER": f"{report.cer:.4f}",
        "WER": f"{report.wer:.4f}",
        "exact lines": f"{report.exact_rate:.4f}",
        "lines/s": f"{report.lines_per_second:.1f}",
        "calibration error": f"{report.calibration_error:.4f}" + ("" if report.confidence_calibrated else " (raw)"),
        "blank": str(report.blank_count),
        "repeating": str(report.repetition_count),
    }
    if not console.is_terminal:
        for name, value in figures.items():
            print(f"{name}\t{value}")
        for line in report.worst:
            print(f"worst\t{line.file}\t{line.cer:.3f}\t{line.text}\t{line.read}")
        return
    table = Table(*figures, title="Reading")
    table.add_row(*figures.values())
    console.print(table)
    worst = Table("file", "CER", "label", "read", title="Worst lines")
    for line in report.worst:
        worst.add_row(line.file, f"{line.cer:.2f}", line.text, line.read)
    console.print(worst)


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help=f"folder with {LABELS} (columns file, text)")],
    model: Annotated[
        str, typer.Option(help="name of a configured model, or a source: a folder or owner/name@revision")
    ] = "",
    beam_width: Annotated[
        int, typer.Option(min=0, max=BEAM_WIDTH_MOST, help="beams, 1 is greedy; 0 takes the model's own default")
    ] = 0,
    limit: Annotated[int, typer.Option(min=0, help="read only the first so many lines; 0 reads all")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print character and word error rates (CER, WER) over a folder of labelled lines, through the real engine."""
    try:
        settings = settings_for(model)
        limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
        labels = read_labels(folder, limits)
    except BadFolder as bad:
        for problem in bad.problems:
            print(problem, file=sys.stderr)
        raise typer.Exit(2) from None
    except ValidationError as error:
        for detail in error.errors():
            print(f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None

    # Late: the checks above answer at once, this takes seconds.
    from services.ocr.engine.main import create_engine
    from services.runtimes.checkpoints import CheckpointError

    try:
        engine = create_engine(settings.model_dump_json())
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    report = evaluate(
        engine, labels[:limit] if limit else labels, settings, model=settings.default_model_name, beam_width=beam_width
    )
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
    else:
        show(report, Console())


def settings_for(model: str) -> Settings:
    """The service's settings with only the wanted model, which may be a source of its own."""
    settings = Settings()
    name = model or settings.default_model_name
    source = settings.models.get(name, name)
    return settings.model_copy(update={"models": {name: source}, "default_model": name})


def main() -> None:
    """Entry point."""
    typer.run(command)


if __name__ == "__main__":
    main()
