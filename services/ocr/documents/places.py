"""Documents under way at a time: the others wait in order of priority and age, or are refused when too many wait."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from services.kit import faults
from services.kit.admission import Admission, Priority, Ticket


class Place:
    """One document's place, from admission until it is left. Use as a context manager."""

    def __init__(self, ticket: Ticket, leave: Callable[["Place"], None], clock: Callable[[], float]) -> None:
        self.ticket = ticket
        self._clock = clock
        self.completed = False  # set when the document was read to its end: teaches how long pages take
        self._leave = leave
        self._positions: deque[int] = deque(maxlen=1)
        self._changed = asyncio.Event()

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self)

    @property
    def granted(self) -> bool:
        """Whether the document may begin."""
        return self.ticket.granted_at is not None

    @property
    def queue_ms(self) -> float:
        """Milliseconds from admission until the document could begin; 0 before that."""
        granted_at = self.ticket.granted_at
        return 0.0 if granted_at is None else (granted_at - self.ticket.entered_at) * 1000

    @property
    def run_ms(self) -> float:
        """Milliseconds since then; 0 before that."""
        granted_at = self.ticket.granted_at
        return 0.0 if granted_at is None else (self._clock() - granted_at) * 1000

    async def next_position(self) -> int | None:
        """Wait until something changes: how many documents stand before this one now, None once it may begin."""
        while not self.granted and not self._positions:
            self._changed.clear()
            await self._changed.wait()
        return None if self.granted else self._positions.popleft()

    def tell(self, position: int | None) -> None:
        """Called by `Places`; of several positions not yet read the newest counts."""
        if position is not None:
            self._positions.append(position)
        self._changed.set()


class Places:
    """The documents of one service.

    at_a_time: documents under way. queue_limit: documents that may wait besides. queue_bytes_limit: bytes of files
    that may wait.
    """

    def __init__(
        self,
        *,
        at_a_time: int,
        queue_limit: int,
        queue_bytes_limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = Admission(
            slots=at_a_time, queue_limit=queue_limit, queue_bytes_limit=queue_bytes_limit, clock=clock
        )
        self._clock = clock
        self._waiting: dict[Ticket, Place] = {}
        self._told: dict[Ticket, int] = {}

    @property
    def waiting_count(self) -> int:
        return self._admission.waiting_count

    @property
    def running_count(self) -> int:
        return self._admission.running_count

    def enter(self, *, priority: Priority, time_left_s: float | None, size_bytes: int) -> Place:
        """Admit a document or raise Fault: QUEUE_FULL, QUEUE_BYTES_FULL or DEADLINE_TOO_SHORT.

        A document costs as much as its pages, which are not counted before it begins: until then it counts as one.
        """
        ticket = self._admission.enter(priority=priority, cost=1.0, time_left_s=time_left_s)
        place = Place(ticket, self._left, self._clock)
        try:
            self._admission.make_eligible(ticket, size_bytes)
        except BaseException:
            self._admission.leave(ticket)
            raise
        self._waiting[ticket] = place
        self._pump()
        return place

    def check_deadline(self, place: Place, *, page_count: int, time_left_s: float | None) -> None:
        """The document has so many pages to read; raises Fault (DEADLINE_TOO_SHORT) when that will take too long."""
        place.ticket.cost = float(page_count)
        needed = self._admission.seconds_for(place.ticket.cost)
        if time_left_s is not None and time_left_s <= needed:
            raise faults.deadline_too_short(
                f"the deadline leaves {time_left_s * 1000:.0f} ms and {page_count} pages need about"
                f" {needed * 1000:.0f} ms; read fewer pages a call",
                time_left_ms=f"{time_left_s * 1000:.0f}",
                expected_ms=f"{needed * 1000:.0f}",
                page_count=page_count,
            )

    def _left(self, place: Place) -> None:
        self._waiting.pop(place.ticket, None)
        self._told.pop(place.ticket, None)
        self._admission.leave(place.ticket, completed=place.completed)
        self._pump()

    def _pump(self) -> None:
        while (ticket := self._admission.grant_next()) is not None:
            self._told.pop(ticket, None)
            self._waiting.pop(ticket).tell(None)
        for ticket, position in self._admission.positions():
            if ticket in self._waiting and self._told.get(ticket) != position:
                self._told[ticket] = position
                self._waiting[ticket].tell(position)
