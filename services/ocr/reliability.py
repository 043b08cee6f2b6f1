"""How far confidences can be trusted: fitting a map from confidence to truth, and measuring the error that is left.

The truth of a line is its share of right characters: 1 - edits / characters of its label, at least 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.ocr.engine.calibration import Map

Numbers = NDArray[np.float64]

_ERROR_BINS = 10
# Points of a map: each is the mean of at least so many lines, whose share of right characters scatters by some 0.15
# about what is expected; 40 bring that down to 0.025.
_LINES_A_POINT = 40
_POINTS_MOST = 20
# A map from fewer lines would be of one or two points.
LINES_LEAST = 3 * _LINES_A_POINT


def right_share(edits: int, label: str) -> float:
    """Share of the label's characters that were read right, 0 to 1; label is not empty."""
    return max(0.0, 1 - edits / len(label))


def expected_calibration_error(confidences: Sequence[float], rights: Sequence[float]) -> float:
    """Mean distance between confidence and truth over ten bins of equally many lines each, sorted by confidence.

    Both 0 to 1, one a line; 0 for no lines.
    """
    if not confidences:
        return 0.0
    told, true = _sorted(confidences, rights)
    bins = np.array_split(np.arange(len(told)), min(_ERROR_BINS, len(told)))
    return float(sum(len(b) * abs(told[b].mean() - true[b].mean()) for b in bins) / len(told))


def fit(confidences: Sequence[float], rights: Sequence[float]) -> Map:
    """The map that tells rights from confidences, from at least LINES_LEAST lines.

    Means over equally many lines, made rising by pooling neighbours that are not (isotonic regression). It begins at
    the origin: what is surer of nothing than any line it was fitted on is not to be trusted as much as the worst.
    """
    if len(confidences) < LINES_LEAST:
        raise ValueError(f"{len(confidences)} lines are too few for a calibration; {LINES_LEAST} are the least")
    return _fitted(confidences, rights)


def _fitted(confidences: Sequence[float], rights: Sequence[float]) -> Map:
    told, true = _sorted(confidences, rights)
    pools: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]  # mean confidence, mean truth, lines
    count = min(_POINTS_MOST, max(1, len(told) // _LINES_A_POINT))
    for part in np.array_split(np.arange(len(told)), count):
        pools.append((float(told[part].mean()), float(true[part].mean()), len(part)))
        # Lines of exactly the same confidence belong to one point, too.
        while len(pools) > 2 and (pools[-2][1] >= pools[-1][1] or pools[-2][0] >= pools[-1][0]):
            (left, low, few), (right, high, many) = pools[-2:]
            lines = few + many
            pools[-2:] = [((left * few + right * many) / lines, (low * few + high * many) / lines, lines)]
    # The first pool never joins the origin, but may lie there; and rounding may bring two together.
    points = {round(told, 6): round(true, 6) for told, true, _ in pools}
    return Map(tuple(sorted(points.items())))


def held_out(confidences: Sequence[float], rights: Sequence[float], groups: Sequence[str]) -> list[float]:
    """What each line is told by a map fitted on the lines of all other groups; there are at least two."""
    told: dict[int, float] = {}
    for group in dict.fromkeys(groups):
        others = [n for n, other in enumerate(groups) if other != group]
        line = _fitted([confidences[n] for n in others], [rights[n] for n in others])
        told |= {n: line(confidences[n]) for n, own in enumerate(groups) if own == group}
    return [told[n] for n in range(len(confidences))]


def _sorted(confidences: Sequence[float], rights: Sequence[float]) -> tuple[Numbers, Numbers]:
    told, true = np.asarray(confidences, np.float64), np.asarray(rights, np.float64)
    order = np.argsort(told, kind="stable")
    return told[order], true[order]
