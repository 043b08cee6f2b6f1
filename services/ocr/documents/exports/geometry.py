"""Boxes, baselines and words of a line, from the four corners that were found.

Only the corners are measured. The baseline is taken to run at a quarter of the line's height, and a word's place along
the line is reckoned from the count of the characters before it; files that hold such values say so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

BASELINE_SHARE = 0.25  # of the line's height, from its lower edge
DERIVED = (
    "Line polygons are measured. Baselines are taken to run at a quarter of the line's height; word boxes are"
    " interpolated along the line by character count; a word's confidence is its line's."
)


@dataclass(frozen=True)
class Box:
    """The upright box around something, pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True)
class Word:
    """A run of characters without white space and where it lies."""

    text: str
    polygon: tuple[Point, ...]


def box(points: Sequence[Point]) -> Box:
    """The smallest upright box that holds the points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return Box(min(xs), min(ys), max(xs), max(ys))


def clipped(points: Sequence[Point], width: int, height: int) -> tuple[Point, ...]:
    """The points moved onto the page where they lie outside: formats allow no others."""
    return tuple((min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))) for x, y in points)


def baseline(polygon: Sequence[Point]) -> tuple[Point, Point]:
    """Where the writing stands, from its beginning to its end."""
    top_left, top_right, bottom_right, bottom_left = polygon
    return _between(bottom_left, top_left, BASELINE_SHARE), _between(bottom_right, top_right, BASELINE_SHARE)


def words(text: str, polygon: Sequence[Point]) -> list[Word]:
    """The words of a line, each with its share of the line's polygon."""
    top_left, top_right, bottom_right, bottom_left = polygon
    found = []
    for match in re.finditer(r"\S+", text):
        begin, end = match.start() / len(text), match.end() / len(text)
        corners = (
            _between(top_left, top_right, begin),
            _between(top_left, top_right, end),
            _between(bottom_left, bottom_right, end),
            _between(bottom_left, bottom_right, begin),
        )
        found.append(Word(match.group(), corners))
    return found


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
