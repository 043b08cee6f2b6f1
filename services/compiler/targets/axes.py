"""What sizes of an axis a target is tuned for."""

import math

from services.runtimes.artifacts.manifest import Axis


def sizes(axis: Axis) -> tuple[int, int, int]:
    """The smallest size of an axis, the one to tune for, and the largest.

    The middle one has the same ratio to both ends: an axis of 1 to 64 is tuned for 8. It is a multiple of what both
    ends are multiples of, so that an axis that is a multiple of another is that in the middle too.
    """
    step = math.gcd(axis.low, axis.high) if axis.low else 1
    middle = round(math.sqrt(max(axis.low, 1) * axis.high) / step) * step
    return axis.low, max(axis.low, min(middle, axis.high)), axis.high
