"""Pictures on a terminal: every character is two pixels, one above the other."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from PIL.Image import Image as Bitmap

COLUMNS_MOST = 32
LINES_MOST = 16


def possible(console: Console) -> bool:
    """True on a terminal with enough colours, if Pillow is installed."""
    if not console.is_terminal or console.no_color or console.color_system not in ("truecolor", "256"):
        return False
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def draw(pictures: Sequence[bytes], width: int) -> Text:
    """As many of the encoded pictures side by side as fit `width` columns, each at most 32 columns by 16 lines."""
    from PIL import Image

    grids = []
    for content in pictures[: max(1, (width + 1) // (COLUMNS_MOST + 1))]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.thumbnail((min(COLUMNS_MOST, width), LINES_MOST * 2), Image.Resampling.BOX)
        grids.append(image)
    text = Text(no_wrap=True)
    for top in range(0, max(image.height for image in grids), 2):
        for number, image in enumerate(grids):
            if number:
                text.append(" ")
            for column in range(image.width):
                text.append(*_cell(image, column, top))
        text.append("\n")
    text.rstrip()
    return text


def _cell(image: "Bitmap", column: int, top: int) -> tuple[str, Style]:
    upper = _color(image, column, top)
    lower = _color(image, column, top + 1)
    if upper is None:
        return " ", Style()
    return "▀", Style(color=upper, bgcolor=lower)


def _color(image: "Bitmap", column: int, row: int) -> Color | None:
    if row >= image.height:
        return None
    pixel = image.getpixel((column, row))
    assert isinstance(pixel, tuple)
    return Color.from_rgb(*pixel[:3])
