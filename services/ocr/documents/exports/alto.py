"""ALTO 4.3 (loc.gov/standards/alto), in pixels of the page as it came."""

from xml.etree import ElementTree
from xml.sax.saxutils import escape

from services.ocr.documents.exports import markup
from services.ocr.documents.exports.geometry import DERIVED, Point, baseline, box, clipped, words
from services.ocr.documents.result import LineResult, Origin, PageInfo, PageResult, Summary

MEDIA_TYPE = "application/xml"

_NAMESPACE = "http://www.loc.gov/standards/alto/ns-v4#"


def head(origin: Origin) -> str:
    """The document up to its pages."""
    return (
        markup.DECLARATION + f'<alto xmlns="{_NAMESPACE}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
        f' xsi:schemaLocation="{_NAMESPACE} http://www.loc.gov/standards/alto/v4/alto-4-3.xsd" SCHEMAVERSION="4.3">\n'
        "<Description>\n"
        "<MeasurementUnit>pixel</MeasurementUnit>\n"
        '<Processing ID="reading">\n'
        "<processingCategory>contentGeneration</processingCategory>\n"
        f"<processingDateTime>{origin.created.isoformat(timespec='seconds')}</processingDateTime>\n"
        f"<processingStepDescription>{escape(DERIVED)}</processingStepDescription>\n"
        f"<processingStepSettings>{escape(f'model {origin.model}')}</processingStepSettings>\n"
        "<processingSoftware><softwareName>inkwell</softwareName>"
        f"<softwareVersion>{escape(origin.version)}</softwareVersion></processingSoftware>\n"
        "</Processing>\n"
        "</Description>\n<Layout>\n"
    )


def page(result: PageResult, index: int) -> str:
    """One page; `index` counts from 0 within the file."""
    info = result.info
    root = ElementTree.Element(
        "Page",
        {
            "ID": f"page_{info.page}",
            "PHYSICAL_IMG_NR": str(info.page),
            "WIDTH": str(info.width),
            "HEIGHT": str(info.height),
            "PROCESSINGREFS": "reading",
        },
    )
    whole = {"HPOS": "0", "VPOS": "0", "WIDTH": str(info.width), "HEIGHT": str(info.height)}
    space = ElementTree.SubElement(root, "PrintSpace", whole)
    for block, lines in result.blocks:
        corners = [point for line in lines for point in line.polygon]
        attributes = {"ID": f"block_{info.page}_{block}", **_place(corners, info)}
        if info.turn:
            attributes["ROTATION"] = markup.number(info.turn)  # the content's, counter-clockwise
        element = ElementTree.SubElement(space, "TextBlock", attributes)
        for line in lines:
            _add_line(element, line, info)
    return markup.rendered(root)


def tail(summary: Summary) -> str:
    """The rest of the document."""
    return "</Layout>\n</alto>\n"


def _add_line(block: ElementTree.Element, line: LineResult, info: PageInfo) -> None:
    name = f"{info.page}_{line.order}"
    stands = clipped(baseline(line.polygon), info.width, info.height)
    attributes = {"ID": f"line_{name}", **_place(line.polygon, info), "BASELINE": markup.points(stands)}
    element = ElementTree.SubElement(block, "TextLine", attributes)
    shape = ElementTree.SubElement(element, "Shape")
    outline = clipped(line.polygon, info.width, info.height)
    ElementTree.SubElement(shape, "Polygon", {"POINTS": markup.points(outline)})
    for count, word in enumerate(words(line.text, line.polygon), 1):
        if count > 1:
            ElementTree.SubElement(element, "SP")
        ElementTree.SubElement(
            element,
            "String",
            {
                "ID": f"string_{name}_{count}",
                **_place(word.polygon, info),
                "CONTENT": markup.plain(word.text),
                "WC": f"{line.recognition.confidence:.4f}",
            },
        )


def _place(corners: list[Point] | tuple[Point, ...], info: PageInfo) -> dict[str, str]:
    around = box(clipped(corners, info.width, info.height))
    return {
        "HPOS": markup.number(around.left),
        "VPOS": markup.number(around.top),
        "WIDTH": markup.number(around.width),
        "HEIGHT": markup.number(around.height),
    }
