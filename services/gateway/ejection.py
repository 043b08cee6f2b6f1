"""Endpoints that say they are ready and yet fail their calls: when they are left out, and how they come back.

Pure bookkeeping, without a clock or tasks of its own. An endpoint is left out (ejected) for a time that doubles with
each ejection. Then its health is asked for; if it serves, it is on trial: it is given one call at a time, and a few
that end well bring it back, while one that fails leaves it out again.
"""

import enum
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import grpc

# Ends that speak against an endpoint, when they come from a connection that stands.
_FAILURES = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN))
# Ends that say nothing about it: the caller left, or there is more to do than it can.
_NEITHER = frozenset((grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED))


# Why an endpoint was left out, in `verdict`'s words.
REASONS = ("in a row", "share", "trial")


class Standing(enum.Enum):
    """What an endpoint's calls have earned it."""

    IN = "in"
    EJECTED = "ejected"
    ON_TRIAL = "on_trial"


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """consecutive: failures in a row that eject; 0 ejects nobody. share: or this share of at least `least_calls` recent
    calls. most_ejected: share of a pool's ready endpoints that may be out at a time. Times in seconds.
    """

    consecutive: int = 5
    share: float = 0.5
    least_calls: int = 20
    half_life_s: float = 10.0  # a call of that long ago counts half
    first_s: float = 5.0
    longest_s: float = 60.0
    most_ejected: float = 0.5
    trial_calls: int = 2


def speaks_against(code: grpc.StatusCode, *, said_by_server: bool) -> bool | None:
    """Whether a call that ended so counts as a failure of its endpoint; None if it counts as nothing.

    A deadline that passed without a word from the server counts: an endpoint that hangs shows in nothing else.
    """
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return None if said_by_server else True
    return None if code in _NEITHER else code in _FAILURES


class Record:
    """How the calls of one endpoint ended."""

    def __init__(self, rules: EjectionRules) -> None:
        self._rules = rules
        self.standing = Standing.IN
        self.in_a_row = 0  # failures since the last call that ended well
        self.ejections = 0  # without a long good time in between
        self._back_at = -math.inf  # when it came in last
        self._good = 0.0
        self._bad = 0.0
        self._counted_at = -math.inf
        self._trials_left = 0

    def recent(self, now: float) -> tuple[float, float]:
        """Calls that ended lately, and how many of them badly; older ones count less."""
        self._fade(now)
        return self._good + self._bad, self._bad

    def succeeded(self, now: float) -> bool:
        """Count a call that ended well; True if the endpoint is back in by it."""
        self._fade(now)
        self._good += 1
        self.in_a_row = 0
        if self.standing is not Standing.ON_TRIAL:
            return False
        self._trials_left -= 1
        if self._trials_left > 0:
            return False
        self.standing = Standing.IN
        self._back_at = now
        self._good = self._bad = 0.0
        return True

    def failed(self, now: float) -> None:
        """Count a call that ended badly."""
        self._fade(now)
        self._bad += 1
        self.in_a_row += 1

    def eject(self, now: float) -> float:
        """Leave it out; answers for how many seconds."""
        rules = self._rules
        # A long good time is forgiven everything.
        if self.standing is Standing.IN and now - self._back_at > 5 * rules.longest_s:
            self.ejections = 0
        self.standing = Standing.EJECTED
        seconds = min(rules.longest_s, rules.first_s * 2.0 ** min(self.ejections, 30))
        self.ejections += 1
        self.in_a_row = 0
        return seconds

    def try_again(self) -> None:
        """Its time is over and its health is well: from now on it is on trial."""
        self.standing = Standing.ON_TRIAL
        self._trials_left = self._rules.trial_calls

    def _fade(self, now: float) -> None:
        if now > self._counted_at:
            kept = 0.5 ** ((now - self._counted_at) / self._rules.half_life_s)
            self._good *= kept
            self._bad *= kept
            self._counted_at = now


def verdict(record: Record, others: Collection[Record], now: float, rules: EjectionRules) -> str | None:
    """Why an endpoint whose call has just failed is to be left out ("in a row", "share", "trial"); None if it is not.

    others: those of the same pool that are ready. An endpoint is left out only if it stands out among them: a call that
    fails wherever it goes must not empty the pool, and neither must a network that fails for all.
    """
    if record.standing is Standing.EJECTED or rules.consecutive == 0:
        return None
    if record.standing is Standing.ON_TRIAL:
        return "trial"
    inside = [other for other in others if other.standing is Standing.IN]
    out = len(others) - len(inside)
    if not inside or out + 1 > max(1, int((len(others) + 1) * rules.most_ejected)):
        return None
    theirs = _share(other.recent(now) for other in inside)
    if record.in_a_row >= rules.consecutive and theirs < 0.5:
        return "in a row"
    calls, bad = record.recent(now)
    if calls >= rules.least_calls and bad / calls >= rules.share and theirs < bad / calls / 2:
        return "share"
    return None


def _share(counts: Iterable[tuple[float, float]]) -> float:
    calls = bad = 0.0
    for some, of_them_bad in counts:
        calls += some
        bad += of_them_bad
    return bad / calls if calls else 0.0
