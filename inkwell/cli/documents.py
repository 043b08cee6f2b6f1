"""`inkwell document`."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import report, terminal
from inkwell.cli.reading import Source, reading_as_json
from inkwell.errors import InkwellError
from inkwell.types import ExportFormat

# What a folder's files end in; a document of several pages has its PAGE XML in an archive.
_ENDINGS = {
    ExportFormat.TEXT: ".txt",
    ExportFormat.JSON: ".json",
    ExportFormat.HOCR: ".hocr",
    ExportFormat.ALTO: ".alto.xml",
    ExportFormat.PAGE_XML: ".page.xml",
    ExportFormat.SEARCHABLE_PDF: ".pdf",
}
_ARCHIVE_ENDING = ".page.zip"
_BY_SUFFIX = {
    ".txt": ExportFormat.TEXT,
    ".json": ExportFormat.JSON,
    ".hocr": ExportFormat.HOCR,
    ".html": ExportFormat.HOCR,
    ".pdf": ExportFormat.SEARCHABLE_PDF,
    ".zip": ExportFormat.PAGE_XML,
}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the files go: into a folder, into the one file, or to stdout where both are None."""

    formats: tuple[ExportFormat, ...]
    folder: Path | None = None
    file: Path | None = None
    stem: str = ""

    @property
    def streams_text(self) -> bool:
        """Whether pages are printed as they are read."""
        return self.folder is None and self.file is None and self.formats == (ExportFormat.TEXT,)

    def path(self, export: types.Export) -> Path:
        """The file of an export."""
        if self.file is not None:
            return self.file
        assert self.folder is not None
        ending = _ENDINGS[export.format]
        if export.format is ExportFormat.PAGE_XML and export.media_type == "application/zip":
            ending = _ARCHIVE_ENDING
        return self.folder / f"{self.stem}{ending}"


def destination(name: str, formats: Sequence[ExportFormat], output: str | None, *, as_json: bool) -> Destination:
    """Checked before anything is sent; `name` is the document's. Raises BadParameter."""
    wanted = tuple(dict.fromkeys(formats))
    if output is None:
        if len(wanted) > 1:
            raise typer.BadParameter("several formats need a folder to go to", param_hint="--output")
        if as_json and wanted:
            raise typer.BadParameter("stdout cannot carry both a file and --json", param_hint="--output")
        if wanted == (ExportFormat.SEARCHABLE_PDF,) and sys.stdout.isatty():
            raise typer.BadParameter("a PDF is not for the terminal; name a file", param_hint="--output")
        return Destination(wanted or (ExportFormat.TEXT,))
    path = Path(output)
    if path.is_dir():
        _check_folder(path)
        stem = "stdin" if name == "-" else Path(name).stem
        place = Destination(wanted or (ExportFormat.TEXT,), folder=path, stem=stem)
        targets = [path / f"{stem}{_ENDINGS[each]}" for each in place.formats]
    else:
        if output.endswith(os.sep) or not path.parent.is_dir():
            missing = path if output.endswith(os.sep) else path.parent
            raise typer.BadParameter(f"there is no directory {str(missing)!r}", param_hint="--output")
        _check_folder(path.parent)
        if len(wanted) > 1:
            raise typer.BadParameter(f"several formats need a folder, and {output!r} is none", param_hint="--output")
        place = Destination(wanted or (_format_of(path),), file=path)
        targets = [path]
    for target in targets:
        if name != "-" and target.exists() and target.samefile(name):
            raise typer.BadParameter(f"{str(target)!r} is the document itself", param_hint="--output")
    return place


def _format_of(path: Path) -> ExportFormat:
    kind = _BY_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise typer.BadParameter(
            f"what {str(path)!r} shall be is not clear; say it, or end it in one of: {', '.join(_BY_SUFFIX)}",
            param_hint="--format",
        )
    return kind


def _check_folder(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the directory {str(folder)!r} cannot be written to", param_hint="--output")


async def run(
    client: AsyncClient, source: Source, options: Mapping[str, Any], where: Destination, *, as_json: bool, quiet: bool
) -> None:
    """Read, print and write; raises InkwellError or OSError."""
    name, content = source
    files = () if where.streams_text else where.formats
    document: types.Document | None = None
    between = "\n" if sys.stdout.isatty() else "\f"  # terminals draw no form feed
    printed = 0
    try:
        with terminal.live(quiet=quiet) as live:
            async for event in client.read_document_stream(content, export=files, **options):
                match event:
                    case types.Queued():
                        live.update(terminal.status(f"queued, {event.position} before this one"))
                    case types.Started():
                        live.update(terminal.status(f"{event.model} on {event.hardware} ({event.runtime})"))
                    case types.DocumentProgress():
                        live.update(_bar(event))
                    case types.PageRead() if as_json and not files:
                        report.json_line(_page_as_json(name, event.page))
                    case types.PageRead() if where.streams_text:
                        report.text((between if printed else "") + _lines(event.page.text))
                        printed += 1
                    case types.DocumentResult():
                        document = event.document
    except InkwellError as error:
        if as_json:
            report.json_line({"file": name, "error": report.error_as_json(error)})
        raise
    assert document is not None
    _tell(document)
    for kind in files:
        _deliver(document.exports, kind, where, as_json=as_json)


def _bar(progress: types.DocumentProgress) -> RenderableType:
    page = min(progress.page_done_count + 1, progress.page_count)
    note = f"page {page}/{progress.page_count}"
    if progress.eta_ms:
        note += f", {terminal.remaining(progress.eta_ms)}"
    return terminal.bar(progress.line_done_count, progress.line_count, "lines", note)


def _lines(text: str) -> str:
    return f"{text}\n" if text else ""


def _tell(document: types.Document) -> None:
    """What the reader of the text should know."""
    lines = list(document.lines)
    repeating = sum(line.reading.repetition_suspected for line in lines)
    truncated = sum(line.reading.truncated for line in lines)
    if not lines and not document.dropped_line_count:
        report.note("no writing was found")
    if document.dropped_line_count:
        report.note(f"left out for --min-confidence: {_count(document.dropped_line_count)}")
    if repeating:
        report.note(f"likely wrong, because the text goes round in circles: {_count(repeating)}")
    if truncated:
        report.note(f"stopped at the token limit, which --max-tokens raises: {_count(truncated)}")


def _count(lines: int) -> str:
    return "1 line" if lines == 1 else f"{lines} lines"


def _deliver(exports: Mapping[str, types.Export], kind: ExportFormat, where: Destination, *, as_json: bool) -> None:
    export = exports.get(kind)
    if export is None:
        raise OSError(f"the server did not send the file that was asked for: {kind}")
    if where.folder is None and where.file is None:
        report.raw(export.content)
        return
    path = where.path(export)
    try:
        export.save(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    if as_json:
        report.json_line(
            {
                "file": str(path),
                "format": str(kind),
                "media_type": export.media_type,
                "size_bytes": len(export.content),
            }
        )
    else:
        report.line(str(path))


def _page_as_json(name: str, page: types.DocumentPage) -> dict[str, Any]:
    values = {field.name: getattr(page, field.name) for field in dataclasses.fields(page)}
    lines = [
        {
            "order": line.order,
            "block": line.block,
            "polygon": line.polygon,
            "angle": line.angle,
            "detection_score": line.detection_score,
        }
        | reading_as_json(line.reading)
        for line in page.lines
    ]
    return {"file": name} | values | {"text": page.text, "lines": lines}
