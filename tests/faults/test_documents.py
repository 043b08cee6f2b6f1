"""Documents that are wrong, hostile or too large, and processes that are killed while a document is read."""

import asyncio
import contextlib
import os
import signal
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image

from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit.server import ServiceServer
from services.kit.settings import MIB
from services.ocr.__main__ import build
from services.ocr.documents import render_worker
from services.ocr.settings import Settings
from tests.support.documents import Told, alike, bare_pdf, encoded, encrypted_pdf, pdf, tiff, written

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_PAGES, MAX_PIXELS, MAX_LINES, MAX_BYTES = 5, 1_000_000, 4, 4 * MIB


@dataclass
class Service:
    server: ServiceServer
    stub: Any

    def call(self, content: bytes, **fields: Any) -> Any:
        return self.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content, **fields))

    async def read(self, content: bytes, **fields: Any) -> Told:
        return Told([response async for response in self.call(content, **fields)])

    async def refusal(self, content: bytes, **fields: Any) -> status_pb2.Status:
        """The google.rpc.Status that reading it ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.read(content, **fields)
        status = rpc_status.from_call(caught.value)
        assert status is not None, caught.value
        return status


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Service]:
    # One slot and one place in the queue: a document's second line has to wait and come again.
    server = build(
        Settings(
            port=0,
            threads=1,
            max_jobs=1,
            queue_limit=1,
            documents_at_a_time=1,
            document_queue_limit=1,
            max_document_pages=MAX_PAGES,
            max_page_pixels=MAX_PIXELS,
            max_page_lines=MAX_LINES,
            max_document_bytes=MAX_BYTES,
            document_memory_bytes=512 * MIB,
            document_step_s=2,
        )
    )
    await server.start()
    try:
        await server.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Service(server, ocr_pb2_grpc.OcrServiceStub(channel))
    finally:
        await server.stop(0)


def detail(status: status_pb2.Status, kind: type[Message]) -> Any:
    """The detail of that type; fails if it is not there exactly once."""
    (packed,) = [d for d in status.details if d.Is(kind.DESCRIPTOR)]
    message = kind()
    packed.Unpack(message)
    return message


def white(width: int, height: int) -> bytes:
    return encoded(Image.new("1", (width, height), 1))


def slow_pdf() -> bytes:
    """A small file that takes minutes to draw: a page filled again and again."""
    fills = zlib.compress(b"0 0 m 9 600 500 3 700 700 c 3 500 600 9 0 0 c f\n" * 400_000, 9)
    return bare_pdf(media_box="0 0 700 700").replace(
        b"<< /Length 0 >>\nstream\n\nendstream",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(fills), fills),
    )


def pages(first: int, last: int = 0) -> list[ocr_pb2.PageRange]:
    return [ocr_pb2.PageRange(first_page=first, last_page=last)]


INVALID, EXHAUSTED = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"
TEN_THOUSAND = bare_pdf(pages=10_000)
NAN = float("nan")
# What is wrong: content, other fields; code, reason, field, and what the message has to say.
BAD: dict[str, tuple[bytes, dict[str, Any], str, str, str, str]] = {
    "empty": (b"", {}, INVALID, "DOCUMENT_EMPTY", "content", "PDF, or one image"),
    "unknown": (b"words, just words", {}, INVALID, "DOCUMENT_NOT_RECOGNISED", "content", "PDF, or one image"),
    "called a PDF": (
        b"PK\x03\x04 a word processor's",
        {"media_type": "application/pdf"},
        INVALID,
        "DOCUMENT_NOT_RECOGNISED",
        "content",
        "accepted",
    ),
    "too many bytes": (
        b"%PDF-1.7" + bytes(MAX_BYTES),
        {},
        EXHAUSTED,
        "DOCUMENT_TOO_LARGE",
        "content",
        f"limit of {MAX_BYTES}",
    ),
    "password": (encrypted_pdf(), {}, INVALID, "DOCUMENT_ENCRYPTED", "content", "password"),
    "no PDF inside": (b"%PDF-1.7\nnothing", {}, INVALID, "DOCUMENT_DAMAGED", "content", "damaged"),
    "half a PDF": (pdf([written(0).image])[:600], {}, INVALID, "DOCUMENT_DAMAGED", "content", "damaged"),
    "no pages": (bare_pdf(pages=0), {}, INVALID, "DOCUMENT_DAMAGED", "content", "damaged"),
    "half a TIFF": (
        tiff([written(0).image] * 2)[:-2000],
        {},
        INVALID,
        "DOCUMENT_DAMAGED",
        "content",
        "TIFF",
    ),
    "half a photo": (encoded(written(0).image, "JPEG")[:3000], {}, INVALID, "DOCUMENT_DAMAGED", "content", "JPEG"),
    "10,000 pages": (TEN_THOUSAND, {}, EXHAUSTED, "DOCUMENT_TOO_MANY_PAGES", "page_ranges", "10000 pages"),
    "6 of 10,000": (
        TEN_THOUSAND,
        {"page_ranges": pages(9_995)},
        EXHAUSTED,
        "DOCUMENT_TOO_MANY_PAGES",
        "page_ranges",
        f"select 6 pages, more than the {MAX_PAGES}",
    ),
    "no such page": (
        bare_pdf(pages=3),
        {"page_ranges": pages(2, 4)},
        INVALID,
        "PAGE_OUT_OF_RANGE",
        "page_ranges[0].last_page",
        "no page 4; it has 3",
    ),
    "page twice": (
        bare_pdf(pages=3),
        {"page_ranges": pages(1, 2) + pages(2)},
        INVALID,
        "INVALID_FIELD",
        "page_ranges",
        "page 2 is in more than one range",
    ),
    "page 0": (
        bare_pdf(),
        {"page_ranges": pages(0, 1)},
        INVALID,
        "INVALID_FIELD",
        "page_ranges[0].first_page",
        "count from 1",
    ),
    "backwards": (
        bare_pdf(pages=3),
        {"page_ranges": pages(3, 2)},
        INVALID,
        "INVALID_FIELD",
        "page_ranges[0].last_page",
        "before first_page",
    ),
    "many ranges": (bare_pdf(), {"page_ranges": pages(1) * 6}, INVALID, "INVALID_FIELD", "page_ranges", "6 ranges"),
    "71 dpi": (bare_pdf(), {"dpi": 71}, INVALID, "INVALID_FIELD", "dpi", "72 to 600"),
    "601 dpi": (bare_pdf(), {"dpi": 601}, INVALID, "INVALID_FIELD", "dpi", "72 to 600"),
    "confidence 2": (bare_pdf(), {"min_confidence": 2}, INVALID, "INVALID_FIELD", "min_confidence", "0 to 1"),
    "no number": (bare_pdf(), {"min_confidence": NAN}, INVALID, "INVALID_FIELD", "min_confidence", "0 to 1"),
    "format twice": (bare_pdf(), {"export_formats": [2, 2]}, INVALID, "INVALID_FIELD", "export_formats", "_TEXT"),
    "format 77": (bare_pdf(), {"export_formats": [77]}, INVALID, "INVALID_FIELD", "export_formats", "77 is none of"),
    "orientation 9": (bare_pdf(), {"orientation": 9}, INVALID, "INVALID_FIELD", "orientation", "9 is none of"),
    "beam width 1,000": (
        bare_pdf(),
        {"decoding": ocr_pb2.DecodingOptions(beam_width=1000)},
        INVALID,
        "INVALID_FIELD",
        "decoding.beam_width",
        "1 to 16",
    ),
    "unknown model": (bare_pdf(), {"model": "gpt"}, "NOT_FOUND", "MODEL_NOT_FOUND", "model", "handwriting-tiny"),
    "a page too large": (
        bare_pdf(pages=2, media_box="0 0 720 720"),
        {"dpi": 600, "page_ranges": pages(2)},
        EXHAUSTED,
        "PAGE_TOO_MANY_PIXELS",
        "content",
        f"page 2 has 6000x6000 pixels, 36000000, more than the limit of {MAX_PIXELS};"
        " 600 dpi were asked for, at 100 dpi it would fit",
    ),
    "far too large": (
        bare_pdf(media_box="0 0 14400 14400"),
        {},
        EXHAUSTED,
        "PAGE_TOO_MANY_PIXELS",
        "content",
        "does not fit at 72 dpi either",
    ),
    "200 megapixels": (
        white(20_000, 10_000),
        {},
        EXHAUSTED,
        "PAGE_TOO_MANY_PIXELS",
        "content",
        "page 1 has 20000x10000 pixels, 200000000",
    ),
    "1x1": (white(1, 1), {}, INVALID, "PAGE_TOO_SMALL", "content", "at least 4"),
    "a tiny page": (bare_pdf(media_box="0 0 1 1"), {}, INVALID, "PAGE_TOO_SMALL", "content", "page 1 has 3x3"),
    "too many lines": (
        encoded(written(0, 1, 2, 3, 4, 5).image),
        {},
        EXHAUSTED,
        "PAGE_TOO_MANY_LINES",
        "content",
        f"more than the limit of {MAX_LINES}",
    ),
    "endless drawing": (slow_pdf(), {"dpi": 100}, INVALID, "DOCUMENT_DAMAGED", "content", "more than 2 s"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_documents_are_refused_precisely_and_the_service_goes_on(service: Service, name: str) -> None:
    content, fields, code, reason, field, says = BAD[name]
    status = await service.refusal(content, **fields)
    assert status.code == getattr(grpc.StatusCode, code).value[0], status
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, "inkwell.dev")
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [field]
    assert says in status.message
    # It will never fit, so nothing says that a retry may help.
    assert not any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details)
    assert service.server.metrics.registry.get_sample_value("inkwell_documents", {"state": "running"}) == 0


async def test_every_wrong_option_is_named_at_once(service: Service) -> None:
    fields = {"dpi": -1, "min_confidence": -0.5, "orientation": 8, "export_formats": [1, 1], "page_ranges": pages(-4)}
    violations = detail(await service.refusal(bare_pdf(), **fields), error_details_pb2.BadRequest).field_violations
    assert {violation.field for violation in violations} == {
        "dpi",
        "min_confidence",
        "orientation",
        "export_formats",
        "page_ranges[0].first_page",
    }


async def test_few_pages_of_a_long_document_can_be_read(service: Service) -> None:
    told = await service.read(TEN_THOUSAND, page_ranges=pages(9_999), dpi=72)
    assert [page.page.page for page in told.pages] == [9_999, 10_000]


async def test_noise_is_read_without_harm(service: Service) -> None:
    noise = Image.effect_noise((400, 300), 120)
    told = await service.read(encoded(noise))
    assert told.result.page_count == 1


async def test_lines_that_find_the_queue_full_come_again(service: Service) -> None:
    page = written(0, 1, 2, 6)
    told = await service.read(encoded(page.image))
    assert alike(told.texts(), page.texts)


async def test_a_document_beyond_the_queue_is_refused_before_any_header(service: Service) -> None:
    content = tiff([written(0, 1, 2, 6).image] * 2)
    first, second = service.call(content), service.call(content)
    async for response in first:
        if response.HasField("started"):
            break
    assert (await anext(aiter(second))).HasField("queued")
    third = service.call(content)
    status = rpc_status.from_call((await asyncio.gather(third.read(), return_exceptions=True))[0])
    assert detail(status, error_details_pb2.ErrorInfo).reason == "QUEUE_FULL"
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert dict(await third.trailing_metadata())["grpc-retry-pushback-ms"]
    assert not await third.initial_metadata()
    registry = service.server.metrics.registry
    assert registry.get_sample_value("inkwell_refused_total", {"reason": "QUEUE_FULL"}) == 1
    first.cancel()
    assert Told([response async for response in second]).result.page_count == 2


# --- processes that end ---


def render_processes() -> list[psutil.Process]:
    """Those that still live."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended while it was looked at
            if process.status() != psutil.STATUS_ZOMBIE and render_worker.__name__ in process.cmdline():
                found.append(process)
    return found


async def test_a_render_process_that_dies_ends_its_document_only(service: Service) -> None:
    async def read_and_kill() -> None:
        async for response in service.call(tiff([written(0, 1).image] * 5)):
            if response.HasField("started"):
                (process,) = render_processes()
                process.send_signal(signal.SIGSEGV)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_and_kill()
    status = rpc_status.from_call(caught.value)
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert detail(status, error_details_pb2.ErrorInfo).reason == "DOCUMENT_DAMAGED"
    assert not render_processes()
    assert (await service.read(encoded(written(1).image))).result.line_count == 1


async def test_no_render_process_outlives_its_document(service: Service) -> None:
    await service.read(encoded(written(1).image))
    call = service.call(tiff([written(0, 1).image] * 5))
    async for response in call:
        if response.HasField("started"):
            assert len(render_processes()) == 1
            break
    call.cancel()
    async with asyncio.timeout(60):
        while render_processes():  # noqa: ASYNC110 - its end is only seen from outside
            await asyncio.sleep(0.005)


async def test_a_document_survives_the_engine_being_killed(service: Service) -> None:
    host = service.server.host
    assert host is not None
    written_pages = [written(0, 1, 2), written(6, 3), written(5)]
    killed: int | None = None
    responses = []
    async for response in service.call(tiff([page.image for page in written_pages])):
        responses.append(response)
        if response.HasField("line") and killed is None:
            killed = host.pid
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
    told = Told(responses)
    assert host.pid != killed
    assert [response.sequence for response in responses] == list(range(1, len(responses) + 1))
    assert told.kinds.count("started") == 1
    assert told.kinds.count("line") == 6  # each once
    for number, page in enumerate(written_pages):
        assert alike(told.texts(number), page.texts)
