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
from services.ocr.engine.layout.frame import Direction, Frame, direction, frame_for
from services.ocr.engine.layout.ink import ink_of
from services.ocr.engine.layout.lines import Row, rows_of
from services.ocr.engine.layout.outline import Outline, outlines

__all__ = ["MAX_LINES", "Detector", "DetectorMissing", "find_lines"]

MAX_LINES = 1000

GOOD_THICKNESS = 9.0  # pixels of the map that a core should be thick
LEAST_THICKNESS = 3.0  # below, neighbouring lines run together
SIDES = (640, 1600)  # longest side of the map, where the writing is not so small that it takes more
MAP_PIXELS = 1_750_000
MANY = 20  # lines seen at a close look that leave no doubt that the page is full of them
FINE_MAP_PIXELS = 7_000_000  # some four seconds of one core
INK_PIXELS = 5_000_000


def find_lines(page: Page, detector: Detector, *, rotation: int | None = None, max_lines: int = MAX_LINES) -> Layout:
    """Find the lines of writing on a page, in reading order, with outlines tight to their ink.

    `rotation` is how far the page is known to be turned, or None to choose between 0 and 90: which way up a page
    stands does not show in the shape of its lines, so a caller who doubts reads some of them both ways and, where the
    other way reads better, calls again with the rotation plus 180. Writing may lean by up to 45 degrees.

    Raises Fault (TOO_LARGE): TOO_MANY_LINES for more than `max_lines` lines, LINES_TOO_SMALL for a page full of lines
    that are so small for its size that finding them would take too long.
    """
    pixels: Rgb = np.frombuffer(page.pixels, np.uint8).reshape(page.height, page.width, 3)
    found = direction(pixels, detector, rotation)
    frame, scale = _working_frame(page, found)
    view = frame.view(pixels)
    cores = find_cores(detector.text_map(view))
    blocks = [rows_of(block, cores.thickness) for block in blocks_of(cores.cores, cores.thickness)]
    rows = [row for block in blocks for row in block]
    if not rows:
        return Layout(rotation or 0, 0.0, ())
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


def _working_frame(page: Page, found: Direction) -> tuple[Frame, float]:
    """The level frame at the size that suits the writing, and its scale; raises Fault (LINES_TOO_SMALL)."""
    longest, turn = max(page.width, page.height), found.rotation - found.skew
    limit = MAP_PIXELS
    scale = min(1.0, SIDES[1] / longest)
    if found.thickness:
        wanted = max(GOOD_THICKNESS / found.thickness, SIDES[0] / longest)
        if found.thickness * scale < LEAST_THICKNESS + 1:
            limit, wanted = FINE_MAP_PIXELS, (LEAST_THICKNESS + 2) / found.thickness
            scale = min(1.0, wanted)
        scale = min(scale, wanted)
    frame = frame_for(page.width, page.height, turn, scale)
    if frame.width * frame.height > limit:
        scale *= (limit / (frame.width * frame.height)) ** 0.5
        frame = frame_for(page.width, page.height, turn, scale)
    if found.count >= MANY and scale < 1 and found.thickness * scale < LEAST_THICKNESS:
        high, least = (round(LINE_OVER_CORE * value) for value in (found.thickness, LEAST_THICKNESS / scale))
        raise too_large(
            "page",
            "LINES_TOO_SMALL",
            f"its lines are some {high} pixels high; on {page.width}x{page.height} pixels they have to be {least} at"
            " least; send a part of the page",
            line_height=high,
            least_line_height=least,
        )
    return frame, scale


def _outlines(
    pixels: Rgb, frame: Frame, scale: float, rows: list[Row], labels: np.ndarray, thickness: float
) -> list[Outline]:
    """Outlines from a view that shows the ink at up to twice the map's size."""
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
