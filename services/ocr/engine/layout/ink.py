"""Which pixels of a page are ink: darker (or lighter) than the paper around, and no ruled line."""

import cv2
import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.detector import Rgb

Mask = npt.NDArray[np.uint8]

SOLID = 92  # percentile of the contrast inside cores, of which strokes cover a quarter or so, that is solid ink
SHARE = 0.45  # a pixel is ink from this share of solid ink's contrast, about the middle of a stroke's edge
NOISE = 3.0  # and from so many standard deviations of the paper


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
    threshold = min(max(SHARE * high, NOISE * noise), 0.8 * high)
    mask = (contrast > max(threshold, 0.02)).astype(np.uint8)
    return _without_rules(mask, height)


def _contrast(grey: npt.NDArray[np.uint8], height: float) -> npt.NDArray[np.float32]:
    """How much darker than the paper around, as a share of the paper's brightness: the same in light and in shade."""
    # Paper is the median of a neighbourhood of some two lines, of which ink covers far less than half.
    small = cv2.resize(grey, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA) if min(grey.shape) >= 8 else grey
    window = min(255, max(5, round(height / 2) | 1))
    paper = cv2.resize(cv2.medianBlur(small, window), grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
    light = np.maximum(paper, 16).astype(np.float32)
    return (light - grey) / light


def _without_rules(mask: Mask, height: float) -> Mask:
    """Take out what runs straight for longer than any stroke: rules, margins, the lines of tables."""
    long = max(24, round(2.5 * height))
    rules = np.zeros_like(mask)
    for across in (True, False):
        shape = (1, long) if across else (long, 1)
        wide = np.ones((3, 1) if across else (1, 3), np.uint8)
        # A rule that leans by a degree leaves its row of pixels now and then: thicken it first.
        runs = cv2.morphologyEx(cv2.dilate(mask, wide), cv2.MORPH_OPEN, np.ones(shape, np.uint8))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(runs, connectivity=8)
        along = cv2.CC_STAT_WIDTH if across else cv2.CC_STAT_HEIGHT
        thin = stats[:, cv2.CC_STAT_AREA] < (2 + 0.2 * height) * stats[:, along]
        thin[0] = False
        if count > 1 and thin.any():
            rules |= thin.astype(np.uint8)[labels]
    if not rules.any():
        return mask
    left: Mask = mask & (1 - rules)
    # Strokes that crossed a rule are cut now: close gaps as wide as the rule where ink lies on both sides of it.
    mended = cv2.morphologyEx(left, cv2.MORPH_CLOSE, np.ones((5, 3), np.uint8)).astype(np.uint8, copy=False)
    whole: Mask = left | (mended & rules & mask)
    return whole
