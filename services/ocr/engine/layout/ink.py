"""Which pixels of a page are ink: darker (or lighter) than the paper around, and no ruled line."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.detector import Rgb

Mask = npt.NDArray[np.uint8]

SOLID = 92  # percentile of the contrast inside cores, of which strokes cover a quarter or so, that is solid ink
SHARE = 0.45  # a pixel is ink from this share of solid ink's contrast, about the middle of a stroke's edge
NOISE = 3.0  # and from so many standard deviations of the paper
FAINT = 0.5  # share of that threshold from which a pixel may belong to a rule, so that faint rules do not fall apart
ALONG = 0.25  # heights of a line to average along a rule
THIN = 0.2  # a rule is thinner than this share of a line's height
THICKEST = 12  # pixels
STRAIGHT = 2.5  # heights of a line that no stroke runs straight for
LEANS = np.arange(-4.0, 4.01, 0.25)  # degrees that rules may lean against the writing
SAMPLE = 60_000  # pixels that are enough to tell how the rules lean


def ink_of(view: Rgb, inside: Mask, height: float) -> Mask:
    """1 where there is ink. `inside` is 1 in the cores, of the view's size; `height` is a line's, in its pixels."""
    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)
    contrast = _contrast(grey, height)
    among = contrast[inside > 0]
    if not len(among):
        return np.zeros_like(grey, dtype=np.uint8)
    low, high = np.percentile(among, (100 - SOLID, SOLID))
    if -low > high:  # light on dark
        contrast, among, high = -contrast, -among, -low
    paper = among[among < 0]
    noise = float(np.sqrt(np.mean(paper * paper))) if len(paper) else 0.0
    threshold = max(min(max(SHARE * high, NOISE * noise), 0.8 * high), 0.02)
    mask = (contrast > threshold).astype(np.uint8)
    # Noise breaks faint rules: average along them before asking whether there is one.
    along = max(3, round(ALONG * height))
    least = max(FAINT * threshold, 0.02)
    rules = np.zeros_like(mask)
    for level in (True, False):
        mean = cv2.blur(contrast, (along, 1) if level else (1, along))
        faint = (mean > least).astype(np.uint8)
        if level:
            rules |= _less_crossings(rules_of(faint, inside, height), mask)
        else:
            across, cores, ink = (np.ascontiguousarray(image.T) for image in (faint, inside, mask))
            rules |= _less_crossings(rules_of(across, cores, height), ink).T
    return _without(mask, rules)


def _less_crossings(rules: Mask, mask: Mask) -> Mask:
    """The level rules less the ink that runs on above or below: it belongs to strokes across them."""
    own = mask & rules
    total, thickness = int(own.sum()), 1
    if not total:
        return rules
    # Rules are as thick as the most of their ink is.
    while thickness < THICKEST and _tall(own, thickness + 1).sum() > 0.5 * total:
        thickness += 1
    return rules & (1 - _tall(mask, thickness + 2))


def _tall(mask: Mask, height: int) -> Mask:
    """What runs upright for so many pixels."""
    return _uint8(cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((height, 1), np.uint8)))


def rules_of(mask: Mask, inside: Mask, height: float) -> Mask:
    """1 where something thin runs nearly level and straight for longer than any stroke: rules, margins, tables."""
    long, thick = max(24, round(STRAIGHT * height)), max(6, round(THIN * height))
    if mask.shape[1] < long:
        return np.zeros_like(mask)
    slope = _slope(mask & (1 - _tall(mask, thick)), inside, height)
    # What leans by a fraction of a degree leaves its row of pixels now and then: thicken it first.
    level = _shear(_uint8(cv2.dilate(mask, np.ones((3, 1), np.uint8))), -slope)
    runs = _uint8(cv2.morphologyEx(level, cv2.MORPH_OPEN, np.ones((1, long), np.uint8)))
    return _shear(runs & (1 - _tall(runs, thick)), slope)


def _slope(mask: Mask, inside: Mask, height: float) -> float:
    """Rows that a rule falls a column: the lean whose level sums over the ink beside the writing are the sharpest."""
    reach = max(3, round(1.2 * height))
    writing = _uint8(cv2.dilate(inside, np.ones((reach, reach), np.uint8)))
    ys, xs = np.nonzero(mask & (1 - writing))
    if len(ys) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(ys), SAMPLE, replace=False)
        ys, xs = ys[chosen], xs[chosen]
    best, slope = -1.0, 0.0
    # From level outwards, so that of equals the least lean wins.
    for lean in sorted(np.tan(np.radians(LEANS)), key=abs):
        sums = np.bincount((ys - lean * xs + mask.shape[1] * 0.1).astype(np.int64).clip(0))
        sharpness = float(np.square(sums, dtype=np.float64).sum()) if len(ys) else 0.0
        if sharpness > best:
            best, slope = sharpness, float(lean)
    return slope


def _shear(mask: Mask, slope: float) -> Mask:
    """Move every column down by `slope` times its number."""
    if not slope:
        return mask
    matrix = np.array([[1.0, 0.0, 0.0], [slope, 1.0, 0.0]])
    return _uint8(cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST))


def _uint8(image: Any) -> Mask:
    """What OpenCV answers for 8-bit images, with its true type."""
    answer: Mask = image
    return answer


def _without(mask: Mask, rules: Mask) -> Mask:
    """The ink less the rules. Strokes that crossed one stay whole: gaps with ink on both sides are closed again."""
    if not rules.any():
        return mask
    left: Mask = mask & (1 - rules)
    mended = _uint8(cv2.morphologyEx(left, cv2.MORPH_CLOSE, np.ones((5, 3), np.uint8)))
    whole: Mask = left | (mended & rules & mask)
    return whole


def _contrast(grey: npt.NDArray[np.uint8], height: float) -> npt.NDArray[np.float32]:
    """How much darker than the paper around, as a share of the paper's brightness: the same in light and in shade."""
    # Paper is the median of a neighbourhood of some two lines, of which ink covers far less than half.
    small = cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA) if min(grey.shape) >= 8 else grey
    window = min(255, max(5, round(height / 2) | 1))
    paper = cv2.resize(cv2.medianBlur(small, window), grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    light = np.maximum(paper, 16).astype(np.float32)
    return (light - grey) / light
