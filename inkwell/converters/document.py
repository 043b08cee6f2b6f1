"""Reading documents: the request, and the events that make up a document."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from inkwell import types
from inkwell.converters import shared
from inkwell.converters.read import ReadOptions, reading
from inkwell.errors import InternalError, invalid
from inkwell.ocr.v1 import ocr_pb2

_FORMATS = shared.by_number(ocr_pb2.ExportFormat, "EXPORT_FORMAT_", types.ExportFormat)
_FORMAT_NUMBERS = shared.by_name(_FORMATS)
_ORIENTATIONS = {
    None: ocr_pb2.PAGE_ORIENTATION_UNSPECIFIED,
    0: ocr_pb2.PAGE_ORIENTATION_UPRIGHT,
    90: ocr_pb2.PAGE_ORIENTATION_90,
    180: ocr_pb2.PAGE_ORIENTATION_180,
    270: ocr_pb2.PAGE_ORIENTATION_270,
}


@dataclass(frozen=True, slots=True)
class DocumentOptions:
    """The arguments of `Client.read_document` that go into a request; None for the server's default."""

    read: ReadOptions
    pages: str | Iterable[int] | None
    dpi: int | None
    min_confidence: float | None
    orientation: int | None
    export: str | Iterable[str]


def document_request(options: DocumentOptions) -> ocr_pb2.ReadDocumentRequest:
    """A request without its content; raises InvalidRequest for values that its fields cannot hold."""
    request = ocr_pb2.ReadDocumentRequest()
    options.read.into(request)
    for first, last in page_ranges(options.pages):
        try:
            request.page_ranges.add(first_page=first, last_page=last)
        except (TypeError, ValueError) as error:
            raise invalid("pages", f"page numbers expected; {error}") from None
    shared.assign(request, "dpi", options.dpi)
    shared.assign(request, "min_confidence", options.min_confidence)
    if options.orientation not in _ORIENTATIONS:
        raise invalid("orientation", f"0, 90, 180, 270 or None expected, not {options.orientation!r}")
    request.orientation = _ORIENTATIONS[options.orientation]
    for wanted in shared.several("export", options.export):
        number = shared.choice("export", wanted, _FORMAT_NUMBERS)
        if number and number not in request.export_formats:
            request.export_formats.append(number)  # type: ignore[arg-type]  # one of its numbers
    return request


def page_ranges(pages: str | Iterable[int] | None) -> list[tuple[int, int]]:
    """First and last pages of "1-3,7,9-", 0 for the document's last; raises InvalidRequest for anything else."""
    if pages is None:
        return []
    if not isinstance(pages, str):
        return [(page, page) for page in shared.several("pages", pages)]
    ranges = []
    for part in filter(None, (each.strip() for each in pages.split(","))):
        match = re.fullmatch(r"(\d{1,9})(?:(\s*-\s*)(\d{1,9})?)?", part)
        if match is None:
            raise invalid("pages", f"{part!r} is no page and no range of pages; '1-3,7,9-' would be some")
        first = int(match[1])
        ranges.append((first, int(match[3] or 0) if match[2] else first))
    return ranges


class DocumentAssembler:
    """Turns the messages of one ReadDocument stream into events, the last of which holds the whole document."""

    def __init__(self) -> None:
        self._pages: list[types.DocumentPage] = []
        self._lines: dict[tuple[int, int], types.DocumentLine] = {}  # of pages under way, by page and order
        self._exports: dict[str, types.Export] = {}
        self._chunks: list[bytes] = []
        self._chunk_format: ocr_pb2.ExportFormat.ValueType | None = None

    def event(self, message: ocr_pb2.ReadDocumentResponse, served: types.ServedBy) -> types.DocumentEvent | None:
        """None for part of a file and for an event that this version does not know.

        Raises InternalError for a stream that does not add up.
        """
        number = message.sequence
        match message.WhichOneof("event"):
            case "queued":
                return types.Queued(number, message.queued.position)
            case "started":
                return shared.started(number, message.started)
            case "progress":
                values = shared.same_named(message.progress, types.DocumentProgress)
                return types.DocumentProgress(number, **values)
            case "page_started":
                return types.PageStarted(number, _page(message.page_started, ()))
            case "line":
                line = _line(message.line.line, served)
                self._lines[message.line.page, line.order] = line
                return types.LineRead(number, message.line.page, line)
            case "page":
                self._pages.append(self._page(message.page, served))
                return types.PageRead(number, self._pages[-1])
            case "export":
                export = self._export(message.export)
                return None if export is None else types.ExportReady(number, export)
            case "result":
                return types.DocumentResult(number, self._document(message.result, served))
        return None

    def _page(self, message: ocr_pb2.PageRead, served: types.ServedBy) -> types.DocumentPage:
        number = message.page.page
        # A page's lines come without their tokens, which came with each line alone.
        whole = {line.order: line for (page, _), line in self._lines.items() if page == number}
        lines = tuple(whole.get(each.order) or _line(each, served) for each in message.lines)
        self._lines = {key: line for key, line in self._lines.items() if key[0] != number}
        return _page(message.page, lines)

    def _export(self, chunk: ocr_pb2.ExportChunk) -> types.Export | None:
        if self._chunk_format not in (None, chunk.format):
            raise InternalError("the server began a file before the last one was complete", reason="EXPORT_BROKEN")
        self._chunk_format = chunk.format
        self._chunks.append(chunk.content)
        if not chunk.is_last:
            return None
        content = b"".join(self._chunks)
        self._chunks.clear()
        self._chunk_format = None
        kind = _FORMATS.get(chunk.format)
        if kind is None:
            return None
        export = types.Export(kind, chunk.media_type, content)
        self._exports[kind] = export
        return export

    def _document(self, message: ocr_pb2.DocumentResult, served: types.ServedBy) -> types.Document:
        if self._chunk_format is not None:
            raise InternalError("the server ended the stream within a file", reason="EXPORT_BROKEN")
        if len(self._pages) != message.page_count:
            raise InternalError(
                f"the server sent {len(self._pages)} of {message.page_count} pages", reason="PAGES_MISSING"
            )
        return types.Document(
            pages=tuple(self._pages),
            exports=self._exports,
            page_count=message.page_count,
            line_count=message.line_count,
            dropped_line_count=message.dropped_line_count,
            blank_line_count=message.blank_line_count,
            confidence=message.confidence,
            timing=shared.timing(message.timing),
            served_by=served,
        )


def _page(message: ocr_pb2.DocumentPage, lines: tuple[types.DocumentLine, ...]) -> types.DocumentPage:
    values = shared.same_named(message, types.DocumentPage)
    return types.DocumentPage(**values, lines=lines)


def _line(message: ocr_pb2.DocumentLine, served: types.ServedBy) -> types.DocumentLine:
    return types.DocumentLine(
        order=message.order,
        block=message.block,
        polygon=tuple((point.x, point.y) for point in message.polygon),
        angle=message.angle,
        detection_score=message.detection_score,
        reading=reading(message.recognition, served),
    )
