"""The level frame: the page turned so that its writing runs level from left to right, at the size to work at."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.detector import Detector, Rgb, TextMap

LOOK_SIDE = 800  # longest side of the first look, which only has to show which way the lines run
CLOSE_SIDE = 1024  # side of the piece looked at closely when the writing is too small for the first look
DIM = 3.0  # thickness in pixels below which cores are not to be trusted
CORE = 0.3  # threshold of rapidocr's config for a pixel of a line's core
SURE = 0.5  # mean over a core below which it is no text (its box_thresh); blank paper alone has up to 0.45
FEW = 4  # cores that the close look must find to be believed
LONG = 3.0  # a core tells its direction when it is so much longer than thick


@dataclass(frozen=True)
class Frame:
    """A view of the page: `forth` takes page coordinates to the view's, `back` the other way; both [2, 3].

    Coordinates count from the outer corner of the top left pixel, so that its centre is (0.5, 0.5).
    """

    width: int
    height: int
    forth: npt.NDArray[np.float64]
    back: npt.NDArray[np.float64]

    def view(self, page: Rgb) -> Rgb:
        """The page as the frame shows it, [height, width, 3]; what lies outside has the page's median colour."""
        scale = math.hypot(self.forth[0, 0], self.forth[1, 0])
        forth = self.forth.copy()
        # Pixels of the page that come to lie between the view's would be lost: average them first.
        shrink = max(1, int(1 / scale))
        if shrink > 1:
            before = page.shape[1], page.shape[0]
            after = max(1, before[0] // shrink), max(1, before[1] // shrink)
            page = cv2.resize(page, after, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
            forth[:, :2] *= np.array(before) / np.array(after)
        # Coordinates are those of the corners of pixels; warpAffine counts from the centres.
        forth[:, 2] += forth[:, :2] @ np.array([0.5, 0.5]) - 0.5
        around = np.median(page.reshape(-1, 3)[:: max(1, page.size // 30_000)], axis=0)
        return cv2.warpAffine(  # type: ignore[return-value]
            page,
            forth,
            (self.width, self.height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=[float(value) for value in around],
        )

    def finer(self, times: float) -> "Frame":
        """The same view so many times as large."""
        width, height = round(self.width * times), round(self.height * times)
        size = np.array([width / self.width, height / self.height])
        return Frame(width, height, self.forth * size[:, None], np.hstack([self.back[:, :2] / size, self.back[:, 2:]]))

    def to_page(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Points [n, 2] of the view as points of the page."""
        return points @ self.back[:, :2].T + self.back[:, 2]


def frame_for(width: int, height: int, clockwise: float, scale: float) -> Frame:
    """The frame of a page of that size that is turned clockwise by so many degrees and scaled, wholly in view."""
    turn = math.radians(clockwise)
    cos, sin = round(math.cos(turn), 12) * scale, round(math.sin(turn), 12) * scale
    new_width = max(1, math.ceil(abs(width * cos) + abs(height * sin) - 1e-6))
    new_height = max(1, math.ceil(abs(width * sin) + abs(height * cos) - 1e-6))
    forth = np.array([[cos, -sin, 0.0], [sin, cos, 0.0]])
    forth[:, 2] = np.array([new_width, new_height]) / 2 - forth[:, :2] @ np.array([width, height]) / 2
    inverse = np.linalg.inv(forth[:, :2])
    back = np.concatenate([inverse, (-inverse @ forth[:, 2])[:, None]], axis=1)
    return Frame(new_width, new_height, forth, back)


@dataclass(frozen=True)
class Direction:
    """Which way the writing runs: `rotation` turns the page upright, then it leans clockwise by `skew`; `thickness`
    is that of the cores, in pixels of the page, 0 when it is not known, and `count` how many cores told it."""

    rotation: int
    skew: float
    thickness: float
    count: int


def direction(page: Rgb, detector: Detector, rotation: int | None) -> Direction:
    """Look at the whole page at a small size. `rotation` is known, or None to choose between 0 and 90."""
    height, width = page.shape[:2]
    scale = min(1.0, LOOK_SIDE / max(height, width))
    whole = frame_for(width, height, rotation or 0, scale)
    angles, lengths, thickness = cores(detector.text_map(whole.view(page)))
    if scale < 1 and (not len(angles) or weighted_median(thickness, lengths) < DIM):
        piece = _busiest(page)
        close = frame_for(piece.shape[1], piece.shape[0], rotation or 0, 1.0)
        closer = cores(detector.text_map(close.view(piece)))
        seen = len(closer[0]) >= FEW
        (angles, lengths, thickness), scale = closer if seen else (angles[:0], lengths[:0], thickness[:0]), 1.0
    if not len(angles):
        return Direction(rotation or 0, 0.0, 0.0, 0)
    found = rotation
    if rotation is None:
        upright = lengths[np.abs(angles) < 45].sum() >= lengths[np.abs(angles) >= 45].sum()
        found = 0 if upright else 90
        # Turned clockwise by 90 degrees, what runs down runs to the left; only the tilt from the axis counts here.
        angles = angles if upright else (angles + 180) % 180 - 90
    near = np.abs(angles) < 45
    # The error of a core's angle falls with its length, so long ones count by the square.
    skew = weighted_median(angles[near], lengths[near] ** 2) if near.any() else 0.0
    return Direction(found or 0, skew, weighted_median(thickness, lengths) / scale, len(angles))


def _busiest(page: Rgb) -> Rgb:
    """The piece of the page, CLOSE_SIDE square at most, where neighbouring pixels differ most."""
    height, width = page.shape[:2]
    best, piece = -1.0, page
    for top in range(0, max(1, height - CLOSE_SIDE // 2), CLOSE_SIDE):
        for left in range(0, max(1, width - CLOSE_SIDE // 2), CLOSE_SIDE):
            part = page[top : top + CLOSE_SIDE, left : left + CLOSE_SIDE]
            green = part[::2, :, 1].astype(np.int16)
            change = float(np.abs(np.diff(green, axis=1)).mean()) if part.shape[1] > 1 else 0.0
            if change > best:
                best, piece = change, part
    return piece


def cores(
    text: TextMap,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Angle (degrees clockwise from level, -90 to 90), length and thickness in pixels of every long core."""
    count, labels, stats, centres = cv2.connectedComponentsWithStats((text > CORE).astype(np.uint8), connectivity=8)
    ys, xs = np.nonzero(labels)
    label = labels[ys, xs]
    dx, dy = xs - centres[label, 0], ys - centres[label, 1]
    area = np.maximum(1, stats[:, cv2.CC_STAT_AREA]).astype(np.float64)
    xx, yy, xy = (np.bincount(label, weight, minlength=count) / area for weight in (dx * dx, dy * dy, dx * dy))
    # Axes of the ellipse with the same second moments; a bar of length l has variance l*l/12 along itself.
    spread = np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    mean = (xx + yy) / 2
    length, thick = np.sqrt(12 * (mean + spread)), np.sqrt(12 * np.maximum(mean - spread, 1 / 12))
    angle = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2
    sure = np.bincount(label, text[ys, xs], minlength=count) >= SURE * area
    told = (length > LONG * thick) & (area >= 12) & sure
    told[0] = False
    return angle[told], length[told], thick[told]


def weighted_median(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> float:
    """The value with half of the weight on either side."""
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)])
