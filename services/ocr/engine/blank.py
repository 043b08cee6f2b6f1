"""Tells an image without writing from one with, so that no words are made up for an empty line.

Writing is thinner than the line is high, sharper than a shadow, stronger than the noise of its paper, larger than a
speck; it is no ruled line and does not only hang in from the edge. Paper may have any colour, writing may be darker
or lighter than it. In doubt there is writing: a made-up word can be seen and thrown away, a lost line cannot.
"""

import itertools
import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.ocr.domain import Line

Plane = NDArray[np.float32]
Levels = NDArray[np.uint8]  # grey levels; ~ turns dark into light
Mask = NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)

# All numbers were set on 7,800 real and rendered lines, changed in many ways, and as many generated empty ones.

# The shorter side is brought down to fewer than twice so many pixels, the longer one to fewer than twice _LONG_SIDE:
# strokes are then a few pixels wide, and much of the noise is averaged away.
_SHORT_SIDE = 64
_LONG_SIDE = 1024
# A mark differs from its surroundings by so many of 256 grey levels. JPEG blocks and the grain of clean paper stay
# below 8, the lightest pencil is some 20.
_CONTRAST = 9.0
# ... or in one colour alone by so many: rules and stains differ a little in colour from any paper.
_COLOUR_CONTRAST = 30.0
# ... and by so many times what the paper itself shows there, which its noise makes some 2 standard deviations.
_OVER_PAPER = 4.0
# ... unless the paper is so free of noise that what it shows must be strokes: this many standard deviations.
_OVER_NOISE = 20.0
# In lines of fewer pixels height, strokes cannot be told from noise and rules.
_LOW = 24
# Scanners that sharpen, and image libraries, draw light edges along dark rules: of their contrast, so much.
_HALO = 0.3
# Parts of the line's height: the surroundings that a mark is compared with, and the window marks are counted in.
_SURROUNDINGS = 1 / 3
_WINDOW = 0.14
# How much of such a window marks must fill; less is a speck. A full stop a twentieth of the height wide does.
_FILLED = 0.07
# The outer part of the image (of its shorter side) where marks that hang in from the edge do not count, such as the
# corner of the sheet or the tails of the line above.
_OUTER = 1 / 5
# A ruled line covers so much of a stretch of paper four heights wide, or of a shorter one; it leans by so much at
# most, and is so thick (of the height).
_RULE_COVERAGE, _RULE_COVERAGE_SHORT = 0.6, 0.95
_RULE_SLOPE = 0.06
_RULE_THICKNESS = 0.1


def is_blank(line: Line) -> bool:
    """Whether the image holds no writing. Takes a few milliseconds, whatever the size of the image."""
    image = Image.frombytes("RGB", (line.width, line.height), line.pixels)
    down = max(1, min(line.width, line.height) // _SHORT_SIDE)
    image = image.reduce((max(down, line.width // _LONG_SIDE), max(down, line.height // _LONG_SIDE)))
    if _has_writing(np.asarray(image.convert("L"), np.float32), _CONTRAST):
        return False
    # Ink of another colour may be as bright as its paper.
    colours = np.asarray(image, np.float32)
    return not any(_has_writing(colours[..., channel], _COLOUR_CONTRAST) for channel in range(3))


def _has_writing(plane: Plane, least: float) -> bool:
    """plane: [height, width], 0 to 255. least: contrast that marks must have."""
    plane = _smooth(plane)
    if float(plane.max() - plane.min()) < least:
        return False
    reach = max(3, round(plane.shape[0] * _SURROUNDINGS / 2))
    if _light_on_dark(plane, reach):
        plane = 255 - plane
    noise = _noise(plane)
    levels = plane.round().astype(np.uint8)
    # Grey-scale closing: what dark marks stand on. Where there are no marks, opening it finds light ones; not on the
    # plane itself, where the paper between two ruled lines would be one.
    ground = _least(~_least(~levels, reach), reach)
    dark = ground - levels
    threshold = _CONTRAST
    if plane.shape[0] >= _LOW:
        paper = _OVER_PAPER * float(np.median(dark[::2, ::2]))
        threshold = max(threshold, min(paper, _OVER_NOISE * noise))
    if _holds_marks(dark, threshold, least):
        return True
    halo = _HALO * float(np.quantile(dark[::2, ::2], 0.98))
    return _holds_marks(ground - ~_least(~_least(ground, reach), reach), threshold, max(least, halo))


def _smooth(plane: Plane) -> Plane:
    """Weights 1 2 1 both ways."""
    for axis in (0, 1):
        first, middle, last = _shifted(np.pad(plane, _sides(axis, 1, 1), mode="edge"), axis, 3)
        plane = ((first + 2 * middle + last) / 4).astype(np.float32, copy=False)
    return plane


def _light_on_dark(plane: Plane, side: int) -> bool:
    """Whether what stands out is lighter than its surroundings: the skewness within small squares says so."""
    height, width = (max(1, size // side) for size in plane.shape)
    squares = plane[: height * side, : width * side]
    squares = squares.reshape(height, squares.shape[0] // height, width, squares.shape[1] // width)
    apart = squares - squares.mean((1, 3), keepdims=True)
    return bool((apart * apart * apart).mean() > 0)


def _noise(plane: Plane) -> float:
    """Standard deviation of the noise in a smoothed plane, from the differences of neighbours.

    The quarter that differs least is taken, so that three quarters of the pairs may lie on the edges of strokes. A
    quarter of the absolute values of a normal distribution are below 0.3186 standard deviations; neighbours in
    smoothed noise have a correlation of 2/3, their difference therefore sqrt(2/3) of its standard deviation.
    """
    steps = (np.diff(plane, axis=axis) for axis in (0, 1))
    least = min(float(np.quantile(np.abs(step), 0.25)) for step in steps if step.size)
    return least / 0.3186 / math.sqrt(2 / 3)


def _least(plane: Levels, reach: int) -> Levels:
    """Minimum over the square of 2 * reach + 1 pixels around each; what is outside the image does not count."""
    for axis in (0, 1):
        plane = np.pad(plane, _sides(axis, reach, reach), constant_values=255)
        covered, wanted = 1, 2 * reach + 1
        while covered < wanted:
            step = min(covered, wanted - covered)
            plane = np.minimum(*_shifted(plane, axis, step + 1)[::step])
            covered += step
    return plane


def _sides(axis: int, before: int, after: int) -> list[tuple[int, int]]:
    return [(before, after) if a == axis else (0, 0) for a in (0, 1)]


def _shifted(plane: NDArray[T], axis: int, count: int) -> list[NDArray[T]]:
    """`count` views of the plane, each a pixel further along the axis."""
    size = plane.shape[axis] - count + 1
    return [plane[n : n + size] if axis == 0 else plane[:, n : n + size] for n in range(count)]


def _holds_marks(contrast: Levels, threshold: float, least: float) -> bool:
    """Whether there are marks when ruled lines, specks and what hangs in from the edge are taken away.

    contrast: how far each pixel is from its ground; threshold: what is more than paper; least: what marks must have.
    """
    mask = contrast > threshold
    if not mask.any():
        return False
    height, width = mask.shape
    outer = int(_OUTER * min(height, width))
    inner = np.zeros_like(mask)
    inner[outer : height - outer, outer : width - outer] = True
    everything = mask.copy()
    if height >= _LOW:
        mask &= ~_rules(everything)
        if width >= 2 * height:  # else an upright line may well be an "l"
            mask &= ~_rules(everything.T).T
    # The blur around a mark is not the mark: half of the strongest contrast near by.
    contrast = np.where(mask, contrast, np.uint8(0))
    mask &= contrast > least
    strongest = ~_least(~contrast, 3)
    mask &= contrast > strongest - strongest // 2
    if _fills_a_window(mask & inner, height):
        return True
    return _fills_a_window(mask & ~_hanging_in(everything & ~inner), height)


def _fills_a_window(mask: Mask, height: int) -> bool:
    side = max(3, round(_WINDOW * height))
    sums = np.pad(mask, ((1, side), (1, side))).cumsum(0, np.int32).cumsum(1, np.int32)
    filled = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return bool(filled.max() >= max(3.0, _FILLED * side * side))


def _hanging_in(mask: Mask) -> Mask:
    """The part of the mask that is connected with the image's edge."""
    reached = mask.copy()
    reached[1:-1, 1:-1] = False
    count = 0
    while (now := int(reached.sum())) > count:
        count = now
        for axis in (0, 1):
            before, middle, after = _shifted(np.pad(reached, _sides(axis, 1, 1)), axis, 3)
            reached = (before | middle | after) & mask
    return reached


def _rules(mask: Mask) -> Mask:
    """The part of the mask that lies on nearly level, parallel lines through the whole width."""
    height, width = mask.shape
    rules = np.zeros_like(mask)
    borders = np.linspace(0, width, max(1, width // (4 * height)) + 1).astype(int)
    thickest = max(4, round(_RULE_THICKNESS * min(height, width)))
    for begin, end in itertools.pairwise(borders):
        stretch = end - begin
        needed = (_RULE_COVERAGE if stretch >= 4 * height else _RULE_COVERAGE_SHORT) * stretch
        shift = max(1, round(_RULE_SLOPE * stretch))
        ys, xs = np.nonzero(mask[:, begin:end])
        if len(ys) < needed:
            continue
        # The row of each pixel if lines that fall by so much over the stretch were level. At the right fall, lines
        # pile up in the fewest rows.
        falls = np.arange(-shift, shift + 1)
        along = np.arange(stretch)
        levels = [ys + (shift - along * fall // stretch)[xs] for fall in falls]
        piles = [np.bincount(level, minlength=height + 2 * shift + 1) for level in levels]
        best = int(np.argmax([np.square(pile, dtype=np.int64).sum() for pile in piles]))
        on_line = _thin(piles[best] >= needed, thickest)[levels[best]]
        rules[ys[on_line], begin + xs[on_line]] = True
    return rules


def _thin(covered: Mask, thickest: int) -> Mask:
    """The runs of at most `thickest` rows, with two rows of soft edge on either side."""
    edges = np.flatnonzero(np.diff(np.pad(covered, 1).astype(np.int8)))
    thin = np.zeros_like(covered)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin <= thickest:
            thin[max(0, begin - 2) : end + 2] = True
    return thin
