"""Who may come in, and who is next: a bounded, deadline-aware queue ordered by priority and age.

Pure bookkeeping without clocks of its own, threads or asyncio, so that its rules can be tested as properties.
"""

import enum
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.kit import faults


class Priority(enum.IntEnum):
    """How urgent a caller says its call is; sent as metadata `inkwell-priority`."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(eq=False)
class Ticket:
    """One admitted call: first waiting, then in a slot of the engine, then gone."""

    number: int
    priority: Priority
    cost: float
    entered_at: float
    eligible: bool = False  # its input is decoded; until then others may overtake it
    bytes_held: int = 0
    granted_at: float | None = None
    left: bool = field(default=False, repr=False)


class Admission:
    """The door, the queue and the slots of one engine.

    slots: calls the engine works on at a time. queue_limit: calls that may wait besides. queue_bytes_limit: bytes of
    decoded input that may wait. ageing_s: every so many seconds of waiting lift a call by one priority, so that a
    stream of urgent calls cannot starve the others.
    """

    def __init__(
        self,
        *,
        slots: int,
        queue_limit: int,
        queue_bytes_limit: int,
        clock: Callable[[], float],
        ageing_s: float = 5.0,
    ) -> None:
        self.slots = slots
        self.queue_limit = queue_limit
        self.queue_bytes_limit = queue_bytes_limit
        self._clock = clock
        self._ageing_s = ageing_s
        self._numbers = itertools.count(1)
        self._waiting: list[Ticket] = []
        self._running: set[Ticket] = set()
        self._bytes_waiting = 0
        self._pace = _Pace()
        self._call_pace = _Pace()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    def enter(
        self, *, priority: Priority, cost: float, time_left_s: float | None, part_of_admitted: bool = False
    ) -> Ticket:
        """Admit a call or raise Fault: QUEUE_FULL (OVERLOADED) or DEADLINE_TOO_SHORT (DEADLINE).

        cost: work relative to other calls of this service, above 0. time_left_s: until the caller's deadline.
        part_of_admitted: it belongs to a call that was let in before, which bounds how many such parts there are; the
        queue is never full for it, or new callers could keep it out for ever.
        """
        now = self._clock()
        if len(self._waiting) >= self.queue_limit and not part_of_admitted:
            raise faults.overloaded(
                "QUEUE_FULL",
                f"{len(self._waiting)} calls wait already and the limit is {self.queue_limit}; retry later",
                retry_after_ms=self._retry_after_ms(now),
                queue_limit=self.queue_limit,
            )
        if time_left_s is not None:
            needed = self._expected_seconds(cost, now)
            if time_left_s <= needed:
                raise faults.deadline_too_short(
                    f"the deadline leaves {time_left_s * 1000:.0f} ms and the call needs about {needed * 1000:.0f} ms"
                    f" with {len(self._waiting)} calls before it",
                    time_left_ms=f"{time_left_s * 1000:.0f}",
                    expected_ms=f"{needed * 1000:.0f}",
                )
        ticket = Ticket(next(self._numbers), priority, cost, now)
        self._waiting.append(ticket)
        return ticket

    def make_eligible(self, ticket: Ticket, bytes_held: int) -> None:
        """The call's input is ready and held in memory; raises Fault QUEUE_BYTES_FULL when it does not fit."""
        # A single input larger than the bound is let through when nothing else waits: it is within the other limits.
        if self._bytes_waiting and self._bytes_waiting + bytes_held > self.queue_bytes_limit:
            raise faults.overloaded(
                "QUEUE_BYTES_FULL",
                f"the calls that wait hold {self._bytes_waiting} bytes of input and the limit is"
                f" {self.queue_bytes_limit}; retry later",
                retry_after_ms=self._retry_after_ms(self._clock()),
                queue_bytes_limit=self.queue_bytes_limit,
            )
        ticket.bytes_held = bytes_held
        self._bytes_waiting += bytes_held
        ticket.eligible = True

    def grant_next(self) -> Ticket | None:
        """Move the next call into a free slot; None when there is no free slot or nobody ready to take it."""
        if len(self._running) >= self.slots:
            return None
        now = self._clock()
        ticket = min((t for t in self._waiting if t.eligible), key=lambda t: self._order(t, now), default=None)
        if ticket is None:
            return None
        self._stop_waiting(ticket)
        self._running.add(ticket)
        ticket.granted_at = now
        return ticket

    def leave(self, ticket: Ticket, *, completed: bool = False) -> None:
        """The call is over, wherever it stood. `completed` calls teach the estimate how long work takes."""
        if ticket.left:
            return
        ticket.left = True
        if ticket in self._running:
            self._running.remove(ticket)
            if completed and ticket.granted_at is not None:
                now = self._clock()
                self._pace.learn((now - ticket.granted_at) / ticket.cost, now)
                self._call_pace.learn(now - ticket.granted_at, now)
        else:
            self._stop_waiting(ticket)

    def seconds_for(self, cost: float) -> float:
        """How long a call of that cost takes in a slot, going by those before it; 0 while nothing is known."""
        return self._pace.seconds_per_cost(self._clock()) * cost

    def expected_wait_s(self) -> float:
        """Seconds that a call which came now would wait for a slot; 0 with a free one, or while nothing is known."""
        return self._wait_s(self._clock())

    def seconds_per_call(self) -> float:
        """Seconds that a call of usual cost takes in a slot, going by those before it; 0 while nothing is known."""
        return self._call_pace.seconds_per_cost(self._clock())

    def positions(self) -> Iterator[tuple[Ticket, int]]:
        """Every waiting call with the number of calls that stand before it, first to last."""
        now = self._clock()
        yield from ((t, i) for i, t in enumerate(sorted(self._waiting, key=lambda t: self._order(t, now))))

    def _order(self, ticket: Ticket, now: float) -> tuple[int, int]:
        aged = int((now - ticket.entered_at) / self._ageing_s)
        return (-min(int(ticket.priority) + aged, int(Priority.HIGH)), ticket.number)

    def _stop_waiting(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        self._bytes_waiting -= ticket.bytes_held

    def _expected_seconds(self, cost: float, now: float) -> float:
        # Learned times include sharing the engine with slot neighbours.
        return self._pace.seconds_per_cost(now) * cost + self._wait_s(now)

    def _wait_s(self, now: float) -> float:
        if len(self._running) + len(self._waiting) < self.slots:
            return 0.0
        # Work in the slots is counted half done.
        ahead = sum(t.cost for t in self._waiting) + 0.5 * sum(t.cost for t in self._running)
        return self._pace.seconds_per_cost(now) * ahead / self.slots

    def _retry_after_ms(self, now: float) -> int:
        mean_cost = sum(t.cost for t in self._waiting) / max(1, len(self._waiting))
        return max(50, round(1000 * self._pace.seconds_per_cost(now) * mean_cost / self.slots))


class _Pace:
    """Seconds of engine time per unit of cost: a moving average that fades when nothing teaches it.

    Fading matters: a service that refuses every call for its deadline learns nothing, and would refuse for ever on
    the strength of one slow minute.
    """

    _WEIGHT = 0.2
    _HALF_LIFE_S = 30.0

    def __init__(self) -> None:
        self._mean: float | None = None
        self._learned_at = 0.0

    def learn(self, seconds: float, now: float) -> None:
        self._mean = seconds if self._mean is None else self._mean + self._WEIGHT * (seconds - self._mean)
        self._learned_at = now

    def seconds_per_cost(self, now: float) -> float:
        if self._mean is None:
            return 0.0
        return self._mean * math.pow(0.5, (now - self._learned_at) / self._HALF_LIFE_S)
