"""The outline of each line: the smallest box along the line that holds its own ink."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.cores import LINE_OVER_CORE
from services.ocr.engine.layout.ink import Mask
from services.ocr.engine.layout.lines import Row

Floats = npt.NDArray[np.float64]

BODY = 1.3  # ink of a stroke that runs through a line's core counts up to so many heights of a line from its middle
LOOSE = 0.8  # dots and accents, up to so many from the middle
BESIDE = 0.7  # and up to so many beside the ends
SPECK = 0.003  # a loose piece of ink is dirt below this share of the height squared (the dot of an i has 0.006)
# A line's own lean is taken to have a standard deviation of 1 degree about the page's skew, and what its cores show of
# it an error of 6 degrees over its length in heights: a short line is believed less than the page.
ERROR = 6.0
STEEPEST = 5.0  # degrees that a line may differ from the page's skew


@dataclass(frozen=True)
class Outline:
    """Corners [4, 2] in pixels of the view, clockwise from the top left, and the line's lean in degrees clockwise."""

    corners: Floats
    lean: float


def outlines(rows: Sequence[Row], labels: npt.NDArray[np.int32], ink: Mask) -> list[Outline]:
    """The outline of every row. `labels` [height, width] has the rows' cores, `ink` the same view at least as large."""
    scale = np.array([ink.shape[1] / labels.shape[1], ink.shape[0] / labels.shape[0]])
    curves = [_curve(row, labels) for row in rows]
    pixels = _assign(rows, curves, labels, ink, scale)
    return [
        _box(row, curve, (own + 0.5) / scale, float(0.5 / scale.mean()))
        for row, curve, own in zip(rows, curves, pixels, strict=True)
    ]


def _curve(row: Row, labels: npt.NDArray[np.int32]) -> Floats:
    """The middle of the row's cores at every column of the view, level beyond the ends, [width]."""
    xs: list[Floats] = []
    ys: list[Floats] = []
    curve: Floats
    for core in row.cores:
        own = labels[core.top : core.bottom, core.left : core.right] == core.label
        count = own.sum(axis=0)
        filled = count > 0
        middle: Floats = (own * np.arange(core.top, core.bottom)[:, None]).sum(axis=0)[filled] / count[filled]
        xs.append((np.flatnonzero(filled) + core.left).astype(np.float64))
        ys.append(middle)
    x, y = np.concatenate(xs), np.concatenate(ys)
    order = np.argsort(x, kind="stable")
    dense = np.interp(np.arange(row.left, row.right), x[order], y[order])
    # Ascenders and descenders make the core's middle swing: average over some letters.
    window = max(1, round(LINE_OVER_CORE * row.thickness))
    padded = np.pad(dense, window, mode="edge")
    sums = np.cumsum(np.concatenate([[0.0], padded]))
    span = 2 * window + 1
    smooth = (sums[span:] - sums[:-span]) / span
    curve = np.interp(np.arange(labels.shape[1]), np.arange(row.left, row.right), smooth)
    return curve


def _assign(
    rows: Sequence[Row], curves: Sequence[Floats], labels: npt.NDArray[np.int32], ink: Mask, scale: Floats
) -> list[Floats]:
    """The ink pixels (x, y) of every row, by connected pieces; a piece that runs through several rows is shared out."""
    count, pieces, stats, centres = cv2.connectedComponentsWithStats(ink, connectivity=8)
    ys, xs = np.nonzero(pieces)
    piece = pieces[ys, xs]
    order = np.argsort(piece, kind="stable")
    ys, xs, piece = ys[order], xs[order], piece[order]
    starts = np.searchsorted(piece, np.arange(count + 1))
    points = np.stack([xs, ys], axis=1)

    row_of = np.zeros(int(labels.max()) + 1, dtype=np.int32)
    for number, row in enumerate(rows, start=1):
        for core in row.cores:
            row_of[core.label] = number
    across = np.minimum((xs / scale[0]).astype(np.int64), labels.shape[1] - 1)
    down = np.minimum((ys / scale[1]).astype(np.int64), labels.shape[0] - 1)
    row_at = row_of[labels[down, across]]
    touching = np.unique(piece[row_at > 0].astype(np.int64) * (len(rows) + 1) + row_at[row_at > 0])
    touched_piece, touched_row = touching // (len(rows) + 1), touching % (len(rows) + 1) - 1

    own: list[list[Floats]] = [[] for _ in rows]
    firsts = np.flatnonzero(np.diff(touched_piece, prepend=-1))
    for first, end in zip(firsts, [*firsts[1:], len(touched_piece)], strict=True):
        number = int(touched_piece[first])
        candidates = touched_row[first:end]
        part = slice(int(starts[number]), int(starts[number + 1]))
        distance = np.stack(
            [
                np.abs(ys[part] / scale[1] - curves[row][across[part]]) / (LINE_OVER_CORE * rows[row].thickness)
                for row in candidates
            ]
        )
        nearest = distance.argmin(axis=0)
        near = distance.min(axis=0) < BODY
        for place, row in enumerate(candidates):
            own[row].append(points[part][near & (nearest == place)])
    _add_loose(rows, curves, own, set(touched_piece.tolist()), stats, centres / scale, points, starts, scale)
    return [np.concatenate(parts).astype(np.float64) if parts else np.empty((0, 2)) for parts in own]


def _add_loose(
    rows: Sequence[Row],
    curves: Sequence[Floats],
    own: list[list[Floats]],
    touched: set[int],
    stats: npt.NDArray[Any],
    centres: Floats,
    points: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    scale: Floats,
) -> None:
    """Give each small piece that no core touches, such as the dot of an i, to the nearest row, in place in `own`."""
    best = np.full(len(stats), np.inf)
    chosen = np.full(len(stats), -1)
    order = np.argsort(centres[:, 1], kind="stable")
    sorted_middles = centres[order, 1]
    wide, high = stats[:, cv2.CC_STAT_WIDTH] / scale[0], stats[:, cv2.CC_STAT_HEIGHT] / scale[1]
    area = stats[:, cv2.CC_STAT_AREA] / (scale[0] * scale[1])
    for number, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        height = LINE_OVER_CORE * row.thickness
        span = slice(
            int(np.searchsorted(sorted_middles, curve.min() - LOOSE * height)),
            int(np.searchsorted(sorted_middles, curve.max() + LOOSE * height)),
        )
        near = order[span]
        x, y = centres[near, 0], centres[near, 1]
        distance = np.abs(y - curve[np.clip(x.astype(np.int64), 0, len(curve) - 1)]) / height
        fits = (
            (distance < np.minimum(LOOSE, best[near]))
            & (x > row.left - BESIDE * height)
            & (x < row.right + BESIDE * height)
            & (wide[near] < 1.5 * height)
            & (high[near] < height)
            & (area[near] > SPECK * height * height)
        )
        best[near[fits]] = distance[fits]
        chosen[near[fits]] = number
    for piece in np.flatnonzero(chosen >= 0):
        if piece and int(piece) not in touched:
            own[chosen[piece]].append(points[starts[piece] : starts[piece + 1]])


def _box(row: Row, curve: Floats, ink: Floats, half: float) -> Outline:
    """The box of the row's ink along the row; of its cores, made as high as lines are, where there is no ink.

    `ink` has the centres of pixels that reach `half` to every side.
    """
    height = LINE_OVER_CORE * row.thickness
    lean = 0.0
    if row.right - row.left > 3 * height:
        x = np.arange(row.left, row.right)
        lean = float(np.degrees(np.arctan(np.polyfit(x - x.mean(), curve[row.left : row.right], 1)[0])))
        error = ERROR * height / (row.right - row.left)
        lean = min(max(lean / (1 + error * error), -STEEPEST), STEEPEST)
    if not len(ink):
        middle = row.middle
        ink = np.array(
            [
                (row.left - 0.3 * height, middle - 0.5 * height),
                (row.right + 0.3 * height, middle + 0.5 * height),
            ]
        )
        lean = 0.0
    cos, sin = math.cos(math.radians(lean)), math.sin(math.radians(lean))
    turned = ink @ np.array([[cos, -sin], [sin, cos]])
    left, top = turned.min(axis=0) - half
    right, bottom = turned.max(axis=0) + half
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    return Outline(corners @ np.array([[cos, sin], [-sin, cos]]), lean)
