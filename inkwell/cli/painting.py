"""`inkwell paint`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import preview as previewing
from inkwell.cli import report, terminal

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the pictures go: a file each, or stdout for one."""

    path: Path
    media_type: str
    stdout: bool

    def file(self, number: int, count: int) -> Path:
        """The file of picture `number` (from 1) of `count`."""
        if count == 1:
            return self.path
        return self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")


def destination(output: str, count: int) -> Destination:
    """Checked before anything is painted; raises BadParameter."""
    option = "--output"
    if output == "-":
        if count > 1:
            raise typer.BadParameter("stdout takes one picture; give a file name for several", param_hint=option)
        return Destination(Path("-"), "image/png", stdout=True)
    path = Path(output)
    media_type = MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        raise typer.BadParameter(f"{output!r} must end in one of: {', '.join(MEDIA_TYPES)}", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{output!r} is a directory", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {str(path.parent)!r}", param_hint=option)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the directory {str(path.parent)!r} cannot be written to", param_hint=option)
    return Destination(path, media_type, stdout=False)


async def run(
    client: AsyncClient,
    prompt: str,
    options: types.PaintOptions,
    where: Destination,
    *,
    as_json: bool,
    quiet: bool,
    preview: bool,
) -> None:
    """Paint, write and print; raises InkwellError or OSError."""
    console = terminal.console()
    on_terminal = console.is_terminal and not quiet
    draw = preview and on_terminal and previewing.possible(console)
    asked: types.PaintOptions = {**options, "previews": draw}
    result: types.PaintResult | None = None
    drawn: RenderableType = ""
    line: RenderableType = ""
    told = _Told(silent=quiet or on_terminal)
    with terminal.live(quiet=quiet) as live:
        async for event in client.paint_stream(prompt, **asked):
            match event:
                case types.Queued():
                    told.line(f"queued, {event.position} before this one")
                    line = terminal.status(f"queued, {event.position} before this one")
                case types.Started():
                    told.line(f"started: {event.model} on {event.hardware} ({event.runtime})")
                    line = terminal.status(f"{event.model} on {event.hardware} ({event.runtime})")
                case types.Progress():
                    told.progress(event)
                    line = terminal.bar(event.step, event.step_count, "steps", terminal.remaining(event.eta_ms))
                case types.Preview() if draw:
                    drawn = previewing.draw([image.content for image in event.images], console.width)
                case types.PaintResult():
                    result = event
            live.update(terminal.above(drawn, line) if drawn else line)
    assert result is not None
    if draw:
        console.print(previewing.draw([picture.content for picture in result.pictures], console.width))
    for warning in result.warnings:
        report.note(warning)
    _deliver(result, where, as_json=as_json)


class _Told:
    """Progress as plain lines, where stderr is no terminal: one an event, and one for every tenth of the steps."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._tenth = 0

    def line(self, text: str) -> None:
        if not self._silent:
            report.note(text)

    def progress(self, event: types.Progress) -> None:
        tenth = event.step * 10 // max(1, event.step_count)
        if tenth > self._tenth:
            self._tenth = tenth
            self.line(f"step {event.step}/{event.step_count}, {terminal.remaining(event.eta_ms)}")


def _deliver(result: types.PaintResult, where: Destination, *, as_json: bool) -> None:
    if where.stdout:
        report.raw(result.pictures[0].content)
        return
    for number, picture in enumerate(result.pictures, start=1):
        path = where.file(number, len(result.pictures))
        try:
            picture.save(path)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        if as_json:
            report.json_line(_as_json(path, picture, result))
        else:
            report.line(str(path))


def _as_json(path: Path, picture: types.Picture, result: types.PaintResult) -> dict[str, Any]:
    return {
        "file": str(path),
        "media_type": picture.media_type,
        "size_bytes": len(picture.content),
        "parameters": dataclasses.asdict(picture.parameters),
        "warnings": list(result.warnings),
        "timing": dataclasses.asdict(result.timing),
        "served_by": dataclasses.asdict(picture.served_by) | {"model": picture.parameters.model},
    }
