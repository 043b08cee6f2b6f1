"""PAGE XML 2019-07-15 (github.com/PRImA-Research-Lab/PAGE-XML), one file a page."""

from xml.etree import ElementTree

from services.ocr.documents.exports import markup
from services.ocr.documents.exports.geometry import BASELINE_SHARE, baseline, box, clipped
from services.ocr.documents.result import LineResult, Origin, PageInfo, PageResult

MEDIA_TYPE = "application/xml"

_NAMESPACE = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"


def document(result: PageResult, origin: Origin) -> str:
    """The file of one page."""
    info = result.info
    root = ElementTree.Element(
        "PcGts",
        {
            "xmlns": _NAMESPACE,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": f"{_NAMESPACE} {_NAMESPACE}/pagecontent.xsd",
        },
    )
    metadata = ElementTree.SubElement(root, "Metadata")
    when = origin.created.isoformat(timespec="seconds")
    ElementTree.SubElement(metadata, "Creator").text = f"inkwell {origin.version}, {origin.model}"
    ElementTree.SubElement(metadata, "Created").text = when
    ElementTree.SubElement(metadata, "LastChange").text = when
    note = f"Baselines are not measured: they are taken to run at {BASELINE_SHARE:g} of the line's height."
    ElementTree.SubElement(metadata, "Comments").text = note
    page = ElementTree.SubElement(root, "Page", _page_attributes(info))
    if result.blocks:
        order = ElementTree.SubElement(page, "ReadingOrder")
        group = ElementTree.SubElement(order, "OrderedGroup", {"id": "reading_order"})
        for index, (block, _) in enumerate(result.blocks):
            reference = {"index": str(index), "regionRef": f"block_{block}"}
            ElementTree.SubElement(group, "RegionRefIndexed", reference)
    for block, lines in result.blocks:
        region = ElementTree.SubElement(page, "TextRegion", {"id": f"block_{block}"})
        around = box(clipped([point for line in lines for point in line.polygon], info.width, info.height))
        corners = [
            (around.left, around.top),
            (around.right, around.top),
            (around.right, around.bottom),
            (around.left, around.bottom),
        ]
        ElementTree.SubElement(region, "Coords", {"points": markup.points(corners)})
        for line in lines:
            _add_line(region, line, info)
        _add_text(region, "\n".join(line.text for line in lines))
    return markup.DECLARATION + markup.rendered(root)


def _page_attributes(info: PageInfo) -> dict[str, str]:
    attributes = {
        "imageFilename": f"page-{info.page:04d}.png",
        "imageWidth": str(info.width),
        "imageHeight": str(info.height),
    }
    if info.dpi:
        resolution = markup.number(info.dpi)
        attributes |= {"imageXResolution": resolution, "imageYResolution": resolution, "imageResolutionUnit": "PPI"}
    if info.turn:
        attributes["orientation"] = markup.number(info.turn)  # clockwise, what makes the page level
    return attributes


def _add_line(region: ElementTree.Element, line: LineResult, info: PageInfo) -> None:
    element = ElementTree.SubElement(region, "TextLine", {"id": f"line_{line.order}"})
    outline = clipped(line.polygon, info.width, info.height)
    ElementTree.SubElement(element, "Coords", {"points": markup.points(outline)})
    stands = clipped(baseline(line.polygon), info.width, info.height)
    ElementTree.SubElement(element, "Baseline", {"points": markup.points(stands)})
    _add_text(element, line.text, line.recognition.confidence)


def _add_text(parent: ElementTree.Element, text: str, confidence: float | None = None) -> None:
    attributes = {} if confidence is None else {"conf": f"{confidence:.4f}"}
    equivalent = ElementTree.SubElement(parent, "TextEquiv", attributes)
    ElementTree.SubElement(equivalent, "Unicode").text = markup.plain(text)
