"""The trace of an operation: a part of the trace of the call that asked for it, which has long been answered."""

import asyncio
from types import TracebackType
from typing import Self

import structlog

from services.kit import tracing
from services.kit.faults import Fault
from services.kit.operations.kinds import Progress, Started
from services.kit.operations.log import Row
from services.kit.tracing import Parent, Span


class Course:
    """Used as `with Course(...) as course` around one run, in a task of its own, whose log lines get the trace's id.

    The run's span has a span for the time in the queue and one for each stage; progress is an event of its stage.
    """

    def __init__(self, service: str, row: Row, name: str) -> None:
        self._row = row
        self._span: Span | None = None
        self._stage_span: Span | None = None
        self._stage = ""
        parent = Parent.read(row.traceparent)
        if parent is not None:
            structlog.contextvars.bind_contextvars(trace_id=parent.trace_id)
        recording = tracing.of(service)
        if recording is not None:
            told = {"inkwell.operation": name, "inkwell.kind": row.kind, "inkwell.attempt": row.attempts}
            self._span = recording.work(f"operation {row.kind}", parent, told)

    def __enter__(self) -> Self:
        if self._span is not None and self._row.attempts == 1:
            self._span.past("queue", self._row.created_ms * 1_000_000)
        return self

    def said(self, event: Started | Progress) -> None:
        """Take note of what the work said."""
        if self._span is None:
            return
        if isinstance(event, Started):
            self._span.set({"inkwell.hardware": event.hardware, "inkwell.model": event.model})
            return
        if event.stage and event.stage != self._stage:
            self._end_stage()
            self._stage, self._stage_span = event.stage, self._span.begin(event.stage)
        (self._stage_span or self._span).step("step", {"inkwell.number": event.step, "inkwell.count": event.step_count})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is None:
            return
        how = ""
        if isinstance(error, Fault):
            how = error.data.reason
        elif isinstance(error, asyncio.CancelledError):
            how = "CANCELLED"
        elif error is not None:
            how = "INTERNAL"
        self._end_stage(how)
        self._span.end(how)

    def _end_stage(self, how: str = "") -> None:
        if self._stage_span is not None:
            self._stage_span.end(how)
            self._stage_span = None
