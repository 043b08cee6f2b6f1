"""What the files say, down to the text that XML cannot hold and the letters of other scripts."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
import pytest
from lxml import etree
from PIL import Image

from services.ocr.documents import exports
from services.ocr.documents.exports import geometry
from services.ocr.documents.frames import Limits, TextLine, TextPage
from services.ocr.documents.pictures import PictureSource
from services.ocr.documents.result import LineResult, Origin, PageInfo, PageResult, Summary, Tally
from services.ocr.domain import Hypothesis, Recognition, Token
from tests.support.documents import encoded

SCHEMAS = Path(__file__).parents[2] / "data" / "schemas"
ORIGIN = Origin("a & b", "1.0", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 1)
LIMITS = Limits(10_000_000, 4, 1 << 31, 60.0)


def recognition(text: str, confidence: float = 0.5) -> Recognition:
    token = Token(7, text, -0.5)
    return Recognition(
        (Hypothesis(text, -0.5, -0.5, confidence, (token,)),),
        truncated=False,
        decoded_token_count=1,
        mean_batch_rows=1.0,
        confidence=confidence,
        confidence_calibrated=False,
        repetition_suspected=False,
        blank=False,
    )


def line(text: str, order: int = 1, *, block: int = 1, confidence: float = 0.5, dx: float = 0.0) -> LineResult:
    top = 10.0 + 40 * order
    polygon = ((10.0 + dx, top), (210.0 + dx, top), (210.0 + dx, top + 30), (10.0 + dx, top + 30))
    return LineResult(order, block, polygon, 0.0, 0.9, recognition(text, confidence))


def page(*lines: LineResult, number: int = 1, rotation: int = 0, skew: float = 0.0) -> PageResult:
    return PageResult(PageInfo(number, 300, 400, 200.0, rotation, skew, len(lines)), lines)


def written(wanted: exports.Format, *pages: PageResult) -> bytes:
    export = exports.create(wanted, Origin(ORIGIN.model, ORIGIN.version, ORIGIN.created, len(pages)))
    for each in pages:
        export.add(each)
    tally = Tally()
    for each in pages:
        tally.page_count += 1
        for read in each.lines:
            tally.count(read)
    export.finish(tally.summary())
    content = b"".join(export.pieces(100))
    export.close()
    return content


def test_text_parts_blocks_and_pages() -> None:
    first = page(line("one"), line("two", 2), line("three", 3, block=2))
    assert written("text", first, page(number=2), page(line("four"), number=3)) == b"one\ntwo\n\nthree\n\f\ffour\n"


def test_json_is_one_object() -> None:
    document = json.loads(written("json", page(line('"quoted" \\'), line("ё", 2)), page(number=2)))
    assert [read["text"] for read in document["pages"][0]["lines"]] == ['"quoted" \\', "ё"]
    assert (document["page_count"], document["line_count"], document["model"]) == (2, 2, "a & b")
    assert document["created"] == "2026-01-02T03:04:05Z"


def test_the_document_s_confidence_weighs_lines_by_their_length() -> None:
    tally = Tally()
    tally.count(line("abcdefgh", confidence=0.9))
    tally.count(line("xy", confidence=0.4))
    assert tally.summary().line_count == 2
    assert tally.summary().confidence == pytest.approx(0.8)


UNRULY = ["<b> & \"q\" 'a'", "control \x00\x07 and \ufffe", "Привет, мир", "emoji 😀 end", "a  b\tc"]


@pytest.mark.parametrize("wanted", ["hocr", "alto", "page_xml"])
@pytest.mark.parametrize("text", UNRULY)
def test_any_text_makes_a_valid_document(wanted: exports.Format, text: str) -> None:
    content = written(wanted, page(line(text), line("next", 2, block=2)))
    root = etree.fromstring(content)
    schema = {"alto": "alto-4-3.xsd", "page_xml": "pagecontent-2019-07-15.xsd"}.get(wanted)
    if schema:
        etree.XMLSchema(etree.parse(SCHEMAS / schema)).assertValid(root)
    held = "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n\r") or c == "\ufffe" else c for c in text)
    if wanted == "page_xml":
        names = {"p": "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"}
        assert root.findtext(".//p:TextLine/p:TextEquiv/p:Unicode", None, names) == held
    elif wanted == "alto":
        strings = root.iterfind(".//{http://www.loc.gov/standards/alto/ns-v4#}String")
        words = [word.get("CONTENT") for word in strings]
        assert words == [*held.split(), "next"]


def test_polygons_outside_the_page_are_clipped_where_the_format_wants_it() -> None:
    content = written("page_xml", page(line("x", dx=-40.0)))
    root = etree.fromstring(content)
    (coordinates, *_) = root.iterfind(".//{*}TextLine/{*}Coords")
    assert coordinates.get("points") == "0,50 170,50 170,80 0,80"


@pytest.mark.parametrize(
    ("rotation", "skew", "turn"),
    [(0, 0.0, 0.0), (0, 3.0, -3.0), (270, 0.0, -90.0), (180, -2.0, -178.0), (180, 0.0, 180.0)],
)
def test_the_turn_of_a_page_is_told_within_half_a_circle(rotation: int, skew: float, turn: float) -> None:
    assert page(rotation=rotation, skew=skew).info.turn == pytest.approx(turn)


def test_words_share_the_line_by_their_characters() -> None:
    polygon = ((0.0, 0.0), (100.0, 10.0), (100.0, 30.0), (0.0, 20.0))
    first, second = geometry.words("ab 56789 ", polygon)
    assert (first.text, second.text) == ("ab", "56789")
    assert first.polygon[0] == (0.0, 0.0)
    assert second.polygon[0] == pytest.approx((100 * 3 / 9, 10 * 3 / 9))
    assert second.polygon[2] == pytest.approx((100 * 8 / 9, 20 + 10 * 8 / 9))


def test_a_zip_holds_a_file_a_page() -> None:
    assert written("page_xml", page(line("x"))).startswith(b"<?xml")
    assert written("page_xml", page(line("x")), page(number=2)).startswith(b"PK")


# --- invisible text ---


def laid(*texts: str, width: int = 800, height: int = 400) -> pdfium.PdfDocument:
    """A PDF of a white image with these lines on it."""
    source = PictureSource(encoded(Image.new("L", (width, height), 255), dpi=(72, 72)), LIMITS)
    lines = tuple(
        TextLine(text, ((20, 30 * n), (620, 30 * n), (620, 30 * n + 24), (20, 30 * n + 24)))
        for n, text in enumerate(texts, 1)
    )
    return pdfium.PdfDocument(source.searchable_pdf((TextPage(1, width, height, lines),), whole=True))


def test_all_of_unicode_can_be_found_and_copied() -> None:
    texts = ["Съешь же ещё этих мягких булок", "Ελληνικά ße çà", "日本語の手書き", "emoji 😀 and 𝔘", "café café"]
    document = laid(*texts)
    textpage = document[0].get_textpage()
    assert textpage.get_text_bounded().split("\r\n") == texts
    for text in texts:
        assert textpage.search(text.split()[0], match_case=True).get_next() is not None


def test_more_than_a_hundred_different_characters_keep_their_meaning() -> None:
    text = "".join(chr(code) for code in range(0x410, 0x410 + 250) if chr(code).isprintable())
    assert laid(text)[0].get_textpage().get_text_bounded() == text


def test_characters_fill_the_line_s_box() -> None:
    textpage = laid("abcd")[0].get_textpage()
    boxes = [textpage.get_charbox(n) for n in range(4)]
    assert boxes[0] == pytest.approx((20, 400 - 54, 170, 400 - 30), abs=0.6)
    assert boxes[3] == pytest.approx((470, 400 - 54, 620, 400 - 30), abs=0.6)


def test_the_text_is_not_seen() -> None:
    document = laid("abcd")
    assert document[0].render(scale=2).to_pil().convert("L").getextrema() == (255, 255)
    (text,) = [o for o in document[0].get_objects() if o.type == pdfium_c.FPDF_PAGEOBJ_TEXT]
    assert pdfium_c.FPDFTextObj_GetTextRenderMode(text) == pdfium_c.FPDF_TEXTRENDERMODE_INVISIBLE


def test_slanted_lines_keep_their_direction() -> None:
    source = PictureSource(encoded(Image.new("L", (400, 400), 255), dpi=(72, 72)), LIMITS)
    down = TextLine("down", ((300, 40), (300, 340), (270, 340), (270, 40)))  # runs from the top to the bottom
    document = pdfium.PdfDocument(source.searchable_pdf((TextPage(1, 400, 400, (down,)),), whole=True))
    textpage = document[0].get_textpage()
    boxes = [textpage.get_charbox(n) for n in range(4)]
    assert boxes[0] == pytest.approx((270, 400 - 115, 300, 400 - 40), abs=0.6)
    assert boxes[3] == pytest.approx((270, 400 - 340, 300, 400 - 265), abs=0.6)


def test_a_page_without_text_stays_as_it_is() -> None:
    document = laid("\x00 \x01")
    assert document[0].get_textpage().count_chars() == 0


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_every_mode_become_pages(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    image = Image.new("L", (60, 40), 255 if mode == "1" else 200)
    image = image.convert("RGB") if mode == "CMYK" else image
    image = image.convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    source = PictureSource(encoded(image, kind), LIMITS)
    document = pdfium.PdfDocument(source.searchable_pdf((TextPage(1, 60, 40, ()),), whole=True))
    drawn = document[0].render(scale=1).to_pil().convert("L").getpixel((10, 5))
    shown = source.render(1, 200)
    assert drawn == pytest.approx(shown.pixels[0], abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_shows_as_it_is_read_whatever_its_exif_orientation(orientation: int) -> None:
    image = Image.new("RGB", (80, 40), "white")
    image.paste((0, 0, 0), (0, 0, 20, 10))  # the corner tells the eight apart
    image.paste((200, 0, 0), (20, 0, 40, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = PictureSource(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0, dpi=(72, 72)), LIMITS)
    shown = source.render(1, 200)
    pdf = source.searchable_pdf((TextPage(1, shown.width, shown.height, ()),), whole=True)
    drawn = pdfium.PdfDocument(pdf)[0].render(scale=1).to_pil().convert("RGB")
    assert drawn.size == (shown.width, shown.height)
    upright = Image.frombytes("RGB", drawn.size, shown.pixels)
    apart = [abs(a - b) for a, b in zip(drawn.tobytes(), upright.tobytes(), strict=True)]
    assert sum(apart) / len(apart) < 4


def test_a_large_file_comes_in_pieces() -> None:
    export = exports.create("text", ORIGIN)
    export.add(page(line("x" * 1000)))
    export.finish(Summary(1, 1, 0, 0, 0.5))
    pieces = list(export.pieces(256))
    assert [len(piece) for piece in pieces] == [256, 256, 256, 233]
    assert io.BytesIO(b"".join(pieces)).read() == b"x" * 1000 + b"\n"
