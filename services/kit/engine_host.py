"""Supervises the engine process and carries jobs to it and events back.

The front never blocks and holds no model. When the engine process dies, the calls inside it end with UNAVAILABLE (a
retry is safe: nothing they did is kept), the calls that wait stay, readiness goes down, and a new process is started
with backoff.
"""

import asyncio
import contextlib
import itertools
import random
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec
import structlog

from services.kit import faults, tracing, wire
from services.kit.admission import Admission, Priority, Ticket
from services.kit.engine_api import (
    END_S,
    Cancel,
    Cancelled,
    Command,
    Described,
    Event,
    Failed,
    Finished,
    Heartbeat,
    JobEvent,
    Raw,
    Ready,
    Submit,
    Traced,
)
from services.kit.faults import Fault
from services.kit.job import Job, Queued
from services.kit.metrics import Metrics
from services.kit.settings import ServiceSettings

log = structlog.get_logger(__name__)

_BACKOFF_FIRST_S = 0.25
_BACKOFF_MOST_S = 30.0
# An engine that served this long was healthy: its death is not counted towards the backoff.
_STABLE_S = 60.0
_EXPECTED_RESTART_MS = 2000
# An engine that never served and ends this often will not start the next time either: a missing file, a bad setting.
_START_ATTEMPTS = 3


class EngineStartError(RuntimeError):
    """The engine ended again and again before it was ever ready; the log has its last words."""


def engine_not_ready() -> Fault:
    """The refusal of calls that come while there is no engine to serve them, or none yet to describe its models."""
    return faults.unavailable(
        "ENGINE_NOT_READY",
        "the engine is loading its models; retry shortly",
        retry_after_ms=_EXPECTED_RESTART_MS,
    )


class EngineHost:
    """One engine process, its queue and its jobs.

    factory: dotted name "module:function" of `create_engine(settings_json) -> Engine`, imported in the engine process
    only. slots: jobs the engine is given at a time.
    """

    def __init__(
        self,
        factory: str,
        settings: ServiceSettings,
        *,
        slots: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._factory = factory
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self.admission = Admission(
            slots=slots,
            queue_limit=settings.queue_limit,
            queue_bytes_limit=settings.queue_bytes_limit,
            clock=clock,
        )
        self._numbers = itertools.count(1)
        self._waiting: dict[Ticket, Job] = {}
        self._running: dict[str, Job] = {}
        self._controls: set[str] = set()  # control jobs that somebody listens to
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_heard = 0.0
        self._beat = (0.0, 0.0)  # when the engine was heard of last, and how long its step took by then
        self._reported_positions: dict[Ticket, int] = {}
        self.info: Raw | None = None
        self.ready = False
        self.on_ready_change: Callable[[bool], None] = lambda ready: None
        self.on_info_change: Callable[[], None] = lambda: None  # what the engine says of itself, or whether it serves
        self._ready_event = asyncio.Event()
        self._gave_up = asyncio.Event()
        metrics.queue_depth.set_function(lambda: self.admission.waiting_count)
        metrics.running.set_function(lambda: self.admission.running_count)

    # --- life ---

    async def start(self) -> None:
        """Start supervising; returns at once, while the engine still loads."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> None:
        """Return when the engine has loaded its models."""
        await self._ready_event.wait()

    async def start_failed(self) -> None:
        """Wait for ever while the engine is well; raises EngineStartError once there is no hope that it will start."""
        await self._gave_up.wait()
        raise EngineStartError(f"the engine ended {_START_ATTEMPTS} times before it was ready; see its output above")

    async def stop(self) -> None:
        """End the engine process; what is still in it ends with UNAVAILABLE."""
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None while there is none."""
        return self._process.pid if self._process else None

    @property
    def silent_s(self) -> float:
        """Seconds since the engine was heard of; 0 while there is none. It beats every second."""
        return self._clock() - self._beat[0] if self._process else 0.0

    @property
    def step_age_s(self) -> float:
        """Seconds that the engine's step under way has taken, as far as is known; 0 while none is."""
        step_s = self._beat[1]
        return step_s + self.silent_s if step_s and self._process else 0.0

    # --- jobs ---

    def admit(
        self,
        *,
        priority: Priority,
        time_left_s: float | None,
        cost: float = 1.0,
        part_of_admitted: bool = False,
    ) -> Job:
        """Reserve a place for a call or raise Fault (ENGINE_NOT_READY, QUEUE_FULL, DEADLINE_TOO_SHORT).

        cost: work relative to other calls of this service, above 0. time_left_s: until the caller's deadline, None
        without one. part_of_admitted: as in `Admission.enter`. Nothing is computed before `Job.start`.
        """
        if not self.ready:
            raise engine_not_ready()
        try:
            ticket = self.admission.enter(
                priority=priority, cost=cost, time_left_s=time_left_s, part_of_admitted=part_of_admitted
            )
        except Fault as fault:
            self._metrics.refused.labels(fault.data.reason).inc()
            raise
        job = Job(
            f"{next(self._numbers)}",
            ticket,
            start=self._start_job,
            leave=self._leave_job,
            span=tracing.current(),
        )
        self._waiting[ticket] = job
        return job

    def control(self) -> Job:
        """A job beside the queue and the slots, for what the engine does not do in steps: loading a model.

        It is in the engine as soon as it is started, and its length teaches nothing about calls. Raises Fault
        (ENGINE_NOT_READY, or QUEUE_FULL when there are as many as calls may wait).
        """
        if not self.ready:
            raise engine_not_ready()
        limit = self._settings.queue_limit
        if len(self._controls) >= limit:
            self._metrics.refused.labels("QUEUE_FULL").inc()
            raise faults.overloaded(
                "QUEUE_FULL",
                f"{limit} calls wait for a model to be loaded or unloaded, and that is the limit; retry later",
                retry_after_ms=_EXPECTED_RESTART_MS,
                queue_limit=limit,
            )
        # A ticket that the admission does not know.
        ticket = Ticket(0, Priority.NORMAL, 1.0, self._clock(), left=True)
        job = Job(
            f"{next(self._numbers)}",
            ticket,
            start=self._start_control,
            leave=self._leave_job,
            span=tracing.current(),
        )
        self._controls.add(job.id)
        return job

    def _start_control(self, job: Job, payload: msgspec.Struct) -> None:
        if not self.ready:
            raise engine_not_ready()
        job.granted(self._clock())
        self._running[job.id] = job
        self._send(Submit(job.id, wire.raw(payload), traced=job.span is not None))

    def _start_job(self, job: Job, payload: msgspec.Struct) -> None:
        job.payload = wire.raw(payload)
        self.admission.make_eligible(job.ticket, memoryview(job.payload).nbytes)
        self._pump()

    def _leave_job(self, job: Job) -> None:
        """The caller no longer listens."""
        self._controls.discard(job.id)
        if job.ticket in self._waiting:
            del self._waiting[job.ticket]
            self._reported_positions.pop(job.ticket, None)
            self.admission.leave(job.ticket)
            job.over(self._clock())
            if not job.ended:
                self._metrics.cancelled.labels("queued").inc()
            self._pump()
        elif job.id in self._running and not job.cancel_sent:
            # The slot stays taken until the engine says that it really stopped.
            job.cancel_sent = True
            self._metrics.cancelled.labels("running").inc()
            self._send(Cancel(job.id))

    def _pump(self) -> None:
        while self.ready and (ticket := self.admission.grant_next()) is not None:
            job = self._waiting.pop(ticket)
            self._reported_positions.pop(ticket, None)
            self._running[job.id] = job
            now = self._clock()
            job.granted(now)
            self._metrics.queue_seconds.observe(now - ticket.entered_at)
            self._send(Submit(job.id, job.payload, traced=job.span is not None))
            job.payload = Raw(b"")  # the engine has it now
        for ticket, position in self.admission.positions():
            if self._reported_positions.get(ticket) != position:
                self._reported_positions[ticket] = position
                self._waiting[ticket].put(Queued(position))

    def _on_event(self, event: JobEvent) -> None:
        job = self._running.get(event.job)
        if job is None:
            return
        match event:
            case Finished() | Failed() | Cancelled():
                del self._running[job.id]
                job.over(self._clock(), event.fault.reason if isinstance(event, Failed) else "")
                self.admission.leave(job.ticket, completed=isinstance(event, Finished))
                job.put(event)
                self._pump()
            case _:
                job.put(event)

    # --- the process ---

    def _send(self, command: Command) -> None:
        # A closed connection means that the supervisor is about to fail these jobs and start afresh. It shows as
        # is_closing on asyncio's own loop and as RuntimeError on uvloop.
        if self._writer is not None and not self._writer.is_closing():
            with contextlib.suppress(RuntimeError):
                self._writer.write(wire.encode(command))

    def _set_ready(self, ready: bool) -> None:
        if ready == self.ready:
            return
        self.ready = ready
        if ready:
            self._ready_event.set()
        else:
            self._ready_event.clear()
        self.on_ready_change(ready)
        self.on_info_change()

    async def _supervise(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        failed_starts = 0
        try:
            while True:
                began = self._clock()
                try:
                    cause = await self._run_once()
                except Exception as error:
                    # No memory for a process, an event that does not decode: whatever it was, the supervisor must live.
                    log.exception("running the engine failed")
                    cause = f"{type(error).__name__}: {error}"
                if self._clock() - began > _STABLE_S:
                    backoff_s = _BACKOFF_FIRST_S
                failed_starts += 1
                if self.info is None and failed_starts == _START_ATTEMPTS:
                    self._gave_up.set()
                self._metrics.engine_restarts.inc()
                delay_s = backoff_s * random.uniform(0.8, 1.2)
                log.error("engine ended", cause=cause, restart_in_s=round(delay_s, 2))
                await asyncio.sleep(delay_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_MOST_S)
        finally:
            self._lose_engine("the service is stopping")

    async def _run_once(self) -> str:
        """Start the engine process and serve it until it ends; answers why it ended."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.kit.engine_worker",
                self._factory,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.PIPE,
            )
        finally:
            theirs.close()
        self._process = process
        log.info("engine starting", pid=process.pid)
        try:
            assert process.stdin is not None
            # Should it have died at once, the reader below sees that (uvloop then raises RuntimeError on writing).
            with contextlib.suppress(ConnectionError, RuntimeError):
                process.stdin.write(self._settings.model_dump_json().encode())
                await process.stdin.drain()
            process.stdin.close()
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
            cause = await self._serve(reader)
        finally:
            self._set_ready(False)
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._stopping:
                # It ends by itself now, and lets go of what would outlive it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_S):
                        await process.wait()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._process = None
            self._lose_engine("the engine process ended")
        if cause is None:
            code = process.returncode or 0
            cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return cause

    async def _serve(self, reader: asyncio.StreamReader) -> str | None:
        """Handle events until the process is gone (None) or must be killed (why)."""
        self._last_heard = self._clock()
        self._beat = (self._last_heard, 0.0)
        watchdog = asyncio.create_task(self._watch_for_stall(), name="engine-watchdog")
        reading = asyncio.create_task(self._read_events(reader), name="engine-events")
        try:
            done, _ = await asyncio.wait({watchdog, reading}, return_when=asyncio.FIRST_COMPLETED)
            return watchdog.result() if watchdog in done else reading.result()
        finally:
            for task in (watchdog, reading):
                task.cancel()
            await asyncio.gather(watchdog, reading, return_exceptions=True)

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                event: Event = await wire.read_event(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            self._last_heard = self._clock()
            self._beat = (self._last_heard, self._beat[1])
            match event:
                case Ready(info):
                    self.info = Raw(bytes(info))
                    log.info("engine ready", pid=self.pid)
                    self._set_ready(True)
                    self._pump()
                case Described(info):
                    self.info = Raw(bytes(info))
                    self.on_info_change()
                case Traced(job_id, phases):
                    job = self._running.get(job_id)
                    if job is not None and job.in_engine is not None:
                        job.in_engine.went_through(phases)
                case Heartbeat(step_seconds):
                    self._beat = (self._last_heard, step_seconds)
                    if step_seconds > self._settings.engine_stall_s:
                        self._last_heard = float("-inf")
                case _:
                    self._on_event(event)

    async def _watch_for_stall(self) -> str:
        started = self._clock()
        while True:
            await asyncio.sleep(1.0)
            now = self._clock()
            if not self.ready and now - started > self._settings.engine_start_s:
                return f"not ready after {self._settings.engine_start_s:.0f} s"
            if now - self._last_heard > self._settings.engine_stall_s:
                return f"stuck for more than {self._settings.engine_stall_s:.0f} s"

    def _lose_engine(self, why: str) -> None:
        """Fail what was inside the engine. What waits stays, unless the service itself is stopping."""
        lost = list(self._running.values())
        self._running.clear()
        if self._stopping:
            lost += self._waiting.values()
            self._waiting.clear()
        fault = faults.unavailable("ENGINE_LOST", f"{why}; a retry is safe", retry_after_ms=_EXPECTED_RESTART_MS)
        for job in lost:
            self.admission.leave(job.ticket)
            job.over(self._clock(), fault.data.reason)
            job.put(Failed(job.id, fault.data))
