"""Small helps for writing XML."""

import re
from collections.abc import Iterable
from xml.etree import ElementTree

from services.ocr.documents.exports.geometry import Point

# Everything that XML 1.0 does not allow, not even escaped.
_NOT_ALLOWED = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


def plain(text: str) -> str:
    """The text with U+FFFD for characters that XML cannot hold."""
    return _NOT_ALLOWED.sub("\ufffd", text)


def number(value: float) -> str:
    """A number without needless digits: pixels and degrees to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def points(polygon: Iterable[Point]) -> str:
    """Whole pixels as "x,y x,y"."""
    return " ".join(f"{round(x)},{round(y)}" for x, y in polygon)


def rendered(element: ElementTree.Element) -> str:
    """The element as text, indented, with a line feed at its end."""
    ElementTree.indent(element)
    return ElementTree.tostring(element, encoding="unicode") + "\n"
