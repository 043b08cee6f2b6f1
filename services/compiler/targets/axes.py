"""What sizes of an axis a target is tuned for."""

import math

from services.runtimes.artifacts.manifest import Axis


def sizes(axis: Axis) -> tuple[int, int, int]:
    """The smallest size of an axis, the one to tune for, and the largest.

    The middle one has the same ratio to both ends: an axis of 1 to 64 is tuned for 8.
    """
    middle = round(math.sqrt(max(axis.low, 1) * axis.high))
    return axis.low, max(axis.low, min(middle, axis.high)), axis.high
