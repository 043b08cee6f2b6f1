"""`inkwell read`."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, TypedDict

import typer
from rich.console import Group
from rich.text import Text

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.batch import BatchItem
from inkwell.cli import report, terminal
from inkwell.errors import InkwellError

Source = tuple[str, types.ImageSource]


class Options(TypedDict):
    """The keyword arguments of `AsyncClient.read_stream` and `AsyncClient.read_many`."""

    model: str
    languages: Sequence[str]
    beam_width: int | None
    hypothesis_count: int | None
    length_penalty: float | None
    max_new_token_count: int | None
    no_repeat_ngram_size: int | None
    early_stopping: str | None
    timeout_s: float


def sources(arguments: Sequence[str], what: str = "IMAGE") -> list[Source]:
    """The files by the names they were given as argument `what`; raises BadParameter before anything is sent."""
    if arguments.count("-") > 1:
        raise typer.BadParameter("stdin ('-') can be read only once", param_hint=what)
    for argument in arguments:
        if argument != "-" and not os.path.isfile(argument):
            wrong = "is a directory" if os.path.isdir(argument) else "does not exist"
            raise typer.BadParameter(f"{argument!r} {wrong}", param_hint=what)
        if argument != "-" and not os.access(argument, os.R_OK):
            raise typer.BadParameter(f"{argument!r} cannot be read", param_hint=what)
    return [(argument, sys.stdin.buffer.read() if argument == "-" else argument) for argument in arguments]


async def run(
    client: AsyncClient,
    images: Sequence[Source],
    options: Options,
    *,
    alternatives: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read and print; raises InkwellError for one image, typer.Exit(1) when some of several failed."""
    show = _Printer(alternatives=alternatives, as_json=as_json, name_files=len(images) > 1)
    if len(images) == 1:
        name, source = images[0]
        try:
            reading = await _read_one(client, source, options, quiet=quiet)
        except InkwellError as error:
            show.failure_line(name, error)
            raise
        show.reading(name, reading)
    elif await _read_many(client, images, options, show, quiet=quiet):
        raise typer.Exit(report.Exit.FAILED)


class _Printer:
    def __init__(self, *, alternatives: int | None, as_json: bool, name_files: bool) -> None:
        self._alternatives = alternatives
        self._as_json = as_json
        self._name_files = name_files

    def reading(self, name: str, reading: types.Reading) -> None:
        if self._as_json:
            report.json_line({"file": name} | reading_as_json(reading))
            return
        prefix = f"{name}\t" if self._name_files else ""
        if self._alternatives is None:
            report.line(prefix + reading.text)
        else:
            for each in reading.hypotheses:
                report.line(f"{prefix}{each.confidence:.4f}\t{each.text}")
        if reading.truncated:
            report.note(f"{name}: stopped at the token limit, the text may go on; --max-tokens allows more")
        if reading.repetition_suspected:
            report.note(f"{name}: likely wrong, the text goes round in circles; --no-repeat 3 forbids it")
        if reading.blank:
            report.note(f"{name}: no writing was found")

    def failure(self, name: str, error: InkwellError) -> None:
        self.failure_line(name, error)
        report.explain(error, subject=name)

    def failure_line(self, name: str, error: InkwellError) -> None:
        if self._as_json:
            report.json_line({"file": name, "error": report.error_as_json(error)})


def reading_as_json(reading: types.Reading) -> dict[str, Any]:
    """What a line of `--json` says of a reading."""
    return {
        "text": reading.text,
        "confidence": reading.confidence,
        "confidence_calibrated": reading.confidence_calibrated,
        "log_probability": reading.log_probability,
        "truncated": reading.truncated,
        "repetition_suspected": reading.repetition_suspected,
        "blank": reading.blank,
        "tokens": [dataclasses.asdict(token) for token in reading.tokens],
        "alternatives": [
            {name: getattr(each, name) for name in ("text", "confidence", "log_probability", "score")}
            for each in reading.alternatives
        ],
        "timing": dataclasses.asdict(reading.timing),
        "served_by": dataclasses.asdict(reading.served_by) | {"model": reading.model},
    }


async def _read_one(client: AsyncClient, source: types.ImageSource, options: Options, *, quiet: bool) -> types.Reading:
    reading: types.Reading | None = None
    with terminal.live(quiet=quiet) as live:
        async for event in client.read_stream(source, **options):
            match event:
                case types.Queued():
                    live.update(terminal.status(f"queued, {event.position} before this one"))
                case types.Started():
                    live.update(terminal.status(f"{event.model} on {event.hardware} ({event.runtime})"))
                case types.Partial():
                    growing = Text(event.text + "▌", overflow="fold")
                    live.update(Group(terminal.status(f"{event.token_count} tokens"), growing))
                case types.ReadResult():
                    reading = event.reading
    assert reading is not None
    return reading


async def _read_many(
    client: AsyncClient, images: Sequence[Source], options: Options, show: _Printer, *, quiet: bool
) -> int:
    """Print in the order given; answers how many failed."""
    # Answers come in any order and names may repeat, so they are joined by position.
    numbered: list[BatchItem] = [(str(position), source) for position, (_, source) in enumerate(images)]
    ready: dict[int, types.Reading | InkwellError] = {}
    failed = 0

    def print_ready(position: int) -> None:
        nonlocal failed
        outcome = ready.pop(position)
        if isinstance(outcome, InkwellError):
            failed += 1
            show.failure(images[position][0], outcome)
        else:
            show.reading(images[position][0], outcome)

    position = 0
    answered = 0
    with terminal.live(quiet=quiet) as live:
        try:
            async for number, outcome in client.read_many(numbered, **options):
                ready[int(number)] = outcome
                answered += 1
                while position in ready:
                    print_ready(position)
                    position += 1
                live.update(terminal.bar(answered, len(images), "read"))
        finally:  # what was read before the stream broke is not lost
            for left in sorted(ready):
                print_ready(left)
    return failed
