"""Cores joined into lines, within one block."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.ocr.engine.layout.cores import LINE_OVER_CORE, Core

FAR = 8.0  # heights of a line that may lie between two pieces of one
SCRAP = 0.75  # heights of a line between the middles of a row and a scrap of it
SHARED = 0.5  # least share of the lower piece's height that both have in common


@dataclass
class Row:
    """One line: its cores from left to right."""

    cores: list[Core]

    @property
    def left(self) -> int:
        return min(core.left for core in self.cores)

    @property
    def right(self) -> int:
        return max(core.right for core in self.cores)

    @property
    def middle(self) -> float:
        """Mean row of the cores, wide ones counting more."""
        widths = [core.right - core.left for core in self.cores]
        return float(np.average([core.middle for core in self.cores], weights=widths))

    @property
    def thickness(self) -> float:
        """Mean thickness of the cores, wide ones counting more."""
        widths = [core.right - core.left for core in self.cores]
        return float(np.average([core.thickness for core in self.cores], weights=widths))

    @property
    def score(self) -> float:
        """Mean score of the cores, wide ones counting more."""
        widths = [core.right - core.left for core in self.cores]
        return float(np.average([core.score for core in self.cores], weights=widths))


def rows_of(cores: Sequence[Core], thickness: float) -> list[Row]:
    """Chain the cores of a block from left to right; answers rows from top to bottom."""
    ends: list[Core] = []  # the last core of each row
    rows: list[Row] = []
    spans = np.empty((len(cores), 3))  # of each row's last core: middle, half height, right
    for core in sorted(cores, key=lambda core: (core.left, core.middle)):
        chosen = _row_for(core, spans[: len(rows)], thickness)
        if chosen is None:
            chosen = len(rows)
            rows.append(Row([]))
            ends.append(core)
        rows[chosen].cores.append(core)
        # A scrap at the end of a line says little about where the line runs.
        if core.right - core.left >= thickness or len(rows[chosen].cores) == 1:
            spans[chosen, :2] = core.middle, _half(core, thickness)
        spans[chosen, 2] = max(core.right, spans[chosen, 2] if len(rows[chosen].cores) > 1 else 0)
    return _without_scraps(sorted(rows, key=lambda row: row.middle), thickness)


def _without_scraps(rows: list[Row], thickness: float) -> list[Row]:
    """Drop what is narrower than a line is high and lies within the height of another row: the end of a long stroke."""
    height = LINE_OVER_CORE * thickness
    lefts, rights = np.array([row.left for row in rows]), np.array([row.right for row in rows])
    middles = np.array([row.middle for row in rows])
    kept: list[Row] = []
    for number, row in enumerate(rows):
        near = (
            (np.abs(middles - row.middle) < SCRAP * height)
            & (lefts < row.right)
            & (rights > row.left)
            & (rights - lefts > 2 * (row.right - row.left))
        )
        near[number] = False
        if row.right - row.left >= height or not near.any():
            kept.append(row)
    return kept


def _half(core: Core, thickness: float) -> float:
    """Half the height of a line through this core; one that is thin or thick by chance counts as nearly usual."""
    return 0.5 * LINE_OVER_CORE * min(max(core.thickness, 0.6 * thickness), 2.0 * thickness)


def _row_for(core: Core, spans: np.ndarray, thickness: float) -> int | None:
    """The row whose end shares most of the core's height and lies before it, None for a new row."""
    if not len(spans):
        return None
    half = _half(core, thickness)
    middle, halves, right = spans[:, 0], spans[:, 1], spans[:, 2]
    shared = np.minimum(middle + halves, core.middle + half) - np.maximum(middle - halves, core.middle - half)
    shared = shared / (2 * np.minimum(halves, half))
    width = core.right - core.left
    fits = (
        (shared >= SHARED)
        & (core.left - right < FAR * LINE_OVER_CORE * thickness)
        & (right - core.left < max(0.4 * width, 0.5 * thickness))
    )
    if not fits.any():
        return None
    return int(np.argmax(np.where(fits, shared, -1)))
