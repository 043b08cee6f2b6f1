"""What sizes of an axis a target is tuned for."""

import math

from services.runtimes.artifacts.manifest import Axis


def sizes(axis: Axis, *, high: int | None = None, optimal: int | None = None) -> tuple[int, int, int]:
    """The smallest size of an axis, the one to tune for, and the largest.

    high: the most that the request asks for; it never widens what was verified. The optimum is the size with the same
    ratio to both ends unless one is given: an axis of 1 to 64 is tuned for 8.
    """
    top = axis.high if high is None else max(axis.low, min(axis.high, high))
    middle = round(math.sqrt(max(axis.low, 1) * top)) if optimal is None else optimal
    return axis.low, max(axis.low, min(middle, top)), top
