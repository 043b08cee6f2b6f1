"""One call's work in the engine, as its servicer sees it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import msgspec

from services.kit import faults
from services.kit.admission import Ticket
from services.kit.engine_api import Accepted, Cancelled, Failed, Finished, JobEvent, Raw, Update
from services.kit.faults import Fault
from services.kit.tracing import Span


@dataclass(frozen=True)
class Queued:
    """The job waits; `position` calls stand before it."""

    position: int


HostEvent = Queued | Accepted | Update | Finished


class Job:
    """One call's work, from admission to its end. Use as an async context manager and iterate over its events.

    Iterating yields Queued, then Accepted, Update …, and Finished last; it raises Fault when the job fails. Leaving the
    block before the end cancels the job in the engine within one step. Made by `EngineHost.admit`, which passes what to
    do when the job gets its input and when its caller leaves.
    """

    def __init__(
        self,
        job_id: str,
        ticket: Ticket,
        *,
        start: Callable[["Job", msgspec.Struct], None],
        leave: Callable[["Job"], None],
        span: Span | None = None,
    ) -> None:
        """span: of the call that it is part of, None if traces are off."""
        self.id = job_id
        self.ticket = ticket
        self.payload = Raw(b"")
        self.granted_at: float | None = None
        self.finished_at: float | None = None
        self.cancel_sent = False
        self.ended = False
        self.span = span if span is not None and span.recorded else None
        self.waits: Span | None = self.span.begin("queue") if self.span is not None else None
        self.in_engine: Span | None = None
        self._start = start
        self._leave = leave
        self._events: deque[Queued | JobEvent] = deque()
        self._arrived = asyncio.Event()

    def start(self, payload: msgspec.Struct) -> None:
        """Queue the job with its input; raises Fault (QUEUE_BYTES_FULL) when the waiting input is too much."""
        self._start(self, payload)

    def granted(self, at: float) -> None:
        """Called by the host, which is about to give it to the engine. at: on the host's clock."""
        self.granted_at = at
        if self.span is not None:
            if self.waits is not None:
                self.waits.end()
            self.in_engine = self.span.begin("engine")

    def over(self, at: float, error: str = "") -> None:
        """Called by the host, for which it has ended. error: the reason of the fault, if that is how."""
        self.finished_at = at
        for span in (self.waits, self.in_engine):
            if span is not None:
                span.end(error)

    def put(self, event: Queued | JobEvent) -> None:
        """Called by the host. Of several positions not yet read only the newest is kept."""
        if isinstance(event, Queued) and self._events and isinstance(self._events[-1], Queued):
            self._events.pop()
        self._events.append(event)
        self._arrived.set()

    @property
    def queue_ms(self) -> float:
        """Milliseconds from admission until the engine was given the job."""
        return 0.0 if self.granted_at is None else (self.granted_at - self.ticket.entered_at) * 1000

    @property
    def engine_ms(self) -> float:
        """Milliseconds from then until its end."""
        if self.granted_at is None or self.finished_at is None:
            return 0.0
        return (self.finished_at - self.granted_at) * 1000

    async def __aenter__(self) -> "Job":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self)

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> HostEvent:
        if self.ended:
            raise StopAsyncIteration
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        match event:
            case Finished():
                self.ended = True
            case Failed(fault=data):
                self.ended = True
                raise Fault(data)
            case Cancelled():
                # Only this side cancels, and it no longer listens then: the engine made it up.
                self.ended = True
                raise faults.internal("the engine cancelled a call that nobody had cancelled")
        return event
