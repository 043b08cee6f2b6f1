"""Upright or upside down: the shape of lines does not tell, reading them does.

The few longest lines are read as if the page stood upright, which is work that has to be done in any case. When they
read surely, that is the answer. Only else are they read turned by 180 degrees too, and the way that the model is surer
of wins. Sureness is the geometric mean of a line's token probabilities, averaged over the lines.
"""

from collections.abc import Sequence

from services.ocr.domain import Layout, LayoutLine, Recognition

PROBE_COUNT = 3
SURE = 0.8
# Turned pages are rarer than bad handwriting: reading turned has to be better by so much.
MARGIN = 0.1


def probes(layout: Layout) -> list[int]:
    """Which lines to read for it: the longest, by the length of their upper edge."""

    def length(index: int) -> float:
        (x0, y0), (x1, y1), *_ = layout.lines[index].polygon
        return float(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)

    return sorted(range(len(layout.lines)), key=length, reverse=True)[:PROBE_COUNT]


def in_doubt(upright: Sequence[Recognition]) -> bool:
    """Whether these readings leave open which way up the page is."""
    return bool(upright) and _sureness(upright) < SURE


def reads_better(turned: Sequence[Recognition], upright: Sequence[Recognition]) -> bool:
    """Whether the page stands upside down, going by both readings of the same lines."""
    return _sureness(turned) > _sureness(upright) + MARGIN


def turned(line: LayoutLine) -> LayoutLine:
    """The same line as it runs when the page is turned by 180 degrees: its text begins at the opposite corner."""
    polygon = (*line.polygon[2:], *line.polygon[:2])
    return LayoutLine(polygon, (line.angle + 360) % 360 - 180, line.score, line.block)


def _sureness(readings: Sequence[Recognition]) -> float:
    # A line without writing says nothing; all of them blank is as unsure as can be.
    told = [r.hypotheses[0].confidence for r in readings if not r.blank and r.hypotheses[0].text.strip()]
    return sum(told) / len(told) if told else 0.0
