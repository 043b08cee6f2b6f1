"""ReadDocument as its callers see it: real server and engine, the embedded model, pages of its own samples."""

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pypdfium2 as pdfium
import pytest
import pytest_asyncio
from lxml import etree
from PIL import Image

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit.server import ServiceServer
from services.ocr.__main__ import build
from services.ocr.settings import Settings
from tests.support.documents import SAMPLES, Told, alike, encoded, pdf, tiff, written

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
ALL_FORMATS = [
    ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF,
    ocr_pb2.EXPORT_FORMAT_JSON,
    ocr_pb2.EXPORT_FORMAT_PAGE_XML,
    ocr_pb2.EXPORT_FORMAT_TEXT,
    ocr_pb2.EXPORT_FORMAT_ALTO,
    ocr_pb2.EXPORT_FORMAT_HOCR,
]


@dataclass
class Service:
    server: ServiceServer
    stub: Any

    async def read(self, content: bytes, **fields: Any) -> Told:
        call = self.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content, **fields))
        return Told([response async for response in call])

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Service]:
    server = build(Settings(port=0, threads=1, documents_at_a_time=1, document_lines_in_flight=2))
    await server.start()
    try:
        await server.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Service(server, ocr_pb2_grpc.OcrServiceStub(channel))
    finally:
        await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(service: Service) -> Told:
    """Two pages, the second lying on its side, in every format."""
    second = written(3, 6).image.transpose(Image.Transpose.ROTATE_90)
    content = pdf([written(0, 1).image, second])
    return await service.read(content, dpi=100, export_formats=ALL_FORMATS)


async def until(stream: AsyncIterator[ocr_pb2.ReadDocumentResponse], kind: str) -> ocr_pb2.ReadDocumentResponse:
    """The next response of a kind; those before it are passed over."""
    async for response in stream:
        if response.WhichOneof("event") == kind:
            return response
    raise AssertionError(f"the stream ended without {kind}")


# --- the stream ---


async def test_a_pdf_is_read_page_by_page_and_line_by_line(service: Service) -> None:
    pages = [written(0, 1, 2), written(3, 6)]
    told = await service.read(pdf([page.image for page in pages]), dpi=100)
    assert [response.sequence for response in told.responses] == list(range(1, len(told.responses) + 1))
    assert told.kinds[0] == "started"
    assert told.all("started")[0].model == "handwriting-tiny"
    assert [page.page.page for page in told.pages] == [1, 2]
    for number, page in enumerate(pages, 1):
        begun = (
            told.kinds.index("page_started")
            if number == 1
            else len(told.kinds) - told.kinds[::-1].index("page_started") - 1
        )
        done = next(i for i, r in enumerate(told.responses) if r.HasField("page") and r.page.page.page == number)
        lines = {i: r.line for i, r in enumerate(told.responses) if r.HasField("line") and r.line.page == number}
        assert all(begun < place < done for place in lines)
        assert alike(told.texts(number - 1), page.texts)
        in_order = sorted((read.line for read in lines.values()), key=lambda line: line.order)
        assert [line.order for line in in_order] == list(range(1, len(page.texts) + 1))
        # The page tells the lines again, without their tokens.
        for line, again in zip(in_order, told.pages[number - 1].lines, strict=True):
            assert line.recognition.hypotheses[0].tokens
            line.recognition.hypotheses[0].ClearField("tokens")
            assert again == line
    assert (told.result.page_count, told.result.line_count) == (2, 5)
    assert (told.result.dropped_line_count, told.result.blank_line_count) == (0, 0)
    assert told.result.timing.engine_ms > 0
    last = told.all("progress")[-1]
    assert (last.page_done_count, last.page_count) == (2, 2)
    assert (last.line_done_count, last.line_count, last.eta_ms) == (5, 5, 0)


async def test_lines_lie_where_they_were_written(service: Service) -> None:
    page = written(1, 4)
    told = await service.read(encoded(page.image))
    (read,) = told.pages
    assert (read.page.width, read.page.height, read.page.rotation) == (*page.image.size, 0)
    for line, (left, top, right, bottom) in zip(read.lines, page.boxes, strict=True):
        assert abs(line.angle) < 2
        for point in line.polygon:
            assert left - 8 <= point.x <= right + 8
            assert top - 8 <= point.y <= bottom + 8
        assert max(p.x for p in line.polygon) - min(p.x for p in line.polygon) > 0.8 * (right - left)


@pytest.mark.parametrize("turned", [90, 180, 270])
async def test_turned_pages_are_recognised_and_read_in_order(service: Service, turned: int) -> None:
    page = written(2, 5, 6)
    told = await service.read(encoded(page.image.rotate(-turned, expand=True)))
    (read,) = told.pages
    assert (read.page.rotation + turned) % 360 == 0
    assert alike(told.texts(), page.texts)
    # The text begins at its own top left, wherever that lies on the page as it came.
    first = read.lines[0].polygon[0]
    x, y = page.boxes[0][0], page.boxes[0][1]
    width, height = page.image.size
    where = {90: (height - y, x), 180: (width - x, height - y), 270: (y, width - x)}[turned]
    assert (first.x, first.y) == pytest.approx(where, abs=25)


async def test_a_stated_orientation_is_believed(service: Service) -> None:
    page = written(2, 6)
    told = await service.read(encoded(page.image.rotate(180)), orientation=ocr_pb2.PAGE_ORIENTATION_180)
    assert told.pages[0].page.rotation == 180
    assert alike(told.texts(), page.texts)
    wrong = await service.read(encoded(page.image), orientation=ocr_pb2.PAGE_ORIENTATION_180)
    assert wrong.pages[0].page.rotation == 180
    assert not alike(wrong.texts(), page.texts)


async def test_pages_of_a_tiff_come_in_the_order_asked_for(service: Service) -> None:
    pages = [written(0), written(1), written(3)]
    ranges = [ocr_pb2.PageRange(first_page=3), ocr_pb2.PageRange(first_page=1, last_page=1)]
    told = await service.read(tiff([page.image for page in pages]), page_ranges=ranges, media_type="application/pdf")
    assert [page.page.page for page in told.pages] == [3, 1]
    assert told.pages[0].page.dpi == 150
    assert alike(told.texts(0) + told.texts(1), [pages[2].texts[0], pages[0].texts[0]])


async def test_a_photo_is_turned_upright_by_its_exif_orientation(service: Service) -> None:
    page = written(1, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(page.image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    told = await service.read(photo)
    assert (told.pages[0].page.width, told.pages[0].page.height) == page.image.size
    assert told.pages[0].page.rotation == 0
    assert alike(told.texts(), page.texts)


async def test_lines_below_the_wanted_confidence_are_counted_and_left_out(service: Service) -> None:
    content = encoded(written(0, 7, 5).image)
    everything = await service.read(content)
    confidences = [line.recognition.confidence for line in everything.pages[0].lines]
    worst = min(confidences)
    assert confidences.count(worst) == 1
    formats = [ocr_pb2.EXPORT_FORMAT_TEXT]
    told = await service.read(content, min_confidence=worst + 1e-4, export_formats=formats)
    kept = [order for order, confidence in enumerate(confidences, 1) if confidence != worst]
    assert [line.order for line in told.pages[0].lines] == kept
    assert sorted(read.line.order for read in told.all("line")) == kept
    assert (told.result.line_count, told.result.dropped_line_count) == (2, 1)
    assert told.pages[0].page.line_count == 3
    assert told.export(ocr_pb2.EXPORT_FORMAT_TEXT).decode().splitlines() == told.texts()


async def test_an_empty_page_is_a_page_without_lines(service: Service) -> None:
    told = await service.read(encoded(Image.new("L", (600, 400), 255)), export_formats=ALL_FORMATS)
    assert [len(page.lines) for page in told.pages] == [0]
    assert (told.result.page_count, told.result.line_count, told.result.confidence) == (1, 0, 0)
    assert told.export(ocr_pb2.EXPORT_FORMAT_TEXT) == b""
    validate("alto-4-3.xsd", told.export(ocr_pb2.EXPORT_FORMAT_ALTO))
    validate("pagecontent-2019-07-15.xsd", told.export(ocr_pb2.EXPORT_FORMAT_PAGE_XML))
    assert len(pdfium.PdfDocument(told.export(ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF))) == 1


async def test_options_of_decoding_reach_the_lines(service: Service) -> None:
    decoding = ocr_pb2.DecodingOptions(beam_width=3, hypothesis_count=2)
    told = await service.read(encoded(written(1).image), decoding=decoding)
    assert len(told.pages[0].lines[0].recognition.hypotheses) == 2


async def test_pages_and_lines_are_counted(service: Service) -> None:
    def counted() -> tuple[float, float, float]:
        model = "handwriting-tiny"
        return (
            service.metric("inkwell_document_pages_total", model=model),
            service.metric("inkwell_document_lines_total", model=model, outcome="read"),
            service.metric("inkwell_decode_tokens_total", model=model),
        )

    pages, lines, tokens = counted()
    await service.read(tiff([written(0).image, written(1, 2).image]))
    assert (counted()[0] - pages, counted()[1] - lines) == (2, 3)
    assert counted()[2] > tokens


# --- sharing ---


async def test_single_lines_are_not_held_up_by_documents_and_the_next_document_waits_its_turn(
    service: Service,
) -> None:
    content = tiff([written(0, 1, 2, 3, 4, 5, 6, 7).image] * 3)
    first = aiter(service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content)))
    await until(first, "line")
    second = aiter(service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=encoded(written(6).image))))
    assert (await anext(second)).queued.position == 0
    line = common_pb2.Image(content=(SAMPLES / "02-station.png").read_bytes())
    for _ in range(3):
        read = await service.stub.Recognize(ocr_pb2.RecognizeRequest(image=line))
        assert read.recognition.hypotheses[0].text
    # All three came back while the first document, with its 24 lines, still runs and the second has not begun.
    assert service.metric("inkwell_documents", state="running") == 1
    assert service.metric("inkwell_documents", state="waiting") == 1
    rest = Told([response async for response in first])
    assert len(rest.pages) == 3
    assert rest.result.line_count == 24
    later = Told([response async for response in second])
    assert later.kinds[0] == "started"
    assert later.result.timing.queue_ms > 0


async def test_a_document_never_holds_more_lines_in_the_engine_than_it_may(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = service.server.host
    assert host is not None
    most, admit = 0, host.admit

    def counting(**options: Any) -> Any:
        nonlocal most
        job = admit(**options)
        most = max(most, host.admission.waiting_count + host.admission.running_count)
        return job

    monkeypatch.setattr(host, "admit", counting)
    await service.read(tiff([written(0, 1, 2, 3, 4, 5).image] * 2))
    assert 1 < most <= 3  # two lines and a page


# --- exports ---


def validate(schema: str, content: bytes) -> Any:
    """The parsed document; fails with what is wrong with it."""
    root = etree.fromstring(content)
    etree.XMLSchema(etree.parse(SCHEMAS / schema)).assertValid(root)
    return root


async def test_exports_come_in_the_order_asked_for_in_pieces_that_any_client_takes(exported: Told) -> None:
    order = [chunk.format for chunk in exported.all("export")]
    assert list(dict.fromkeys(order)) == ALL_FORMATS
    assert order == sorted(order, key=ALL_FORMATS.index)
    assert all(len(chunk.content) <= 1 << 20 for chunk in exported.all("export"))
    assert exported.kinds.index("export") > len(exported.kinds) - exported.kinds[::-1].index("page") - 1


async def test_text(exported: Told) -> None:
    text = exported.export(ocr_pb2.EXPORT_FORMAT_TEXT).decode()
    assert [page.split("\n") for page in text.split("\f")] == [[*exported.texts(0), ""], [*exported.texts(1), ""]]


async def test_json_says_what_the_stream_says(exported: Told) -> None:
    document = json.loads(exported.export(ocr_pb2.EXPORT_FORMAT_JSON))
    assert document["model"] == "handwriting-tiny"
    assert (document["page_count"], document["line_count"]) == (2, 4)
    assert [page["rotation"] for page in document["pages"]] == [0, 90]
    streamed = {(read.page, read.line.order): read.line for read in exported.all("line")}
    for page in document["pages"]:
        for line in page["lines"]:
            told = streamed[page["page"], line["order"]]
            assert line["text"] == told.recognition.hypotheses[0].text
            for point, streamed_point in zip(line["polygon"], told.polygon, strict=True):
                assert (point["x"], point["y"]) == pytest.approx((streamed_point.x, streamed_point.y), abs=0.01)
            assert len(line["hypotheses"][0]["tokens"]) == len(told.recognition.hypotheses[0].tokens)


async def test_alto_is_valid_and_has_every_line(exported: Told) -> None:
    root = validate("alto-4-3.xsd", exported.export(ocr_pb2.EXPORT_FORMAT_ALTO))
    names = {"a": "http://www.loc.gov/standards/alto/ns-v4#"}
    for page, told in zip(root.findall(".//a:Page", names), exported.pages, strict=True):
        assert (page.get("WIDTH"), page.get("HEIGHT")) == (str(told.page.width), str(told.page.height))
        lines = page.findall(".//a:TextLine", names)
        words = [[word.get("CONTENT") for word in line.findall("a:String", names)] for line in lines]
        assert [" ".join(line) for line in words] == [read.recognition.hypotheses[0].text for read in told.lines]
        for line in lines:
            box = [float(line.get(name)) for name in ("HPOS", "VPOS", "WIDTH", "HEIGHT")]
            for word in line.findall("a:String", names):
                x, y, width, height = (float(word.get(name)) for name in ("HPOS", "VPOS", "WIDTH", "HEIGHT"))
                assert box[0] - 0.02 <= x <= x + width <= box[0] + box[2] + 0.03
                assert box[1] - 0.02 <= y <= y + height <= box[1] + box[3] + 0.03
    upright, lying = root.findall(".//a:TextBlock", names)
    assert abs(float(upright.get("ROTATION", "0"))) < 2
    assert float(lying.get("ROTATION")) == pytest.approx(90, abs=2)


async def test_page_xml_is_valid_and_has_every_line(exported: Told) -> None:
    archive = zipfile.ZipFile(io.BytesIO(exported.export(ocr_pb2.EXPORT_FORMAT_PAGE_XML)))
    assert archive.namelist() == ["page-0001.xml", "page-0002.xml"]
    names = {"p": "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"}
    for name, told in zip(archive.namelist(), exported.pages, strict=True):
        root = validate("pagecontent-2019-07-15.xsd", archive.read(name))
        lines = root.findall(".//p:TextLine", names)
        assert [line.findtext("p:TextEquiv/p:Unicode", None, names) for line in lines] == [
            line.recognition.hypotheses[0].text for line in told.lines
        ]
        coordinates = lines[0].find("p:Coords", names).get("points")
        assert coordinates == " ".join(f"{round(p.x)},{round(p.y)}" for p in told.lines[0].polygon)
        assert float(root.find("p:Page", names).get("orientation", "0")) == pytest.approx(told.page.rotation, abs=2)


async def test_hocr_has_what_the_specification_asks_for(exported: Told) -> None:
    root = etree.fromstring(exported.export(ocr_pb2.EXPORT_FORMAT_HOCR))
    names = {"h": "http://www.w3.org/1999/xhtml"}
    metas = {meta.get("name"): meta.get("content") for meta in root.findall(".//h:meta", names)}
    assert metas["ocr-system"].startswith("inkwell ")
    declared = set(metas["ocr-capabilities"].split())
    used = {element.get("class") for element in root.findall(".//*[@class]")}
    assert used == declared
    pages = root.findall(".//h:div[@class='ocr_page']", names)
    for number, (page, told) in enumerate(zip(pages, exported.pages, strict=True)):
        properties = page.get("title").split("; ")
        assert f"bbox 0 0 {told.page.width} {told.page.height}" in properties
        assert f"ppageno {number}" in properties
        lines = page.findall(".//h:span[@class='ocr_line']", names)
        for line, read in zip(lines, told.lines, strict=True):
            words = line.findall("h:span[@class='ocrx_word']", names)
            assert " ".join(word.text for word in words) == read.recognition.hypotheses[0].text
            assert all("x_wconf" in word.get("title") for word in words)
            left, top, right, bottom = map(int, line.get("title").split(";")[0].split()[1:])
            assert left <= min(p.x for p in read.polygon) <= max(p.x for p in read.polygon) <= right
            assert top <= min(p.y for p in read.polygon) <= max(p.y for p in read.polygon) <= bottom
    title = root.findall(".//h:span[@class='ocr_line']", names)[-1].get("title")
    assert float(title.rpartition("textangle ")[2]) == pytest.approx(90, abs=2)  # counter-clockwise


def found_at(document: pdfium.PdfDocument, page: int, text: str) -> tuple[float, float, float, float]:
    """Where a text begins and ends on a page: the boxes of its first and last character, as one box in points."""
    textpage = document[page].get_textpage()
    hit = textpage.search(text, match_case=True).get_next()
    assert hit is not None, textpage.get_text_bounded()
    first, last = textpage.get_charbox(hit[0]), textpage.get_charbox(hit[0] + hit[1] - 1)
    return min(first[0], last[0]), min(first[1], last[1]), max(first[2], last[2]), max(first[3], last[3])


async def test_searchable_pdf_has_the_text_over_the_writing(exported: Told) -> None:
    document = pdfium.PdfDocument(exported.export(ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF))
    assert len(document) == 2
    for number, told in enumerate(exported.pages):
        for line in told.lines:
            box = found_at(document, number, line.recognition.hypotheses[0].text)
            left, right = (f(p.x for p in line.polygon) * 0.72 for f in (min, max))
            top, bottom = (told.page.height * 0.72 - f(p.y for p in line.polygon) * 0.72 for f in (min, max))
            assert box == pytest.approx((left, bottom, right, top), abs=2)


@pytest.mark.parametrize(("turned", "inset"), [(0, 0.0), (90, 30.0), (180, 12.0), (270, 30.0)])
async def test_searchable_pdf_keeps_pages_and_reckons_with_their_rotation_and_crop_box(
    service: Service, turned: int, inset: float
) -> None:
    page = written(1, 6)
    content = pdf([page.image], turned=turned, inset=inset)
    told = await service.read(content, dpi=100, export_formats=[ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF])
    assert alike(told.texts(), page.texts)
    document = pdfium.PdfDocument(told.export(ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF))
    before = pdfium.PdfDocument(content)[0]
    assert document[0].get_rotation() == turned
    assert document[0].get_cropbox() == pytest.approx(before.get_cropbox(), abs=0.01)
    # It looks as it did: the text is not seen.
    drawn, original = (p.render(scale=1).to_pil().convert("L").tobytes() for p in (document[0], before))
    assert drawn == original
    width, height = page.image.size
    for line in told.pages[0].lines:
        box = found_at(document, 0, line.recognition.hypotheses[0].text)
        shown = [  # the polygon on the unturned page, which user space speaks of
            {0: (p.x, height - p.y), 90: (p.y, p.x), 180: (width - p.x, p.y), 270: (height - p.y, width - p.x)}[turned]
            for p in line.polygon
        ]
        xs, ys = [x * 0.72 + inset for x, _ in shown], [y * 0.72 + inset for _, y in shown]
        assert box == pytest.approx((min(xs), min(ys), max(xs), max(ys)), abs=2)


async def test_searchable_pdf_of_a_photo_keeps_the_jpeg(service: Service) -> None:
    page = written(1, 6)
    exif = Image.Exif()
    exif[0x0112] = 8
    photo = encoded(page.image.transpose(Image.Transpose.ROTATE_270), "JPEG", exif=exif, quality=90, dpi=(100, 100))
    told = await service.read(photo, export_formats=[ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF])
    content = told.export(ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF)
    assert photo in content
    document = pdfium.PdfDocument(content)
    assert document[0].get_size() == pytest.approx((page.image.width * 0.72, page.image.height * 0.72), abs=0.1)
    drawn = document[0].render(scale=1 / 0.72).to_pil().convert("L").resize((90, 40))
    wanted = page.image.convert("L").resize((90, 40))
    difference = sum(abs(a - b) for a, b in zip(drawn.tobytes(), wanted.tobytes(), strict=True)) / (90 * 40)
    assert difference < 5
    for line in told.pages[0].lines:
        box = found_at(document, 0, line.recognition.hypotheses[0].text)
        assert box[0] == pytest.approx(min(p.x for p in line.polygon) * 0.72, abs=2)
        assert box[3] == pytest.approx((page.image.height - min(p.y for p in line.polygon)) * 0.72, abs=2)


async def test_searchable_pdf_of_chosen_pages_has_these_only(service: Service) -> None:
    content = pdf([written(number).image for number in (0, 1, 2)])
    told = await service.read(
        content,
        dpi=100,
        page_ranges=[ocr_pb2.PageRange(first_page=3), ocr_pb2.PageRange(first_page=2, last_page=2)],
        export_formats=[ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF],
    )
    document = pdfium.PdfDocument(told.export(ocr_pb2.EXPORT_FORMAT_SEARCHABLE_PDF))
    assert [page.get_textpage().get_text_bounded() for page in document] == [told.texts(0)[0], told.texts(1)[0]]


# --- leaving early ---


async def until_idle(service: Service) -> None:
    """Return when nothing of any document is left, neither in the engine nor beside it."""
    host = service.server.host
    assert host is not None
    async with asyncio.timeout(60):
        while (  # noqa: ASYNC110 - nobody is told of a slot that becomes free
            host.admission.running_count
            or host.admission.waiting_count
            or service.metric("inkwell_documents", state="running")
            or service.metric("inkwell_documents", state="waiting")
        ):
            await asyncio.sleep(0.005)


async def test_a_cancelled_document_leaves_nothing_behind(service: Service) -> None:
    content = tiff([written(0, 1, 2, 3, 4, 5, 6, 7).image] * 4)
    call = service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content))
    await until(aiter(call), "line")
    call.cancel()
    await until_idle(service)
    assert alike((await service.read(encoded(written(1).image))).texts(), written(1).texts)


async def test_a_waiting_document_can_be_cancelled(service: Service) -> None:
    content = tiff([written(0, 1, 2, 3, 4).image] * 2)
    first = aiter(service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content)))
    await until(first, "started")
    second = service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content))
    await until(aiter(second), "queued")
    second.cancel()
    rest = Told([response async for response in first])
    assert rest.result.page_count == 2
    await until_idle(service)


async def test_a_document_ends_with_its_deadline(service: Service) -> None:
    content = tiff([written(0, 1, 2, 3, 4, 5, 6, 7).image] * 40)
    call = service.stub.ReadDocument(ocr_pb2.ReadDocumentRequest(content=content), timeout=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        [response async for response in call]
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until_idle(service)
