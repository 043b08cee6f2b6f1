"""Running the work of operations in this process."""

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
import structlog

from services.kit import faults
from services.kit.faults import Fault, FaultData, Kind
from services.kit.operations.database import Caller, LeavingError
from services.kit.operations.kinds import (
    AnyKind,
    Failed,
    Outcome,
    Progress,
    Running,
    Started,
    Succeeded,
)
from services.kit.operations.log import Log, Row, SupersededError
from services.kit.operations.traced import Course

log = structlog.get_logger(__name__)


@dataclass
class Run:
    """One run of one operation. stopped: it was told to end, and unless it had ended by then it counts for nothing."""

    token: str
    task: asyncio.Task[msgspec.Struct]
    stopped: bool = False

    def stop(self) -> None:
        """Cancel the work."""
        self.stopped = True
        self.task.cancel()


class Runs:
    """What runs here.

    attempts: times that an operation may be begun. service: whose tracing records them. name: the operation's name of
    an id. on_change: told the id whose log has grown. on_queue: awaited when a place in the queue may be free. on_end:
    told how an operation ended.
    """

    def __init__(
        self,
        caller: Caller,
        operations_log: Log,
        kinds: Mapping[str, AnyKind],
        *,
        attempts: int,
        service: str,
        name: Callable[[str], str],
        on_change: Callable[[str], None],
        on_queue: Callable[[], Awaitable[None]],
        on_end: Callable[[Row, Outcome], None],
    ) -> None:
        self._caller = caller
        self._log = operations_log
        self._kinds = kinds
        self._attempts = attempts
        self._service = service
        self._name = name
        self._on_change = on_change
        self._on_queue = on_queue
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._draining = False
        self._active = 0  # calls of `run`
        self._idle = asyncio.Event()
        self._idle.set()
        self.running: dict[str, Run] = {}

    def drain(self) -> None:
        """End what runs, to be run again by the next process, and begin nothing more."""
        self._draining = True
        for run in self.running.values():
            run.stop()

    async def wait_idle(self) -> None:
        """Return when nothing runs, and how everything ended is written down."""
        await self._idle.wait()

    async def stop_superseded(self) -> None:
        """End the runs of operations that were cancelled, or taken over, through another process."""
        tokens = {row_id: run.token for row_id, run in self.running.items()}
        if tokens:
            current = await self._caller.call(self._log.current, tokens)
            for row_id in tokens.keys() - current:
                run = self.running.get(row_id)
                if run is not None and run.token == tokens[row_id]:
                    run.stop()

    def run_from_thread(self, row_id: str) -> bool:
        """`run`, for a thread to wait for."""
        coroutine = self.run(row_id)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            return False
        return future.result()

    async def run(self, row_id: str) -> bool:
        """Do the operation; False if that is not, or no longer, for this process to do."""
        if self._draining:
            return False
        self._active += 1
        self._idle.clear()
        try:
            return await self._begin(row_id)
        except LeavingError:
            return False
        finally:
            self._active -= 1
            if self._active == 0:
                self._idle.set()

    async def _begin(self, row_id: str) -> bool:
        token = uuid.uuid4().hex
        give_up = Failed(_lost_too_often(self._attempts))
        begin = functools.partial(self._log.begin, row_id, token, attempts=self._attempts, give_up=give_up)
        row = await self._caller.insist(begin)
        if row is None:
            self._on_change(row_id)
            return True
        return await self._run(row, token)

    async def _run(self, row: Row, token: str) -> bool:
        kind = self._kinds.get(row.kind)
        if kind is None:
            log.error("operation of a kind that this version does not know", kind=row.kind, operation=row.id)
            await self._caller.insist(self._log.leave, row.id, token)
            return False
        task = asyncio.create_task(self._work(kind, row, token), name=f"operation-{row.id}")
        run = self.running[row.id] = Run(token, task)
        if self._draining:
            run.stop()
        try:
            await self._on_queue()
            await asyncio.wait({task})
            return await self._record(row, run)
        finally:
            # A run that was superseded may still be here when the next one begins in this very process.
            if self.running.get(row.id) is run:
                del self.running[row.id]

    async def _work(self, kind: AnyKind, row: Row, token: str) -> msgspec.Struct:
        name = self._name(row.id)

        async def say(event: Started | Progress) -> None:
            course.said(event)
            await self._caller.insist(self._log.append, row.id, token, event)
            self._on_change(row.id)

        with Course(self._service, row, name) as course:
            request = msgspec.json.decode(row.request, type=kind.request)
            response: msgspec.Struct = await kind.work(request, say, Running(name, row.id, row.attempts))
            return response

    async def _record(self, row: Row, run: Run) -> bool:
        """Write down how the run ended; False if that is for somebody else to do."""
        error = asyncio.CancelledError() if run.task.cancelled() else run.task.exception()
        outcome: Outcome
        if error is None:
            outcome = Succeeded(msgspec.Raw(msgspec.json.encode(run.task.result())))
        elif self._draining and run.stopped:
            await self._caller.insist(self._log.leave, row.id, run.token)
            return False
        elif run.stopped or isinstance(error, SupersededError):
            return False  # whoever cancelled it, or took it over, has written that down and tells DBOS
        elif isinstance(error, LeavingError):
            raise error
        elif isinstance(error, Fault):
            outcome = Failed(error.data)
        else:
            log.error("operation failed", operation=row.id, kind=row.kind, exc_info=error)
            outcome = Failed(faults.internal(f"a defect of the service; its log names operation {row.id}").data)
        if await self._caller.insist(self._log.finish, row.id, run.token, outcome):
            self._on_end(row, outcome)
            self._on_change(row.id)
            await self._on_queue()
        return True


def _lost_too_often(attempts: int) -> FaultData:
    return FaultData(
        Kind.INTERNAL,
        "OPERATION_LOST_TOO_OFTEN",
        f"the service was lost {attempts} times while it ran this operation, and does not begin it again; that is what"
        " happens when the work takes more memory than the machine has",
        metadata={"attempts": str(attempts)},
    )
