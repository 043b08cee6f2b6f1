"""How much of the traffic may be retries, so that a pool in trouble is not buried under second tries."""

from collections.abc import Callable


class RetryBudget:
    """A bucket of retries of one pool: every call that arrives adds `ratio` of one, every retry takes one.

    ratio: retries per call that may be made for ever, 0 to 1. reserve: the most retries saved up; a bucket begins full,
    so that the calls which one killed endpoint took with it may all be retried at once. refill_per_s: retries added
    besides, for pools with few calls. As in gRFC A6 ("throttling configuration"), but for the refill.
    """

    def __init__(self, *, ratio: float, reserve: float, refill_per_s: float, clock: Callable[[], float]) -> None:
        self._ratio = ratio
        self._reserve = reserve
        self._refill_per_s = refill_per_s
        self._clock = clock
        self._filled_at = clock()
        self.left = reserve

    def call(self) -> None:
        """A call arrived; its retries are not calls."""
        self.left = min(self._reserve, self.left + self._ratio)

    def take(self) -> bool:
        """Whether a retry may be made; if so it is paid for."""
        now = self._clock()
        # A clock that was set back adds nothing.
        self.left = min(self._reserve, self.left + max(0.0, now - self._filled_at) * self._refill_per_s)
        self._filled_at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True
