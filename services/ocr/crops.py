"""A line cut out of its page and turned level, for reading. Runs in the front process on Pillow alone."""

import math
from collections.abc import Sequence

from PIL import Image

from services.ocr.domain import Line, Page


def crop_line(page: Page, polygon: Sequence[tuple[float, float]], rotation: int) -> Line:
    """The four corners of a line, clockwise from the text's top left, as an upright image of about their size."""
    image = Image.frombuffer("RGB", (page.width, page.height), page.pixels, "raw", "RGB", 0, 1)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = polygon
    width = max(4, round(max(math.dist((x0, y0), (x1, y1)), math.dist((x3, y3), (x2, y2)))))
    height = max(4, round(max(math.dist((x0, y0), (x3, y3)), math.dist((x1, y1), (x2, y2)))))
    # Pillow's QUAD wants upper left, lower left, lower right, upper right.
    quad = (x0, y0, x3, y3, x2, y2, x1, y1)
    line = image.transform(
        (width, height), Image.Transform.QUAD, quad, resample=Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    )
    return Line(line.width, line.height, line.tobytes())
