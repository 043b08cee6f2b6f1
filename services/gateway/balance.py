"""Which endpoint is given the next call: of those that are ready, the one where it is expected to wait least."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.ejection import Standing
from services.gateway.endpoint import Endpoint, State
from services.kit.orca import Load

# What a call is taken to last at an endpoint that has not said, or not learned it yet.
_UNKNOWN_CALL_S = 1.0
_UNKNOWN = Load(slots=1, running=0, waiting=0, wait_s=0.0, call_s=0.0)
# What a cold endpoint is taken to be able to do at first, as a share of what it will.
_COLDEST = 0.1


@dataclass(frozen=True, slots=True)
class BalanceRules:
    """stale_s: seconds after which an endpoint that reported its load and no longer does counts as saturated.
    slow_start_s: seconds over which an endpoint that became ready is given more and more; 0 for everything at once.
    """

    stale_s: float = 5.0
    slow_start_s: float = 10.0


class HasEndpoints(Protocol):
    """A pool, as far as it matters here."""

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """Those in use now."""


Order = tuple[bool, float, float, int, int]


def choose(
    tiers: Iterable[Iterable[HasEndpoints]], tried: Collection[Endpoint], now: float, rules: BalanceRules
) -> Endpoint | None:
    """The endpoint with the least expected wait in the best tier that has a ready one outside `tried`; None without.

    Those left out for their failures are chosen only if there is nothing else in any tier, and those on trial are
    given one call at a time.
    """
    tiers = tuple(tiers)
    for last_resort in (False, True):
        for tier in tiers:
            best: Endpoint | None = None
            least: Order | None = None
            for pool in tier:
                for endpoint in pool.endpoints:
                    if endpoint.state is not State.READY or endpoint in tried:
                        continue
                    if not last_resort and not _welcome(endpoint):
                        continue
                    order = _order(endpoint, now, rules)
                    if least is None or order < least:
                        best, least = endpoint, order
            if best is not None:
                return best
    return None


def expected_wait_s(endpoint: Endpoint, now: float, rules: BalanceRules) -> float:
    """Seconds that a call sent to this endpoint now is expected to wait there before it is worked on.

    The report of the endpoint says how it stood; calls that this gateway has begun and ended since then are added. An
    endpoint that reports nothing is taken to work on one call of ours at a time. A cold one is taken to have only some
    of its slots, at least one, and to be slower by as much.
    """
    return _wait_and_use(endpoint, now, rules)[0]


def stale(endpoint: Endpoint, now: float, rules: BalanceRules) -> bool:
    """Whether its load was reported and no longer is."""
    return endpoint.reporting and now - endpoint.heard_at > rules.stale_s


def _welcome(endpoint: Endpoint) -> bool:
    standing = endpoint.record.standing
    return standing is Standing.IN or (standing is Standing.ON_TRIAL and endpoint.in_flight == 0)


def _order(endpoint: Endpoint, now: float, rules: BalanceRules) -> Order:
    wait_s, use = _wait_and_use(endpoint, now, rules)
    return (stale(endpoint, now, rules), wait_s, use, endpoint.in_flight, endpoint.turn)


def _wait_and_use(endpoint: Endpoint, now: float, rules: BalanceRules) -> tuple[float, float]:
    load = endpoint.load
    if load is None or now - endpoint.heard_at > rules.stale_s:
        load, since = _UNKNOWN, endpoint.in_flight
    else:
        since = endpoint.in_flight - endpoint.in_flight_then
    inside = max(0, load.running + load.waiting + since)
    share = 1.0
    if rules.slow_start_s > 0:
        share = min(1.0, max(_COLDEST, (now - endpoint.ready_at) / rules.slow_start_s))
    slots = max(1.0, load.slots * share)
    use = inside / slots
    queued = inside + 1 - slots
    if queued <= 0:
        return 0.0, use
    call_s = load.call_s or _UNKNOWN_CALL_S
    counted = queued * call_s / slots
    # The endpoint knows what the calls before this one cost; we know only how many they are.
    said = load.wait_s + since * call_s / load.slots if load.wait_s else 0.0
    return max(counted, said) / share, use
