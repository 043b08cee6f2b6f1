"""Text that is found, marked and copied but not seen, laid over the pages of a PDF.

Every character takes one square of a font that draws nothing; a ToUnicode map says what it stands for, so any script
goes. A line is one text object whose matrix stretches the squares over the line's polygon.
"""

import ctypes
import math
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from services.ocr.documents.frames import Point, TextLine, TextPage

# Shares of the em above and below the baseline; a line's polygon is taken for its em.
_ASCENT, _DESCENT = 0.75, 0.25
_UNITS_PER_EM = 1000
# Codes are two bytes; 0 is .notdef.
_MOST_CHARACTERS = 0xFFFF
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Affine:
    """x' = a x + c y + e, y' = b x + d y + f."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def point(self, x: float, y: float) -> Point:
        """Where a point goes."""
        return self.a * x + self.c * y + self.e, self.b * x + self.d * y + self.f

    def vector(self, x: float, y: float) -> Point:
        """What becomes of a direction."""
        return self.a * x + self.c * y, self.b * x + self.d * y


def lay_text(
    pdf: pdfium.PdfDocument,
    targets: Sequence[pdfium.PdfPage],
    pages: Sequence[TextPage],
    to_user_space: Sequence[Affine],
) -> None:
    """Add each page's lines to its target; `to_user_space` brings pixels to the target's coordinates."""
    texts = [[_printable(line.text) for line in page.lines] for page in pages]
    codes = _codes(texts)
    if not codes:
        return
    font = _load_font(pdf, codes)
    for target, page, lines, affine in zip(targets, pages, texts, to_user_space, strict=True):
        for line, text in zip(page.lines, lines, strict=True):
            if text:
                _add_line(pdf, target, font, [codes.get(c, codes[_REPLACEMENT]) for c in text], line, affine)
        if any(lines):
            pdfium_c.FPDFPage_GenerateContent(target)
    pdfium_c.FPDFFont_Close(font)


def _printable(text: str) -> str:
    # Control characters would end a line of extracted text, or the text.
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text).strip()


def _codes(texts: list[list[str]]) -> dict[str, int]:
    """A code for each character that occurs, U+FFFD always among them; empty when there is no text at all."""
    seen = dict.fromkeys(c for page in texts for text in page for c in text)
    if not seen:
        return {}
    kept = [_REPLACEMENT, *(c for c in seen if c != _REPLACEMENT)][:_MOST_CHARACTERS]
    return {character: code for code, character in enumerate(kept, 1)}


def _add_line(
    pdf: pdfium.PdfDocument,
    target: pdfium.PdfPage,
    font: pdfium_c.FPDF_FONT,
    codes: list[int],
    line: TextLine,
    affine: Affine,
) -> None:
    along, up, start = _line_frame(line.polygon, len(codes), affine)
    size = math.hypot(*up) or 1.0
    # The size is said as the font's, not in the matrix, where some readers do not look for it.
    text = pdfium_c.FPDFPageObj_CreateTextObj(pdf, font, size)
    pdfium_c.FPDFText_SetCharcodes(text, (ctypes.c_uint32 * len(codes))(*codes), len(codes))
    pdfium_c.FPDFTextObj_SetTextRenderMode(text, pdfium_c.FPDF_TEXTRENDERMODE_INVISIBLE)
    matrix = (along[0] / size, along[1] / size, up[0] / size, up[1] / size, *start)
    pdfium_c.FPDFPageObj_SetMatrix(text, pdfium_c.FS_MATRIX(*matrix))
    pdfium_c.FPDFPage_InsertObject(target, text)


def _line_frame(polygon: Sequence[Point], count: int, affine: Affine) -> tuple[Point, Point, Point]:
    """One of `count` characters along the line, one em up, and where the baseline begins, in user space."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = polygon
    along = affine.vector((x1 - x0 + x2 - x3) / 2 / count, (y1 - y0 + y2 - y3) / 2 / count)
    down_x, down_y = (x3 - x0 + x2 - x1) / 2, (y3 - y0 + y2 - y1) / 2
    up = affine.vector(-down_x, -down_y)
    start = affine.point(x3 - _DESCENT * down_x, y3 - _DESCENT * down_y)
    return along, up, start


def _load_font(pdf: pdfium.PdfDocument, codes: dict[str, int]) -> pdfium_c.FPDF_FONT:
    font = _blank_font()
    # Every code is drawn by glyph 1, the empty square.
    glyphs = b"\x00\x01" * (len(codes) + 1)
    return pdfium_c.FPDFText_LoadCidType2Font(
        pdf,
        (ctypes.c_uint8 * len(font)).from_buffer_copy(font),
        len(font),
        _to_unicode(codes),
        (ctypes.c_uint8 * len(glyphs)).from_buffer_copy(glyphs),
        len(glyphs),
    )


def _to_unicode(codes: dict[str, int]) -> bytes:
    """The CMap that tells readers which characters the codes stand for (ISO 32000-1, 9.10.3)."""
    pairs = [f"<{code:04X}> <{character.encode('utf-16-be').hex().upper()}>" for character, code in codes.items()]
    # A section holds at most 100 pairs.
    sections = [pairs[i : i + 100] for i in range(0, len(pairs), 100)]
    lines = [
        "/CIDInit /ProcSet findresource begin",
        "12 dict begin",
        "begincmap",
        "/CIDSystemInfo << /Registry (Adobe) /Ordering (UCS) /Supplement 0 >> def",
        "/CMapName /Adobe-Identity-UCS def",
        "/CMapType 2 def",
        "1 begincodespacerange",
        "<0000> <FFFF>",
        "endcodespacerange",
        *(line for section in sections for line in (f"{len(section)} beginbfchar", *section, "endbfchar")),
        "endcmap",
        "CMapName currentdict /CMap defineresource pop",
        "end",
        "end",
    ]
    return "\n".join(lines).encode()


def _blank_font() -> bytes:
    """A TrueType font of two glyphs that draw nothing, each one em wide: the smallest that readers accept."""
    em, ascent, descent = _UNITS_PER_EM, round(_ASCENT * _UNITS_PER_EM), -round(_DESCENT * _UNITS_PER_EM)
    name = "Blank".encode("utf-16-be")
    tables = {
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 1, 12)
        + struct.pack(">HHHHHHH", 4, 32, 0, 4, 4, 1, 0)
        + struct.pack(">HHHHHhhHH", 0x20, 0xFFFF, 0, 0x20, 0xFFFF, 1 - 0x20, 1, 0, 0),
        # One contour of two on-curve points, from corner to corner and back: it covers nothing and yet has a box, which
        # readers take for the character's.
        b"glyf": struct.pack(">hhhhh HH BB hhhh", 1, 0, descent, em, ascent, 1, 0, 1, 1, 0, em, descent, em),
        b"head": struct.pack(
            ">IIIIHHQQhhhhHHhhh",
            0x00010000, 0x00010000, 0, 0x5F0F3CF5, 0, em, 0, 0, 0, descent, em, ascent, 0, 8, 2, 0, 0,
        ),
        b"hhea": struct.pack(">IhhhHhhhhhh8xhH", 0x00010000, ascent, descent, 0, em, 0, 0, em, 1, 0, 0, 0, 2),
        b"hmtx": struct.pack(">HhHh", em, 0, em, 0),
        b"loca": struct.pack(">HHH", 0, 0, 12),  # half the offsets
        b"maxp": struct.pack(">IHHHHHHHHHHHHHH", 0x00010000, 2, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        b"name": struct.pack(">HHH", 0, 2, 30)
        + struct.pack(">HHHHHH", 3, 1, 0x409, 1, len(name), 0)
        + struct.pack(">HHHHHH", 3, 1, 0x409, 6, len(name), 0)
        + name,
        b"post": struct.pack(">IIhhIIIII", 0x00030000, 0, 0, 0, 1, 0, 0, 0, 0),
    }  # fmt: skip
    offset = 12 + 16 * len(tables)
    directory, body = b"", b""
    for tag, table in tables.items():
        padded = table + bytes(-len(table) % 4)
        checksum = sum(struct.unpack(f">{len(padded) // 4}I", padded)) & 0xFFFFFFFF
        directory += struct.pack(">4sIII", tag, checksum, offset + len(body), len(table))
        body += padded
    # Search range and its kin: 8 is the largest power of two among the 9 tables.
    return struct.pack(">IHHHH", 0x00010000, len(tables), 8 * 16, 3, (len(tables) - 8) * 16) + directory + body
