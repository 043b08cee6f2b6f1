"""Reading documents with both clients."""

from pathlib import Path
from typing import Any

import pytest

import inkwell
from inkwell.converters.document import page_ranges
from inkwell.files import load
from inkwell.ocr.v1 import ocr_pb2
from services.kit import faults
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer
from tests.unit.inkwell.test_aio_client import set_event

LETTER = b"Dear Ada,\nall is well.\n\nYours\fP.S.\n?"


def test_a_document_has_its_pages_lines_and_text(client: inkwell.Client) -> None:
    document = client.read_document(LETTER)
    assert document.text == "Dear Ada,\nall is well.\n\nYours\n\fP.S.\n?"
    assert [page.page for page in document.pages] == [1, 2]
    assert [line.order for line in document.pages[0].lines] == [1, 2, 3]
    assert [line.block for line in document.pages[0].lines] == [1, 1, 2]
    assert (document.page_count, document.line_count) == (2, 5)
    assert (document.dropped_line_count, document.blank_line_count) == (0, 2)
    assert document.confidence == 0.5
    assert document.timing == inkwell.Timing(1, 500)
    assert document.served_by == inkwell.ServedBy("cpu", "torch", "pool-a", "10.0.0.1:1")
    assert document.exports == {}
    page = document.pages[0]
    assert (page.width, page.height, page.dpi, page.rotation, page.skew) == (800, 600, 200, 90, 1.5)
    line = page.lines[1]
    assert line.text == "all is well."
    assert line.polygon == ((10, 80), (400, 80), (400, 110.5), (10, 110.5))
    assert (line.angle, line.detection_score) == (-1.5, 0.875)
    assert (line.confidence, line.reading.confidence_calibrated) == (0.75, True)
    assert line.reading.served_by == document.served_by
    assert [line.text for line in document.lines] == ["Dear Ada,", "all is well.", "Yours", "P.S.", "?"]


def test_lines_keep_the_tokens_that_came_with_each_alone(client: inkwell.Client) -> None:
    document = client.read_document(b"ab\ncd")
    assert ["".join(token.text for token in line.reading.tokens) for line in document.lines] == ["ab", "cd"]


def test_documents_come_from_files_too(client: inkwell.Client, tmp_path: Path) -> None:
    (tmp_path / "letter.pdf").write_bytes(LETTER)
    assert client.read_document(tmp_path / "letter.pdf").page_count == 2
    assert client.read_document(str(tmp_path / "letter.pdf")).page_count == 2
    with pytest.raises(FileNotFoundError):
        client.read_document(tmp_path / "missing.pdf")


def test_only_options_that_were_given_are_sent(client: inkwell.Client, server: InkwellServer) -> None:
    client.read_document(b"a")
    client.read_document(
        b"a\fb\fc", pages="2-,1", dpi=300, min_confidence=0.25, orientation=0, export=["hocr", "pdf", "hocr"],
        model="m", languages=["fr", "de"], beam_width=2, early_stopping="first", no_repeat_ngram_size=3,
    )  # fmt: skip
    plain, full = server.requests
    assert [field.name for field, _ in plain.ListFields()] == ["content"]
    assert [(each.first_page, each.last_page) for each in full.page_ranges] == [(2, 0), (1, 1)]
    assert (full.dpi, full.min_confidence, full.orientation) == (300, 0.25, ocr_pb2.PAGE_ORIENTATION_UPRIGHT)
    assert list(full.export_formats) == [ocr_pb2.EXPORT_FORMAT_HOCR, ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF]
    assert (full.model, list(full.language_hints)) == ("m", ["fr", "de"])
    assert (full.decoding.beam_width, full.decoding.no_repeat_ngram_size) == (2, 3)
    assert full.decoding.early_stopping == ocr_pb2.EARLY_STOPPING_FIRST


@pytest.mark.parametrize(
    ("pages", "ranges"),
    [
        (None, []),
        ("", []),
        ("3", [(3, 3)]),
        ("1-3, 7 ,9-", [(1, 3), (7, 7), (9, 0)]),
        ("2 - 4", [(2, 4)]),
        ([4, 2], [(4, 4), (2, 2)]),
    ],
)
def test_pages_are_written_as_in_print_dialogs(pages: Any, ranges: list[tuple[int, int]]) -> None:
    assert page_ranges(pages) == ranges


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("pages", "one", "'one' is no page"),
        ("pages", "-3", "no page"),
        ("pages", "1-2-3", "no page"),
        ("pages", ["1"], "page numbers expected"),
        ("pages", 3, "several expected"),
        ("orientation", 45, "0, 90, 180, 270 or None"),
        ("export", "docx", "'docx' is none of text, json, hocr, alto, page-xml, pdf"),
        ("export", [7], "7 is none of"),
        ("dpi", 2**31, "whole number"),
        ("languages", [1], "BCP 47"),
        ("languages", 1, "several expected"),
        ("early_stopping", "soon", "first, heuristic, never"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    client: inkwell.Client, server: InkwellServer, option: str, value: object, says: str
) -> None:
    with pytest.raises(inkwell.InvalidRequest, match=says) as raised:
        client.read_document(b"a", **{option: value})  # type: ignore[arg-type]
    assert raised.value.fields[0].field.endswith(option)
    assert not server.requests


def test_exports_are_put_together_and_saved(client: inkwell.Client, tmp_path: Path) -> None:
    document = client.read_document(LETTER, export=["page_xml", "text"])
    assert list(document.exports) == ["page-xml", "text"]
    export = document.exports["page-xml"]
    assert export.content == b"<EXPORT_FORMAT_PAGE_XML> of " + LETTER
    assert (export.format, export.media_type) == (inkwell.ExportFormat.PAGE_XML, "application/zip")
    assert export.save(tmp_path / "letter.zip").read_bytes() == export.content


def test_events_come_in_order_and_end_with_the_document(client: inkwell.Client) -> None:
    events = list(client.read_document_stream(b"a\nb", export="hocr"))
    assert [type(event).__name__ for event in events] == [
        "Queued", "Started", "PageStarted", "LineRead", "DocumentProgress", "LineRead", "DocumentProgress", "PageRead",
        "ExportReady", "DocumentResult",
    ]  # fmt: skip
    started, line, progress, page, result = events[2], events[3], events[4], events[7], events[-1]
    assert isinstance(started, inkwell.PageStarted)
    assert (started.page.line_count, started.page.lines) == (2, ())
    assert isinstance(line, inkwell.LineRead)
    assert (line.page, line.line.text) == (1, "b")
    assert progress == inkwell.DocumentProgress(5, 0, 1, 1, 2, 1000)
    assert isinstance(page, inkwell.PageRead)
    assert isinstance(result, inkwell.DocumentResult)
    assert result.document.pages == (page.page,)


def test_events_may_be_watched_while_reading(client: inkwell.Client) -> None:
    seen: list[inkwell.DocumentEvent] = []
    document = client.read_document(b"a", on_event=seen.append)
    assert isinstance(seen[-1], inkwell.DocumentResult)
    assert seen[-1].document is document


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"gap", "SEQUENCE_BROKEN"),
        (b"lost page", "PAGES_MISSING"),
        (b"cut export", "EXPORT_BROKEN"),
        (b"mixed exports", "EXPORT_BROKEN"),
    ],
)
def test_a_stream_that_does_not_add_up_is_the_servers_fault(
    client: inkwell.Client, content: bytes, reason: str
) -> None:
    with pytest.raises(inkwell.InternalError) as raised:
        client.read_document(content, export="hocr")
    assert raised.value.reason == reason


def test_a_stream_without_a_result_is_the_servers_fault(client: inkwell.Client, server: InkwellServer) -> None:
    server.end_without_result = True
    with pytest.raises(inkwell.InternalError, match="without a result"):
        client.read_document(b"a")


def test_a_refused_document_says_why(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest, match="no PDF") as raised:
        client.read_document(b"bad")
    assert (raised.value.reason, raised.value.fields[0].field) == ("BAD_FILE", "content")


def test_a_document_that_waits_is_tried_again(client: inkwell.Client, server: InkwellServer) -> None:
    server.fail_next.append(faults.unavailable("LOADING", "loads", retry_after_ms=1))
    assert client.read_document(b"a").text == "a"


def test_closing_the_iterator_cancels_the_call_at_the_server(client: inkwell.Client, server: InkwellServer) -> None:
    for event in (events := client.read_document_stream(b"hold\fb")):
        if isinstance(event, inkwell.PageRead):
            break
    assert server.held.wait(TIMEOUT_S)
    events.close()
    assert server.cancelled.wait(TIMEOUT_S)


def test_a_file_too_long_for_any_request_is_refused_unread(
    client: inkwell.Client, server: InkwellServer, tmp_path: Path
) -> None:
    huge = tmp_path / "huge.pdf"
    with huge.open("wb") as file:
        file.truncate(1 << 31)  # takes no room on the disk
    with pytest.raises(inkwell.TooLarge, match="2147483648 bytes; at most 2147479551") as raised:
        client.read_document(huge)
    assert (raised.value.reason, raised.value.fields[0].field) == ("MESSAGE_TOO_LARGE", "content")
    assert not server.requests
    with pytest.raises(inkwell.TooLarge, match="at most 3"):
        load(memoryview(bytes(4)), most=3)
    assert load(bytearray(b"abc"), most=3) == b"abc"


async def test_the_asyncio_client_reads_the_same(aio_client: inkwell.AsyncClient, client: inkwell.Client) -> None:
    options: dict[str, Any] = {"pages": "2,1", "export": ["alto"], "min_confidence": 0.2}
    document = await aio_client.read_document(LETTER, **options)
    assert document == client.read_document(LETTER, **options)
    assert (document.text, document.dropped_line_count) == ("P.S.\n\fDear Ada,\nall is well.\n\nYours", 1)
    events = [event async for event in aio_client.read_document_stream(LETTER, **options)]
    assert events == list(client.read_document_stream(LETTER, **options))


async def test_closing_the_asyncio_iterator_cancels_the_call_too(
    aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    events = aio_client.read_document_stream(b"hold\fb")
    async for event in events:
        if isinstance(event, inkwell.PageRead):
            break
    await set_event(server.held)
    await events.aclose()
    await set_event(server.cancelled)


async def test_a_file_that_cannot_be_read_is_an_oserror(aio_client: inkwell.AsyncClient, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await aio_client.read_document(tmp_path / "missing.pdf")
