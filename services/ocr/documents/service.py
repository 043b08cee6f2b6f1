"""ReadDocument from request to the last event of its stream."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge

from inkwell.ocr.v1 import ocr_pb2
from inkwell.version import __version__
from services.kit import faults, tracing
from services.kit.admission import Priority
from services.kit.engine_host import EngineHost, engine_not_ready
from services.kit.faults import Fault
from services.kit.metrics import Metrics
from services.ocr import document_converters as converters
from services.ocr.documents import exports, kinds
from services.ocr.documents.course import Course
from services.ocr.documents.exports import Export
from services.ocr.documents.frames import Limits, TextLine, TextPage
from services.ocr.documents.places import Place, Places
from services.ocr.documents.reading import LineDone, PageDone, PageStarted, Plan, Reader, Taken
from services.ocr.documents.rendering import Rendering
from services.ocr.documents.result import Origin, PageResult, Summary
from services.ocr.domain import Decoding, ModelInfo, Recognition
from services.ocr.settings import Settings

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Caller:
    """Who wants a document read."""

    priority: Priority
    time_left_s: float | None  # until the deadline, as of now; None without one
    admit: Callable[[], Awaitable[None]]  # awaited once the call is admitted, before the first response
    asked_at: float = field(default_factory=time.monotonic)

    def time_left(self) -> float | None:
        """Seconds until the deadline. Not asked of gRPC: a call whose caller has left may not be asked any more."""
        return None if self.time_left_s is None else self.time_left_s - (time.monotonic() - self.asked_at)


class DocumentMetrics:
    """What is counted of documents."""

    def __init__(self, registry: CollectorRegistry, places: Places) -> None:
        self.pages = Counter(
            "inkwell_document_pages", "Pages of documents that were read.", ["model"], registry=registry
        )
        self.lines = Counter(
            "inkwell_document_lines",
            "Lines found on pages, by what became of them: read, blank, or dropped for their confidence.",
            ["model", "outcome"],
            registry=registry,
        )
        documents = Gauge("inkwell_documents", "Documents under way or waiting.", ["state"], registry=registry)
        documents.labels("running").set_function(lambda: places.running_count)
        documents.labels("waiting").set_function(lambda: places.waiting_count)


class Documents:
    """Reads documents on the engine of a host.

    executor: threads for cropping and writing exports. count_reading: told of every line that the engine read.
    """

    def __init__(
        self,
        host: EngineHost,
        settings: Settings,
        metrics: Metrics,
        *,
        executor: Executor,
        count_reading: Callable[[Recognition, ModelInfo], None],
    ) -> None:
        self._host = host
        self._settings = settings
        self._executor = executor
        self._count_reading = count_reading
        self._places = Places(
            at_a_time=settings.documents_at_a_time,
            queue_limit=settings.document_queue_limit,
            queue_bytes_limit=settings.queue_bytes_limit,
        )
        self._refused = metrics.refused
        self._metrics = DocumentMetrics(metrics.registry, self._places)
        self._limits = Limits(
            max_page_pixels=settings.max_page_pixels,
            min_page_side=settings.min_image_side,
            memory_bytes=settings.document_memory_bytes,
            step_s=settings.document_step_s,
        )

    async def read(
        self, request: ocr_pb2.ReadDocumentRequest, model: ModelInfo, decoding: Decoding, caller: Caller
    ) -> AsyncGenerator[ocr_pb2.ReadDocumentResponse, None]:
        """The responses, in order and numbered; raises Fault. Takes the content out of the request to free memory."""
        sequence = 0
        async with contextlib.aclosing(self._responses(request, model, decoding, caller)) as responses:
            async for response in responses:
                sequence += 1
                response.sequence = sequence
                yield response

    async def _responses(
        self, request: ocr_pb2.ReadDocumentRequest, model: ModelInfo, decoding: Decoding, caller: Caller
    ) -> AsyncGenerator[ocr_pb2.ReadDocumentResponse, None]:
        options = converters.options_of(request, max_pages=self._settings.max_document_pages)
        self._check_content(request.content)
        if not self._settings.read_documents:
            raise faults.failed_precondition(
                "DOCUMENTS_NOT_READ", "this server reads single lines only; its setting READ_DOCUMENTS is off"
            )
        if not self._host.ready:
            raise engine_not_ready()
        with self._enter(caller, len(request.content)) as place:
            await caller.admit()
            queued_ns = tracing.now_ns()
            while (position := await place.next_position()) is not None:
                yield converters.queued(position)
            if (span := tracing.current()) is not None:
                span.past("queue", queued_ns)
            async with Rendering(self._limits) as rendering:
                page_count = await rendering.open(request.content)
                request.ClearField("content")
                pages = converters.pages_of(options, page_count, max_pages=self._settings.max_document_pages)
                self._places.check_deadline(place, page_count=len(pages), time_left_s=caller.time_left())
                plan = Plan(pages, options.dpi, model.name, decoding, options.min_confidence, options.rotation)
                reader = Reader(
                    self._host,
                    rendering,
                    plan,
                    priority=caller.priority,
                    executor=self._executor,
                    lines_in_flight=self._settings.document_lines_in_flight,
                    max_page_lines=self._settings.max_page_lines,
                    wait_ready_s=self._settings.engine_start_s,
                )
                whole = pages == tuple(range(1, page_count + 1))
                origin = Origin(model.name, __version__, datetime.now(UTC), len(pages))
                with _Files(options.formats, origin, self._executor) as files:
                    async with contextlib.aclosing(self._reading(reader, plan, model, files, place)) as reading:
                        async for response in reading:
                            yield response
                    summary = reader.tally.summary()
                    async with contextlib.aclosing(files.chunks(summary, rendering, whole=whole)) as chunks:
                        async for response in chunks:
                            yield response
            place.completed = True
            yield converters.result(summary, queue_ms=place.queue_ms, engine_ms=place.run_ms)

    def _enter(self, caller: Caller, size_bytes: int) -> Place:
        try:
            return self._places.enter(priority=caller.priority, time_left_s=caller.time_left(), size_bytes=size_bytes)
        except Fault as fault:
            self._refused.labels(fault.data.reason).inc()
            raise

    async def _reading(
        self, reader: Reader, plan: Plan, model: ModelInfo, files: "_Files", place: Place
    ) -> AsyncGenerator[ocr_pb2.ReadDocumentResponse, None]:
        course = Course(len(plan.pages))

        def progress() -> ocr_pb2.ReadDocumentResponse:
            return converters.progress(
                pages_done=course.pages_done,
                pages=course.page_count,
                lines_done=course.lines_done,
                lines=course.lines_found,
                eta_ms=course.eta_ms,
            )

        async with contextlib.aclosing(reader.events()) as events:
            async for event in events:
                match event:
                    case Taken():
                        yield converters.started(model)
                    case PageStarted(info):
                        course.pages_started += 1
                        course.lines_found += info.line_count
                        yield converters.page_started(event)
                        yield progress()
                    case LineDone(line=line, recognition=recognition, outcome=outcome):
                        course.lines_done += 1
                        self._count_reading(recognition, model)
                        self._metrics.lines.labels(model.name, outcome).inc()
                        if line is not None:
                            yield converters.line(event, line, model)
                        if course.due():
                            yield progress()
                    case PageDone(result):
                        course.pages_done += 1
                        self._metrics.pages.labels(model.name).inc()
                        await files.add(result)
                        yield converters.page(event, model)
                        yield progress()

    def _check_content(self, content: bytes) -> None:
        limit = self._settings.max_document_bytes
        if not content:
            raise faults.invalid_field(
                kinds.FIELD,
                f"it is empty; send the bytes of a {kinds.ACCEPTED}",
                reason="DOCUMENT_EMPTY",
            )
        if len(content) > limit:
            raise faults.too_large(
                kinds.FIELD,
                "DOCUMENT_TOO_LARGE",
                f"{len(content)} bytes are more than the limit of {limit}; send fewer pages a call",
                size_bytes=len(content),
                limit_bytes=limit,
            )
        if not kinds.is_recognised(content):
            raise faults.invalid_field(
                kinds.FIELD,
                f"it is not a document that can be read; accepted: {kinds.ACCEPTED}",
                reason="DOCUMENT_NOT_RECOGNISED",
            )


class _Files:
    """The exports of one document, in the order wanted."""

    def __init__(self, formats: tuple[exports.Format, ...], origin: Origin, executor: Executor) -> None:
        self._formats = formats
        self._written: dict[exports.Format, Export] = {
            wanted: exports.create(wanted, origin) for wanted in formats if wanted != "searchable_pdf"
        }
        self._texts: list[TextPage] = []
        self._executor = executor

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for export in self._written.values():
            export.close()

    async def add(self, page: PageResult) -> None:
        """Write a page into every file."""
        loop = asyncio.get_running_loop()
        for export in self._written.values():
            await loop.run_in_executor(self._executor, export.add, page)
        if "searchable_pdf" in self._formats:
            lines = tuple(TextLine(line.text, line.polygon) for line in page.lines)
            self._texts.append(TextPage(page.info.page, page.info.width, page.info.height, lines))

    async def chunks(
        self, summary: Summary, rendering: Rendering, *, whole: bool
    ) -> AsyncGenerator[ocr_pb2.ReadDocumentResponse, None]:
        """The finished files, one after another, in pieces."""
        for wanted in self._formats:
            if wanted == "searchable_pdf":
                pieces: Iterator[bytes]
                content = await rendering.searchable_pdf(tuple(self._texts), whole=whole)
                pieces = (content[i : i + _CHUNK_BYTES] for i in range(0, len(content), _CHUNK_BYTES))
                media_type = "application/pdf"
            else:
                export = self._written[wanted]
                export.finish(summary)
                pieces = export.pieces(_CHUNK_BYTES)
                media_type = export.media_type
            last: bytes | None = None
            for piece in pieces:
                if last is not None:
                    yield converters.export_chunk(wanted, media_type, last, is_last=False)
                last = piece
            yield converters.export_chunk(wanted, media_type, last or b"", is_last=True)
