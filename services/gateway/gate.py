"""The door of one pool: who goes in, who waits, and who is refused before it costs anything.

Pure bookkeeping without asyncio, and with a clock from outside; services.gateway.overload makes calls wait.
"""

from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.fairness import FairQueue, Waiting
from services.gateway.growth import TOGETHER_S, Growth
from services.gateway.limiter import NOTHING_SAID, AdaptiveLimit, Said
from services.kit import faults
from services.kit.admission import Priority

# Of a call's own time, how long a call may have to wait in overload.
OVERLOAD_SHARE = 0.25
# By so many calls a queue has to grow, and by so many times the limit, for its growth to say anything.
_GROWS_LEAST = 12
_GROWS_TIMES = 2
# And as fast as three times the capacity makes it grow: the callers of a gateway that died come to another over some
# tenths of a second, too, and then wait for their answers. What is offered beyond that comes to the bounds soon enough.
_GROWS_CAPACITIES = 2
# That of all callers has to grow so much longer and by so many more, so that one who asks too much is found before.
_OF_ALL = 1.25
_MOST_OVERLOADING = 1000  # callers that are remembered to ask too much; with more, all do
_RETRY_LEAST_S = 0.1
_RETRY_MOST_S = 30.0
_WEIGHT = 0.1  # of one call in the mean time that calls take


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a gate lets wait.

    queue_limit: calls that may wait. wait_s: the longest that a call is expected to wait. overload_ends_s: a caller
    whose queue went on growing (services.gateway.growth), or whose calls came to one of these bounds, asks for more
    than there is; every caller does if all together did so. From then on only those calls are let in that will wait
    for OVERLOAD_SHARE of the time a call takes, until no call has waited for so many seconds. (As the controlled delay
    of B. Maurer, "Fail at Scale", ACM Queue 2015, but checked at the door, so that who is refused is refused at once;
    and a queue that only stays is no overload: so many callers that each wait for their answer make one, and want it.)
    ageing_s: see FairQueue. stream_limit: calls whose requests are a stream that may be under way.
    """

    queue_limit: int = 256
    wait_s: float = 30.0
    overload_ends_s: float = 1.0
    ageing_s: float = 5.0
    stream_limit: int = 1000


@dataclass(eq=False, slots=True)
class Ticket:
    """One call at the gate."""

    caller: str
    counted: bool  # against the limit
    inside: bool = False
    entered_at: float = 0.0  # seconds of the clock
    granted_at: float = 0.0
    waiting: Waiting | None = None


class Gate:
    """The calls of one pool.

    spread: answers a factor, 1 or more, for the time after which a refused call is told to come back, so that not all
    come back at once.
    """

    def __init__(
        self,
        pool: str,
        bounds: Bounds,
        limit: AdaptiveLimit,
        *,
        clock: Callable[[], float],
        spread: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.pool = pool
        self.adaptive = limit
        self.under_way = 0
        self.streams = 0
        self.endpoints = 0  # that are ready
        self._bounds = bounds
        self._clock = clock
        self._spread = spread
        self._queue = FairQueue(clock=clock, ageing_s=bounds.ageing_s)
        self._tickets: dict[int, Ticket] = {}  # those that wait, by number
        self._mean_s: float | None = None  # that a call takes, once inside
        self._said_s = 0.0  # as above by what the endpoints say; 0 if they do not
        self._growth: dict[str, Growth] = {}  # by caller, of those who wait
        self._growth_of_all = Growth()
        self._overloading: set[str] = set()  # callers
        self._overloaded = False  # all are
        self._empty_since: float | None = clock()  # since when no call waits; None while some do

    @property
    def limit(self) -> int:
        """Calls that may be under way now; 0 while no endpoint is ready."""
        return self.adaptive.limit if self.endpoints else 0

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether a call could go in without waiting."""
        return not self._tickets and self.under_way < self.limit

    def set_endpoints(self, ready: int, said: Said = NOTHING_SAID) -> None:
        """That many endpoints are ready now, and this is what they say of themselves."""
        self.endpoints = ready
        self.adaptive.scale(ready, said)
        # What they say is of a call in a slot; of as many as the limit lets in, some wait there for one.
        self._said_s = said.call_s * max(1.0, self.adaptive.limit / said.slots) if said.slots else 0.0

    def enter(
        self,
        caller: str,
        priority: Priority,
        *,
        time_left_s: float | None,
        counted: bool = True,
        admitted: bool = False,
    ) -> Ticket:
        """Let a call in (`inside`), or let it wait; raises Fault if it can do neither.

        time_left_s: until its deadline. counted: False for a call whose requests are a stream: how long it takes is up
        to its caller, so it is bounded by number and does not wait. admitted: it was let in before, here or elsewhere,
        so it is not refused.

        OVERLOADED: QUEUE_FULL, CALLER_QUEUE_FULL, WAIT_TOO_LONG or TOO_MANY_STREAMS; DEADLINE: DEADLINE_TOO_SHORT.
        """
        now = self._clock()
        ticket = Ticket(caller, counted, entered_at=now)
        if not counted:
            if self.streams >= self._bounds.stream_limit and not admitted:
                raise self._refused(
                    "TOO_MANY_STREAMS",
                    f"{self.streams} streams are open to pool {self.pool} and the limit is {self._bounds.stream_limit}",
                    self._takes_s,
                )
            return self._let_in(ticket, now)
        if self.has_room:
            return self._let_in(ticket, now)
        if not admitted:
            self._look_at_growth(caller, now)
            self._check(caller, priority, time_left_s)
        ticket.waiting = self._queue.enter(caller, priority)
        self._tickets[ticket.waiting.number] = ticket
        self._growth.setdefault(caller, Growth())
        self._note(now)
        return ticket

    def move_in(self, caller: str, *, counted: bool) -> Ticket:
        """A call that was admitted in another pool and is tried again here: inside at once, even over the limit."""
        if counted:
            self._queue.charge(caller)
        now = self._clock()
        return self._let_in(Ticket(caller, counted, entered_at=now), now)

    def grant_next(self) -> Ticket | None:
        """Let the next call in that waits; None if there is no place or nobody waits."""
        if self.under_way >= self.limit:
            return None
        waiting = self._queue.take()
        if waiting is None:
            return None
        now = self._clock()
        ticket = self._tickets.pop(waiting.number)
        ticket.waiting = None
        self._left_queue(ticket.caller, now)
        return self._let_in(ticket, now)

    def leave(self, ticket: Ticket, *, completed: bool = False) -> None:
        """The call is over here, or gave up waiting; without effect the second time.

        completed: it was answered, so that it says how long calls take.
        """
        now = self._clock()
        if ticket.waiting is not None:
            self._queue.leave(ticket.waiting)
            del self._tickets[ticket.waiting.number]
            ticket.waiting = None
            self._left_queue(ticket.caller, now)
        elif ticket.inside:
            ticket.inside = False
            if not ticket.counted:
                self.streams -= 1
                return
            self.under_way -= 1
            if completed:
                took = now - ticket.granted_at
                self._mean_s = took if self._mean_s is None else self._mean_s + _WEIGHT * (took - self._mean_s)

    def sample(self, ticket: Ticket, method: str, *, began: float, seconds: float) -> None:
        """Before `leave` of a call that was answered: how long its endpoint took; see AdaptiveLimit.sample."""
        if ticket.inside and ticket.counted:
            self.adaptive.sample(
                method, began=began, seconds=seconds, under_way=self.under_way, waiting=len(self._queue)
            )

    def expected_wait_s(self, caller: str, priority: Priority) -> float:
        """How long a new call of that caller would wait; 0 while nothing is known of how long calls take."""
        if not self.limit:
            return 0.0
        return (self._queue.ahead_of(caller, priority) + 1) * self._takes_s / self.limit

    @property
    def _takes_s(self) -> float:
        # That a call takes, once inside; 0 while nothing is known of it.
        return self._mean_s if self._mean_s is not None else self._said_s

    def _check(self, caller: str, priority: Priority, time_left_s: float | None) -> None:
        bounds = self._bounds
        waiting = len(self._queue)
        expected = self.expected_wait_s(caller, priority)
        if waiting >= bounds.queue_limit:
            self._overloaded = True
            raise self._refused(
                "QUEUE_FULL",
                f"{waiting} calls wait for pool {self.pool} and the limit is {bounds.queue_limit}",
                expected,
                queue_limit=bounds.queue_limit,
            )
        own = self._queue.waiting_of(caller)
        # As many as there is room for others: however many callers fill the queue, a new one finds a place (the
        # dynamic thresholds of Choudhury and Hahne, 1998).
        if own and own >= bounds.queue_limit - waiting:
            self._asks_too_much(caller)
            raise self._refused(
                "CALLER_QUEUE_FULL",
                f"{own} calls of this caller wait for pool {self.pool}, and one caller may have no more than there are"
                f" places left for others, {bounds.queue_limit - waiting} of {bounds.queue_limit}",
                expected,
                queue_limit=bounds.queue_limit,
            )
        if time_left_s is not None and time_left_s <= expected:
            raise faults.deadline_too_short(
                f"the deadline leaves {time_left_s * 1000:.0f} ms and the wait for pool {self.pool} is about"
                f" {expected * 1000:.0f} ms",
                time_left_ms=f"{time_left_s * 1000:.0f}",
                expected_ms=f"{expected * 1000:.0f}",
            )
        longest = bounds.wait_s
        overload = self._overloaded or caller in self._overloading
        if overload and self._takes_s:
            longest = min(longest, OVERLOAD_SHARE * self._takes_s)
        # Whoever would be next is let wait in any case, so that there is one when a place becomes free.
        if expected > longest and self._queue.ahead_of(caller, priority):
            self._asks_too_much(caller)
            raise self._refused(
                "WAIT_TOO_LONG",
                f"a call would wait about {expected * 1000:.0f} ms for pool {self.pool} and the limit is"
                f" {longest * 1000:.0f} ms" + (" while there are more calls than it can serve" if overload else ""),
                expected,
                limit_ms=f"{longest * 1000:.0f}",
            )

    def _refused(self, reason: str, message: str, expected_s: float, **metadata: object) -> faults.Fault:
        after_s = min(_RETRY_MOST_S, max(_RETRY_LEAST_S, expected_s)) * self._spread()
        return faults.overloaded(
            reason, f"{message}; retry later", retry_after_ms=round(after_s * 1000), pool=self.pool, **metadata
        )

    def _let_in(self, ticket: Ticket, now: float) -> Ticket:
        ticket.inside = True
        ticket.granted_at = now
        if ticket.counted:
            self.under_way += 1
        else:
            self.streams += 1
        return ticket

    def _look_at_growth(self, caller: str, now: float) -> None:
        # A pool that wakes, or whose calls nobody knows, may be waited for by any number.
        takes_s, limit = self._takes_s, self.limit
        if self._overloaded or caller in self._overloading or not takes_s or not limit:
            return
        for_s, by = max(TOGETHER_S, OVERLOAD_SHARE * takes_s), max(_GROWS_LEAST, _GROWS_TIMES * limit)
        a_second = _GROWS_CAPACITIES * limit / takes_s
        own = self._growth.get(caller)  # None for the first that waits
        if own is not None and own.goes_on(
            self._queue.waiting_of(caller) + 1, now, for_s=for_s, by=by, a_second=a_second
        ):
            self._asks_too_much(caller)
            return
        waiting = len(self._queue) + 1 - sum(map(self._queue.waiting_of, self._overloading))
        self._overloaded = self._growth_of_all.goes_on(
            waiting, now, for_s=_OF_ALL * for_s, by=_OF_ALL * by, a_second=a_second
        )

    def _left_queue(self, caller: str, now: float) -> None:
        if not self._queue.waiting_of(caller):
            self._growth.pop(caller, None)
        self._note(now)

    def _note(self, now: float) -> None:
        # A break shorter than overload_ends_s is none.
        if not self._tickets:
            self._growth_of_all = Growth()
            if self._empty_since is None:
                self._empty_since = now
        elif self._empty_since is not None:
            if now - self._empty_since >= self._bounds.overload_ends_s:
                self._overloaded = False
                self._overloading.clear()
            self._empty_since = None

    def _asks_too_much(self, caller: str) -> None:
        self._overloading.add(caller)
        if len(self._overloading) > _MOST_OVERLOADING:
            self._overloading.clear()
            self._overloaded = True


class CallerBound:
    """How many calls one caller may have at the gateway, waiting ones included."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: dict[str, int] = {}

    def enter(self, caller: str) -> None:
        """Count a call in; raises Fault (OVERLOADED, CALLER_LIMIT) if there are too many."""
        calls = self._calls.get(caller, 0)
        if calls >= self._limit:
            raise faults.overloaded(
                "CALLER_LIMIT",
                f"{calls} calls of this caller are under way and the limit is {self._limit}; retry when one has ended",
                retry_after_ms=round(_RETRY_LEAST_S * 1000),
                limit=self._limit,
            )
        self._calls[caller] = calls + 1

    def leave(self, caller: str) -> None:
        """Count a call out."""
        calls = self._calls[caller] - 1
        if calls:
            self._calls[caller] = calls
        else:
            del self._calls[caller]

    def __len__(self) -> int:
        return len(self._calls)
