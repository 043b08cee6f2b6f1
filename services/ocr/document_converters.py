"""Protobuf to domain and back, for documents."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.kit.faults import FieldViolation, invalid_field, invalid_fields, too_large
from services.ocr import converters
from services.ocr.documents.exports import Format
from services.ocr.documents.reading import LineDone, PageDone, PageStarted
from services.ocr.documents.result import LineResult, PageInfo, Summary
from services.ocr.domain import ModelInfo

DPI_LEAST, DPI_DEFAULT, DPI_MOST = 72, 200, 600

_FORMATS: dict[ocr_pb2.ExportFormat.ValueType, Format] = {
    ocr_pb2.EXPORT_FORMAT_JSON: "json",
    ocr_pb2.EXPORT_FORMAT_TEXT: "text",
    ocr_pb2.EXPORT_FORMAT_HOCR: "hocr",
    ocr_pb2.EXPORT_FORMAT_ALTO: "alto",
    ocr_pb2.EXPORT_FORMAT_PAGE_XML: "page_xml",
    ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF: "searchable_pdf",
}
_FORMATS_OUT = {name: number for number, name in _FORMATS.items()}
_ROTATIONS: dict[ocr_pb2.PageOrientation.ValueType, int | None] = {
    ocr_pb2.PAGE_ORIENTATION_UNSPECIFIED: None,
    ocr_pb2.PAGE_ORIENTATION_UPRIGHT: 0,
    ocr_pb2.PAGE_ORIENTATION_90: 90,
    ocr_pb2.PAGE_ORIENTATION_180: 180,
    ocr_pb2.PAGE_ORIENTATION_270: 270,
}

# Takes a field and what is wrong with it.
_Wrong = Callable[[str, str], None]


@dataclass(frozen=True)
class Options:
    """How a document is to be read, apart from the model and its decoding."""

    dpi: int  # DPI_LEAST to DPI_MOST
    min_confidence: float  # 0 to 1
    rotation: int | None  # degrees clockwise that bring pages upright; None: find out
    formats: tuple[Format, ...]  # each once
    page_ranges: tuple[tuple[int, int], ...]  # first and last page; a last page of 0 is the document's


def options_of(request: ocr_pb2.ReadDocumentRequest, *, max_pages: int) -> Options:
    """The request's options; raises Fault listing every one that is out of its range."""
    violations: list[FieldViolation] = []

    def wrong(field: str, description: str) -> None:
        violations.append(FieldViolation(field, description))

    dpi = request.dpi or DPI_DEFAULT
    if not DPI_LEAST <= dpi <= DPI_MOST:
        wrong("dpi", f"{request.dpi} is not in {DPI_LEAST} to {DPI_MOST}, nor 0 for {DPI_DEFAULT}")
    confidence = request.min_confidence
    if not (math.isfinite(confidence) and 0 <= confidence <= 1):
        wrong("min_confidence", f"{confidence:g} is not in 0 to 1")
    if request.orientation not in _ROTATIONS:
        known = ", ".join(f"{ocr_pb2.PageOrientation.Name(n)} ({n})" for n in _ROTATIONS)
        wrong("orientation", f"{request.orientation} is none of: {known}")
    formats = _formats(request, wrong)
    ranges = _ranges(request, max_pages, wrong)
    if violations:
        raise invalid_fields(violations)
    return Options(dpi, confidence, _ROTATIONS[request.orientation], formats, ranges)


def _formats(request: ocr_pb2.ReadDocumentRequest, wrong: _Wrong) -> tuple[Format, ...]:
    # No longer list can be without a repetition, so no more of it is looked at.
    wanted = request.export_formats[: len(_FORMATS) + 1]
    for number in wanted:
        if number not in _FORMATS:
            known = ", ".join(f"{ocr_pb2.ExportFormat.Name(n)} ({n})" for n in _FORMATS)
            wrong("export_formats", f"{number} is none of: {known}")
            return ()
    if len(set(wanted)) < len(wanted):
        twice = next(number for number, count in Counter(wanted).items() if count > 1)
        wrong("export_formats", f"{ocr_pb2.ExportFormat.Name(twice)} is named more than once; name each once")
    return tuple(_FORMATS[number] for number in wanted)


def _ranges(request: ocr_pb2.ReadDocumentRequest, max_pages: int, wrong: _Wrong) -> tuple[tuple[int, int], ...]:
    if len(request.page_ranges) > max_pages:
        wrong("page_ranges", f"{len(request.page_ranges)} ranges are more than the {max_pages} pages of one call")
        return ()
    ranges = tuple((r.first_page, r.last_page) for r in request.page_ranges)
    for index, (first, last) in enumerate(ranges):
        if first < 1:
            wrong(f"page_ranges[{index}].first_page", f"{first} is not a page; they count from 1")
        elif last and last < first:
            wrong(f"page_ranges[{index}].last_page", f"{last} is before first_page, {first}; 0 means the last page")
    return ranges


def pages_of(options: Options, page_count: int, *, max_pages: int) -> tuple[int, ...]:
    """The pages to read of a document that has so many, in the order wanted; raises Fault where there are none such."""
    spans = []
    for index, (first, last) in enumerate(options.page_ranges or ((1, 0),)):
        last = last or page_count
        if max(first, last) > page_count:
            field = f"page_ranges[{index}].{'first_page' if first > page_count else 'last_page'}"
            raise invalid_field(
                field,
                f"the document has no page {max(first, last)}; it has {page_count}",
                reason="PAGE_OUT_OF_RANGE",
                page_count=page_count,
            )
        spans.append(range(first, last + 1))
    total = sum(len(span) for span in spans)
    if total > max_pages:
        what = "page_ranges select" if options.page_ranges else "the document has"
        raise too_large(
            "page_ranges",
            "DOCUMENT_TOO_MANY_PAGES",
            f"{what} {total} pages, more than the {max_pages} of one call; select fewer",
            page_count=page_count,
            limit_pages=max_pages,
        )
    pages = tuple(page for span in spans for page in span)
    if len(set(pages)) < len(pages):
        twice = next(number for number, count in Counter(pages).items() if count > 1)
        raise invalid_field("page_ranges", f"page {twice} is in more than one range; name each page once")
    return pages


def started(model: ModelInfo) -> ocr_pb2.ReadDocumentResponse:
    """The engine took up the first page."""
    return ocr_pb2.ReadDocumentResponse(
        started=common_pb2.Started(hardware=model.hardware, runtime=model.runtime, model=model.name)
    )


def queued(position: int) -> ocr_pb2.ReadDocumentResponse:
    """`position` documents stand before this one."""
    return ocr_pb2.ReadDocumentResponse(queued=common_pb2.Queued(position=position))


def page_started(event: PageStarted) -> ocr_pb2.ReadDocumentResponse:
    """The lines of a page are found."""
    return ocr_pb2.ReadDocumentResponse(page_started=_page(event.info))


def line(event: LineDone, read: LineResult, model: ModelInfo) -> ocr_pb2.ReadDocumentResponse:
    """A line that counts, with all that is known of it."""
    return ocr_pb2.ReadDocumentResponse(line=ocr_pb2.LineRead(page=event.page, line=_line(read, model)))


def page(event: PageDone, model: ModelInfo) -> ocr_pb2.ReadDocumentResponse:
    """A page that is done; its lines without their tokens."""
    lines = [_line(read, model) for read in event.result.lines]
    for message in lines:
        for hypothesis in message.recognition.hypotheses:
            hypothesis.ClearField("tokens")
    return ocr_pb2.ReadDocumentResponse(page=ocr_pb2.PageRead(page=_page(event.result.info), lines=lines))


def progress(*, pages_done: int, pages: int, lines_done: int, lines: int, eta_ms: int) -> ocr_pb2.ReadDocumentResponse:
    """How far the document has come."""
    return ocr_pb2.ReadDocumentResponse(
        progress=ocr_pb2.DocumentProgress(
            page_done_count=pages_done,
            page_count=pages,
            line_done_count=lines_done,
            line_count=lines,
            eta_ms=eta_ms,
        )
    )


def export_chunk(wanted: Format, media_type: str, content: bytes, *, is_last: bool) -> ocr_pb2.ReadDocumentResponse:
    """A piece of a file."""
    return ocr_pb2.ReadDocumentResponse(
        export=ocr_pb2.ExportChunk(
            format=_FORMATS_OUT[wanted],
            media_type=media_type,
            content=content,
            is_last=is_last,
        )
    )


def result(summary: Summary, *, queue_ms: float, engine_ms: float) -> ocr_pb2.ReadDocumentResponse:
    """The last event of a stream."""
    return ocr_pb2.ReadDocumentResponse(
        result=ocr_pb2.DocumentResult(
            page_count=summary.page_count,
            line_count=summary.line_count,
            dropped_line_count=summary.dropped_line_count,
            blank_line_count=summary.blank_line_count,
            confidence=summary.confidence,
            timing=common_pb2.Timing(queue_ms=queue_ms, engine_ms=engine_ms),
        )
    )


def _page(info: PageInfo) -> ocr_pb2.DocumentPage:
    return ocr_pb2.DocumentPage(
        page=info.page,
        width=info.width,
        height=info.height,
        dpi=info.dpi,
        rotation=info.rotation,
        skew=info.skew,
        line_count=info.line_count,
    )


def _line(read: LineResult, model: ModelInfo) -> ocr_pb2.DocumentLine:
    return ocr_pb2.DocumentLine(
        order=read.order,
        block=read.block,
        polygon=[ocr_pb2.Point(x=x, y=y) for x, y in read.polygon],
        angle=read.angle,
        detection_score=read.detection_score,
        recognition=converters.recognition(read.recognition, model, queue_ms=read.queue_ms, engine_ms=read.engine_ms),
    )
