"""Columns and reading order: which cores belong together, from the white between them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.ocr.engine.layout.cores import LINE_OVER_CORE, Core

# Width and length of a gutter, at least, in heights of a line: a narrow one has to run along more lines, because the
# spaces between words may come to lie above each other by chance.
GUTTERS = ((2.2, 3.2), (1.2, 5.0), (0.75, 7.0), (0.5, 9.0))
STRETCH = 1.6  # shortest part of a gutter between two lines that cross it, in heights of a line
CROSSED = 0.35  # share of its length that a gutter may be crossed
COST = 6.0  # how much white outweighs one crossing
NARROW = 1.2  # narrowest column, in heights of a line; what is narrower is a margin note or a number
DEPTH = 8  # columns within columns


def blocks_of(cores: Sequence[Core], thickness: float) -> list[list[Core]]:
    """Split into blocks, in reading order: what spans columns where it stands, each column from top to bottom.

    A gutter is a white strip that many lines have on both sides. Few lines may cross it: a heading ends the columns
    above it and begins new ones below.
    """
    if not cores:
        return []
    return _split(list(cores), thickness * LINE_OVER_CORE, DEPTH)


def _split(cores: list[Core], height: float, depth: int) -> list[list[Core]]:
    gutter = _gutter(cores, height) if depth and len(cores) > 3 else None
    if gutter is None:
        return [cores]
    centre, stretches = gutter
    blocks: list[list[Core]] = []
    above: list[Core] = []
    rest = sorted(cores, key=lambda core: core.middle)
    for start, end in stretches:
        above = [core for core in rest if core.middle < start]
        inside = [core for core in rest if start <= core.middle < end]
        rest = [core for core in rest if core.middle >= end]
        for part in (above, *_sides(inside, centre)):
            if part:
                blocks += _split(part, height, depth - 1)
    if rest:
        blocks += _split(rest, height, depth - 1)
    return blocks


def _sides(cores: Sequence[Core], centre: float) -> tuple[list[Core], list[Core]]:
    left = [core for core in cores if core.left + core.right < 2 * centre]
    return left, [core for core in cores if core.left + core.right >= 2 * centre]


def _gutter(cores: Sequence[Core], height: float) -> tuple[float, list[tuple[float, float]]] | None:
    """The best gutter: the middle of it and the stretches of rows along which it is white; None without one."""
    cell = height / 4
    x0, y0 = min(c.left for c in cores), min(c.middle for c in cores) - height
    columns = int((max(c.right for c in cores) - x0) / cell) + 2
    rows = int((max(c.middle for c in cores) + height - y0) / cell) + 2
    if columns * rows > 4_000_000:
        return None
    text = np.zeros((rows, columns), dtype=bool)
    for core in cores:
        # The ink reaches a little beyond the core, and three quarters of a line up and down, over the white between.
        top, bottom = (core.middle - 0.75 * height - y0) / cell, (core.middle + 0.75 * height - y0) / cell
        text[
            max(0, round(top)) : round(bottom) + 1,
            max(0, int((core.left - x0) / cell)) : int((core.right - x0) / cell) + 1,
        ] = True
    before = np.maximum.accumulate(text, axis=1)
    after = np.maximum.accumulate(text[:, ::-1], axis=1)[:, ::-1]
    best: tuple[float, int, int] | None = None
    for width, length in GUTTERS:
        wide, least = max(1, round(width * 4)), length * 4
        if columns <= wide:
            continue
        sums = np.cumsum(np.pad(text, ((0, 0), (1, 0))), axis=1)
        white = sums[:, wide:] == sums[:, :-wide]  # [rows, first cell of the strip]
        both = before[:, : columns - wide + 1] & after[:, wide - 1 :]
        along = (white & both).sum(axis=0)
        across = (~white & both).sum(axis=0)
        worth = np.where((along >= least) & (across <= CROSSED * along), along - COST * across, -np.inf)
        ties = np.flatnonzero(worth == worth.max())
        first = int(ties[len(ties) // 2])
        # A wider gutter is the surer one, so a narrower has to be clearly better.
        if np.isfinite(worth[first]) and (best is None or worth[first] > best[0] + 4):
            best = (float(worth[first]), first, wide)
    if best is None:
        return None
    _, first, wide = best
    # Lines that end inside the strip do not cross it: cut where the fewest cores are.
    edges = x0 + (first + np.arange(1, 4 * wide) / 4) * cell
    lefts, rights = np.array([core.left for core in cores]), np.array([core.right for core in cores])
    cut = ((lefts[:, None] < edges) & (edges < rights[:, None])).sum(axis=0)
    ties = np.flatnonzero(cut == cut.min())
    centre = float(edges[ties[len(ties) // 2]])
    crossed = np.zeros(rows, dtype=bool)
    for core in cores:
        if core.left < centre < core.right:
            middle = (core.middle - y0) / cell
            crossed[max(0, round(middle - 2)) : round(middle + 2) + 1] = True
    stretches = [(y0 + a * cell, y0 + b * cell) for a, b in _runs(~crossed) if b - a >= STRETCH * 4]
    inside = [core for core in cores if any(start <= core.middle < end for start, end in stretches)]
    for side in _sides(inside, centre):
        if not side or max(core.right for core in side) - min(core.left for core in side) < NARROW * height:
            return None
    return centre, stretches


def _runs(values: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], values.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
