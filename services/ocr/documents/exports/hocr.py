"""hOCR 1.2 (kba.github.io/hocr-spec/1.2) as XHTML: pages, blocks, lines, and words with interpolated boxes."""

import math
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from services.ocr.documents.exports import markup
from services.ocr.documents.exports.geometry import DERIVED, Point, baseline, box, clipped, words
from services.ocr.documents.result import LineResult, Origin, PageInfo, PageResult, Summary

MEDIA_TYPE = "application/xhtml+xml"

_CAPABILITIES = "ocr_page ocr_carea ocr_par ocr_line ocrx_word"


def head(origin: Origin) -> str:
    """The document up to its pages."""
    return (
        markup.DECLARATION + '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"'
        ' "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">\n'
        '<html xmlns="http://www.w3.org/1999/xhtml">\n<head>\n'
        f"<title>{escape(f'Read by {origin.model}')}</title>\n"
        '<meta http-equiv="Content-Type" content="application/xhtml+xml; charset=utf-8"/>\n'
        f'<meta name="ocr-system" content={quoteattr(f"inkwell {origin.version}, {origin.model}")}/>\n'
        f'<meta name="ocr-capabilities" content="{_CAPABILITIES}"/>\n'
        f'<meta name="ocr-number-of-pages" content="{origin.page_count}"/>\n'
        f'<meta name="description" content="{escape(DERIVED)}"/>\n'
        "</head>\n<body>\n"
    )


def page(result: PageResult, index: int) -> str:
    """One page; `index` counts from 0 within the file."""
    info = result.info
    number = info.page
    title = [f'image "page-{number:04d}.png"', f"bbox 0 0 {info.width} {info.height}", f"ppageno {number - 1}"]
    if info.dpi:
        title.append(f"scan_res {round(info.dpi)} {round(info.dpi)}")
    root = ElementTree.Element("div", {"class": "ocr_page", "id": f"page_{number}", "title": "; ".join(title)})
    for block, lines in result.blocks:
        corners = [point for line in lines for point in line.polygon]
        title_of_block = _bbox(corners, info)
        area = _sub(root, "div", "ocr_carea", f"block_{number}_{block}", title_of_block)
        paragraph = _sub(area, "p", "ocr_par", f"par_{number}_{block}", title_of_block)
        for line in lines:
            _add_line(paragraph, line, info)
    return markup.rendered(root)


def tail(summary: Summary) -> str:
    """The rest of the document."""
    return "</body>\n</html>\n"


def _add_line(paragraph: ElementTree.Element, line: LineResult, info: PageInfo) -> None:
    element = _sub(paragraph, "span", "ocr_line", f"line_{info.page}_{line.order}", _line_title(line, info))
    confidence = round(100 * line.recognition.confidence)
    for count, word in enumerate(words(line.text, line.polygon), 1):
        title = f"{_bbox(word.polygon, info)}; x_wconf {confidence}"
        span = _sub(element, "span", "ocrx_word", f"word_{info.page}_{line.order}_{count}", title)
        span.text = markup.plain(word.text)


def _line_title(line: LineResult, info: PageInfo) -> str:
    title = [_bbox(line.polygon, info)]
    if abs(line.angle) < 45:
        # Relative to the lower left corner of the box; only sensible for writing that runs roughly level.
        (x0, y0), (x1, y1) = baseline(line.polygon)
        slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
        around = box(line.polygon)
        offset = y0 + slope * (around.left - x0) - around.bottom
        title.append(f"baseline {slope:.4f} {offset:.1f}")
    if not math.isclose(line.angle, 0.0, abs_tol=0.005):
        title.append(f"textangle {markup.number(-line.angle)}")  # hOCR counts counter-clockwise
    return "; ".join(title)


def _bbox(corners: list[Point] | tuple[Point, ...], info: PageInfo) -> str:
    around = box(clipped(corners, info.width, info.height))
    return (
        f"bbox {math.floor(around.left)} {math.floor(around.top)} {math.ceil(around.right)} {math.ceil(around.bottom)}"
    )


def _sub(parent: ElementTree.Element, tag: str, kind: str, name: str, title: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {"class": kind, "id": name, "title": title})
