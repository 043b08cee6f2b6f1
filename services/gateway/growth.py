"""Whether more calls come than there is room for, seen while the queue is short.

Callers that each wait for their answer come at once and make a queue that stays as long as they are many: nothing is
wrong with that. Callers that come whatever became of those before them make one that grows on and on. So it is not how
long a queue is that tells, but that it goes on growing for longer than callers take to come together.

Pure bookkeeping, with a clock from outside.
"""

import math
from dataclasses import dataclass

# Seconds that callers who come together may take to come; the interval of controlled delay (K. Nichols and V. Jacobson,
# RFC 8289), which is as long as the world's slow round trips.
TOGETHER_S = 0.1


@dataclass(slots=True)
class Growth:
    """Of one number of calls that wait, from when there are any on."""

    _peak: int = 0
    _began: float = 0.0  # when this rise began, in seconds of the clock, and how many waited then
    _from: int = 0
    _last: float = -math.inf  # when it last rose

    def goes_on(self, waiting: int, now: float, *, for_s: float, by: float, a_second: float) -> bool:
        """Note that so many wait now; whether they have become more for at least `for_s` seconds.

        By at least `by`, that is, and as fast as `a_second`. A pause of as long ends a rise. Fewer than there were
        before are no rise.
        """
        if waiting <= self._peak:
            return False
        if now - self._last > for_s:
            self._began, self._from = now, waiting
        self._peak, self._last = waiting, now
        rising_s = now - self._began
        return rising_s >= for_s and waiting - self._from >= max(by, a_second * rising_s)
