"""The lines of a page, from its pixels.

look      a small view tells which way the writing runs                       frame.direction
level     the page is turned level, at a size that suits its writing          frame.frame_for
cores     the network marks the middle of lines; doubled ones are parted      detector, cores
blocks    white strips between them make columns, in reading order            columns
rows      cores are chained from left to right                                lines
outlines  each row's own ink, rules taken out, gives its box                  ink, outline
"""

import cv2
import numpy as np

from services.kit.faults import too_large
from services.ocr.domain import Layout, LayoutLine, Page
from services.ocr.engine.layout.columns import blocks_of
from services.ocr.engine.layout.cores import LINE_OVER_CORE, find_cores
from services.ocr.engine.layout.detector import Detector, DetectorMissing, Rgb
from services.ocr.engine.layout.frame import Frame, direction, frame_for
from services.ocr.engine.layout.ink import ink_of
from services.ocr.engine.layout.lines import Row, rows_of
from services.ocr.engine.layout.outline import Outline, outlines

__all__ = ["MAX_LINES", "Detector", "DetectorMissing", "find_lines"]

MAX_LINES = 1000

GOOD_THICKNESS = 9.0  # pixels of the map that a core should be thick
SIDES = (640, 1600)  # longest side of the map
MAP_PIXELS = 1_750_000  # the network takes some 400 bytes a pixel
INK_PIXELS = 5_000_000


def find_lines(page: Page, detector: Detector, *, rotation: int | None = None, max_lines: int = MAX_LINES) -> Layout:
    """Find the lines of writing on a page, in reading order, with outlines tight to their ink.

    `rotation` is how far the page is known to be turned, or None to choose between 0 and 90: which way up a page
    stands does not show in the shape of its lines, so a caller who doubts reads some of them both ways and, where the
    other way reads better, calls again with the rotation plus 180. Writing may lean by up to 45 degrees.

    Raises Fault (TOO_LARGE, TOO_MANY_LINES) for more than `max_lines` lines.
    """
    pixels: Rgb = np.frombuffer(page.pixels, np.uint8).reshape(page.height, page.width, 3)
    found = direction(pixels, detector, rotation)
    longest = max(page.width, page.height)
    scale = GOOD_THICKNESS / found.thickness if found.thickness else SIDES[1] / longest
    scale = min(max(scale, SIDES[0] / longest), SIDES[1] / longest, 1.0)
    frame = frame_for(page.width, page.height, found.rotation - found.skew, scale)
    if frame.width * frame.height > MAP_PIXELS:
        scale *= (MAP_PIXELS / (frame.width * frame.height)) ** 0.5
        frame = frame_for(page.width, page.height, found.rotation - found.skew, scale)
    view = frame.view(pixels)
    cores = find_cores(detector.text_map(view))
    blocks = [rows_of(block, cores.thickness) for block in blocks_of(cores.cores, cores.thickness)]
    rows = [row for block in blocks for row in block]
    if len(rows) > max_lines:
        raise too_large(
            "page",
            "TOO_MANY_LINES",
            f"{len(rows)} lines were found on it, more than the limit of {max_lines}; send a part of the page",
            line_count=len(rows),
            limit_lines=max_lines,
        )
    shapes = _outlines(pixels, frame, scale, rows, cores.labels, cores.thickness)
    numbers = [number for number, block in enumerate(blocks, start=1) for _ in block]
    lines = tuple(
        _line(frame, row, shape, number, found.skew - found.rotation)
        for row, shape, number in zip(rows, shapes, numbers, strict=True)
    )
    return Layout(found.rotation, found.skew, lines)


def _outlines(
    pixels: Rgb, frame: Frame, scale: float, rows: list[Row], labels: np.ndarray, thickness: float
) -> list[Outline]:
    """Outlines from a view that shows the ink at up to twice the map's size."""
    if not rows:
        return []
    finer = min(2.0, 1.0 / scale, (INK_PIXELS / (frame.width * frame.height)) ** 0.5)
    fine = frame.finer(finer) if finer > 1.05 else frame
    cores = (labels > 0).astype(np.uint8)
    inside = cv2.resize(cores, (fine.width, fine.height), interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)
    height = LINE_OVER_CORE * thickness * fine.width / frame.width
    return outlines(rows, labels, ink_of(fine.view(pixels), inside, height))


def _line(frame: Frame, row: Row, shape: Outline, block: int, turned: float) -> LayoutLine:
    corners = frame.to_page(shape.corners)
    angle = (turned + shape.lean + 180) % 360 - 180
    return LayoutLine(tuple((float(x), float(y)) for x, y in corners), angle, min(1.0, row.score), block)
