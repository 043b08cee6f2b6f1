"""From the text map to cores: pieces of lines, each the narrow band through the middle of some words."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.detector import TextMap
from services.ocr.engine.layout.frame import CORE, SURE, weighted_median

LEAST_AREA = 6  # pixels of the map
# A line's ink is about so many times as high as its core: 2.3 to 3.2 in renderings of 60 handwriting fonts.
LINE_OVER_CORE = 2.5


@dataclass
class Core:
    """A piece of a line in pixels of the text map; the box ends before `right` and `bottom`."""

    label: int  # its value in the label image
    left: int
    top: int
    right: int
    bottom: int
    middle: float  # row of its centre of gravity
    thickness: float  # mean height of its columns
    score: float  # mean of the text map over it


@dataclass
class Cores:
    """All cores of a page. `labels` is [height, width] int32, 0 where there is none."""

    cores: list[Core]
    labels: npt.NDArray[np.int32]
    thickness: float  # the usual one, long cores counting more; 0 without cores


def find_cores(text: TextMap) -> Cores:
    """Threshold the map, part cores that hold two lines, drop what is too small or too doubtful."""
    mask = (text > CORE).astype(np.uint8)
    labels, stats, _ = _components(mask)
    area, width = stats[:, cv2.CC_STAT_AREA], stats[:, cv2.CC_STAT_WIDTH]
    if len(stats) <= 1:
        return Cores([], labels, 0.0)
    usual = weighted_median((area / width)[1:], width[1:].astype(np.float64))
    # Writing that bulges or leans makes the box high but not the columns; two lines grown together do both.
    doubled = (stats[:, cv2.CC_STAT_HEIGHT] > 2.2 * usual) & (area > 1.4 * usual * width)
    doubled[0] = False
    if doubled.any():
        for label in np.flatnonzero(doubled):
            _part(text, labels, stats[label], int(label), usual, mask)
        labels, stats, _ = _components(mask)
    return _measure(text, labels, stats, usual)


def _components(
    mask: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    _, labels, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=4)
    return labels, stats, centres  # type: ignore[return-value]


def _part(
    text: TextMap,
    labels: npt.NDArray[np.int32],
    stats: npt.NDArray[np.int32],
    label: int,
    usual: float,
    mask: npt.NDArray[np.uint8],
) -> None:
    """Cut a core that holds several lines, in place in `mask`: its narrow bridges, or else along its weakest rows."""
    left, top, width, height = (int(value) for value in stats[:4])
    window = np.s_[top : top + height, left : left + width]
    own = (labels[window] == label).astype(np.uint8)
    reach = max(3, round(1.5 * usual))
    opened = cv2.morphologyEx(own, cv2.MORPH_OPEN, np.ones((1, reach), np.uint8))
    count, parts, part_stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    long = sum(int(part[cv2.CC_STAT_WIDTH]) > reach + 1 for part in part_stats[1:])
    if count > 2 and long > 1:
        mask[window][(own == 1) & (opened == 0)] = 0
        return
    # Rows where the text is weakest between two stronger ones, at least a core apart.
    strength = cv2.blur((text[window] * own).sum(axis=1, dtype=np.float32)[:, None], (1, 3))[:, 0]
    apart = max(2, round(0.8 * usual))
    for row in range(apart, height - apart):
        near = strength[max(0, row - apart) : row + apart + 1]
        above, below = strength[:row].max(), strength[row + 1 :].max()
        if strength[row] == near.min() and strength[row] < 0.6 * min(above, below):
            mask[window][row][own[row] == 1] = 0


def _measure(text: TextMap, labels: npt.NDArray[np.int32], stats: npt.NDArray[np.int32], usual: float) -> Cores:
    ys, xs = np.nonzero(labels)
    label = labels[ys, xs]
    area = np.maximum(1, stats[:, cv2.CC_STAT_AREA]).astype(np.float64)
    score = np.bincount(label, text[ys, xs], minlength=len(stats)) / area
    middle = np.bincount(label, ys, minlength=len(stats)) / area
    kept: list[Core] = []
    for number in range(1, len(stats)):
        left, top, width, height, pixels = (int(value) for value in stats[number])
        thickness = pixels / width
        if pixels < LEAST_AREA or score[number] < SURE or thickness < 0.25 * usual:
            continue
        kept.append(
            Core(number, left, top, left + width, top + height, float(middle[number]), thickness, float(score[number]))
        )
    if not kept:
        return Cores([], labels, 0.0)
    widths = np.array([core.right - core.left for core in kept], dtype=np.float64)
    return Cores(kept, labels, weighted_median(np.array([core.thickness for core in kept]), widths))
