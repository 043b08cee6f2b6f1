"""Operations: takes requests, queues them, and tells callers how they go."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from services.kit import faults, tracing
from services.kit.admission import Priority
from services.kit.faults import Fault, FaultData, FieldViolation, Kind, Resource
from services.kit.metrics import Metrics
from services.kit.operations.database import Caller
from services.kit.operations.kinds import AnyKind, Cancelled, Done, Event, Operation, State
from services.kit.operations.log import Log, Row
from services.kit.operations.runs import Runs
from services.kit.operations.seen import OperationsMetrics
from services.kit.operations.settings import OperationsSettings, database_url
from services.kit.operations.workflows import Workflows, lock

log = structlog.get_logger(__name__)

PREFIX = "operations"

# Each process says that it lives so many times within the time after which it would count as lost.
_BEATS = 6
# How often processes that share a database look for what the others have written.
_FOLLOW_S = 0.5
# Written down this long ago and still in no queue: the process was lost in between.
_ORPHANED_S = 10.0
# How long Cancel waits for the work to have ended.
_CANCEL_S = 10.0
_BATCH = 200
# DBOS serves the smallest number first.
_PRIORITIES = {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}


class Operations:
    """The operations of one service, in this process. An async context manager, entered on the serving event loop.

    service: in the names, "operations/<service>/<uuid>". kinds: everything that was ever submitted must stay known.
    Entering raises OSError when the database cannot be had. The methods raise Fault.
    """

    def __init__(
        self, service: str, settings: OperationsSettings, kinds: Sequence[AnyKind], *, metrics: Metrics
    ) -> None:
        self.service = service
        self.kinds = {kind.name: kind for kind in kinds}
        self._settings = settings
        self._url = database_url(settings, service)
        self._file = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._schema = None if self._file else f"inkwell_{service}"
        # A new name for every process: whoever bears another one is somebody else, and maybe gone.
        self._process = uuid.uuid4().hex
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, int] = {}  # sequences at the last look, of what is watched
        self._draining = False
        self.store_id = ""  # of the database, once it runs: who has the same knows the same operations
        self._exits = contextlib.AsyncExitStack()
        self._log: Log
        self._runs: Runs
        self._workflows: Workflows
        self._caller: Caller
        self._metrics = OperationsMetrics(metrics.registry)

    # --- life ---

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as exits:
            self._caller = Caller()
            exits.enter_context(self._caller.threads)
            if self._file is not None:
                exits.enter_context(lock(self._file))
            try:
                self._log = Log(self._url, schema=self._schema)
                exits.callback(self._log.close)
                await self._caller.call(self._log.create)
                self.store_id = await self._caller.call(self._log.store_id)
                if self._file is not None:
                    await self._caller.call(self._log.retire_all)  # the lock says that nobody else is there
                await self._caller.call(self._log.beat, self._process)
                self._runs = self._make_runs()
                self._workflows = self._make_workflows()
                await self._caller.call(self._workflows.launch)
                exits.push_async_callback(self._leave)
                await self._keep()
            except SQLAlchemyError as error:
                shown = self._file or self._url.render_as_string(hide_password=True)
                raise OSError(f"cannot keep operations in {shown}: {error.__cause__ or error}") from error
            settings = self._settings
            loops = [self._repeat(self._keep, settings.operations_lost_after_s / _BEATS)]
            if self._file is None:
                loops.append(self._repeat(self._follow, _FOLLOW_S))
            for loop in loops:
                exits.push_async_callback(_end, asyncio.create_task(loop, name="operations"))
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End what runs here, to be run again: by this service when it is back, or by another replica."""
        self.drain()
        await self._exits.aclose()

    def drain(self) -> None:
        """From now on begin nothing, end what runs, and send watchers elsewhere."""
        self._draining = self._caller.leaving = True
        self._runs.drain()
        for events in self._watchers.values():
            for event in events:
                event.set()

    async def _leave(self) -> None:
        await self._runs.wait_idle()
        await self._caller.call(self._workflows.close)
        try:
            await self._caller.call(self._log.retire, self._process)
        except SQLAlchemyError as error:
            log.warning("cannot say that this process ends", error=str(error))

    def _make_runs(self) -> Runs:
        runs = Runs(
            self._caller,
            self._log,
            self.kinds,
            attempts=self._settings.operations_attempts,
            service=self.service,
            name=self._name,
            on_change=self._wake,
            on_queue=self._line_up,
            on_end=self._metrics.ended,
        )
        self._metrics.running.set_function(lambda: len(runs.running))
        return runs

    def _make_workflows(self) -> Workflows:
        return Workflows(
            self.service,
            self._url,
            schema=self._schema,
            process=self._process,
            concurrency=self._settings.operations_concurrency,
            run=self._runs.run_from_thread,
        )

    # --- what callers do ---

    async def submit(
        self,
        kind: str,
        request: msgspec.Struct,
        *,
        request_id: str = "",
        owner: str = "",
        priority: Priority = Priority.NORMAL,
    ) -> Operation:
        """Write an operation down and queue it; the one there is if this very request came before.

        request_id: a UUID in any spelling; empty for a new one. Raises Fault: INVALID_FIELD, REQUEST_ID_REUSED for an
        id that was used for another request, QUEUE_FULL.
        """
        if self._draining:
            raise _draining()
        row_id = _uuid(request_id, field="request_id") if request_id else str(uuid.uuid4())
        text = msgspec.json.encode(request).decode()
        row = await self._caller.ask(
            self._log.insert,
            row_id,
            kind=kind,
            owner=owner,
            request=text,
            priority=_PRIORITIES[priority],
            most=self._settings.operations_queue_limit,
            traceparent=tracing.traceparent() or None,
        )
        if row is None:
            limit = self._settings.operations_queue_limit
            raise faults.overloaded(
                "QUEUE_FULL",
                f"{limit} operations wait, and that is the limit; retry later",
                retry_after_ms=10_000,
                queue_limit=limit,
            )
        if (row.kind, row.owner, row.request) != (kind, owner, text):
            raise faults.invalid_field(
                "request_id",
                f"{row_id} was used for another request; use a new UUID, or send the same request again",
                reason="REQUEST_ID_REUSED",
            )
        if row.outcome is None and row.run is None:
            await self._caller.call(self._workflows.enqueue, row.id, row.priority)
            await self._line_up()
            row = await self._row(row.id, owner)
        return self._operation(row)

    async def get(self, name: str, *, owner: str = "") -> Operation:
        """The operation as it stands. Raises Fault (OPERATION_NOT_FOUND), also for somebody else's."""
        return self._operation(await self._row(self._id(name), owner))

    async def page(
        self,
        *,
        owner: str = "",
        done: bool | None = None,
        before: tuple[int, str] | None = None,
        limit: int,
    ) -> tuple[list[Operation], tuple[int, str] | None]:
        """At most `limit` operations, newest first, and where the next page begins; None after the last."""
        rows = await self._caller.ask(self._log.page, owner=owner, done=done, before=before, limit=limit + 1)
        following = (rows[limit - 1].created_ms, rows[limit - 1].id) if len(rows) > limit else None
        return [self._operation(row) for row in rows[:limit]], following

    async def cancel(self, name: str, *, owner: str = "") -> Operation:
        """End it, and with it at once what it runs; nothing if it is done."""
        row = await self._row(self._id(name), owner)
        outcome = Cancelled()
        if await self._caller.ask(self._log.finish, row.id, None, outcome):
            self._metrics.ended(row, outcome)
            self._wake(row.id)
            # Nobody is to take it from the queue; should this not be reached, whoever takes it finds that it is done.
            await self._caller.call(self._workflows.cancel, row.id)
            run = self._runs.running.get(row.id)
            if run is not None:
                run.stop()
                await asyncio.wait({run.task}, timeout=_CANCEL_S)
            await self._line_up()
        return self._operation(await self._row(row.id, owner))

    async def delete(self, name: str, *, owner: str = "") -> None:
        """Forget an operation that is done. Raises Fault (OPERATION_NOT_DONE)."""
        row = await self._row(self._id(name), owner)
        if row.outcome is None:
            raise faults.failed_precondition(
                "OPERATION_NOT_DONE", f"{name} is not done; cancel it first, or wait", name=name
            )
        await self._forget([row.id])

    async def wait(self, name: str, *, timeout_s: float | None, owner: str = "") -> Operation:
        """The operation once it is done, or as it stands after `timeout_s`."""
        row_id = self._id(name)
        with self._watching(row_id) as changed, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (await self._row(row_id, owner)).outcome is None:
                    await self._next_change(changed)
        return self._operation(await self._row(row_id, owner))

    async def watch(
        self, name: str, after: int, *, owner: str = ""
    ) -> AsyncGenerator[tuple[int, Event, Operation | None], None]:
        """Events with a sequence above `after`, as they come, until it is done.

        With Done comes the operation. Raises Fault: INVALID_FIELD for a sequence that was never said, DRAINING when the
        rest is to be had from another process.
        """
        row_id = self._id(name)
        row = await self._row(row_id, owner)
        if not 0 <= after <= row.last:
            raise faults.invalid_field(
                "after_sequence",
                f"{after} is not among the events of {name}; accepted: 0 to {row.last}",
                reason="SEQUENCE_UNKNOWN",
            )
        with self._watching(row_id) as changed:
            while True:
                events = await self._caller.ask(self._log.events, row_id, after, _BATCH)
                for sequence, event in events:
                    if isinstance(event, Done):
                        yield sequence, event, self._operation(await self._row(row_id, owner))
                        return
                    yield sequence, event, None
                    after = sequence
                if len(events) == _BATCH:
                    continue
                if (await self._row(row_id, owner)).last == after:
                    if row.outcome is not None:
                        return  # this caller has seen it all
                    await self._next_change(changed)

    # --- in the background ---

    async def _keep(self) -> None:
        """Say that this process lives, and look after what others, or time, have left behind."""
        call = self._caller.call
        await call(self._log.beat, self._process)
        self._metrics.beat()
        for process in await call(self._log.claim_lost, silent_ms=int(self._settings.operations_lost_after_s * 1000)):
            taken = await call(self._workflows.take_over, process)
            await call(self._log.remove_process, process)
            if taken:
                log.info("operations of a lost process are run again", operations=taken)
        waiting = await call(self._log.waiting, since_ms=int(_ORPHANED_S * 1000))
        await call(self._workflows.queue_again, waiting)
        while expired := await call(self._log.expired, int(self._settings.operations_kept_s * 1000), _BATCH):
            await self._forget(expired)
        await self._count_waiting()
        self._metrics.replicas(await call(self._log.replicas))

    async def _count_waiting(self) -> None:
        self._metrics.waiting(len(await self._caller.call(self._log.waiting, since_ms=0)))

    async def _follow(self) -> None:
        """Notice what other processes have written."""
        watched = list(self._watchers)
        lasts = await self._caller.call(self._log.lasts, watched) if watched else {}
        for row_id, last in lasts.items():
            if self._seen.get(row_id) != last:
                self._wake(row_id)
        self._seen = lasts
        await self._runs.stop_superseded()

    async def _repeat(self, action: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await action()
            except Exception:
                # The database is away, or worse. Whatever it was, the next time may go well.
                log.exception("looking after operations failed")

    async def _line_up(self) -> None:
        """Tell those that wait their places."""
        try:
            told = await self._caller.call(self._log.line_up)
            await self._count_waiting()
        except SQLAlchemyError as error:
            log.warning("cannot tell places in the queue", error=str(error))
            return
        for row_id in told:
            self._wake(row_id)

    async def _forget(self, row_ids: Sequence[str]) -> None:
        # In this order: a row without a workflow is seen to again, a workflow without a row never.
        await self._caller.call(self._workflows.delete, row_ids)
        await self._caller.ask(self._log.forget, row_ids)

    # --- watching ---

    @contextlib.contextmanager
    def _watching(self, row_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._watchers.setdefault(row_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._watchers[row_id].discard(changed)
            if not self._watchers[row_id]:
                del self._watchers[row_id]

    def _wake(self, row_id: str) -> None:
        for event in self._watchers.get(row_id, ()):
            event.set()

    async def _next_change(self, changed: asyncio.Event) -> None:
        if self._draining:
            raise _draining()
        await changed.wait()
        changed.clear()

    # --- names and rows ---

    def _name(self, row_id: str) -> str:
        return f"{PREFIX}/{self.service}/{row_id}"

    def _id(self, name: str) -> str:
        prefix, _, row_id = name.rpartition("/")
        if prefix != f"{PREFIX}/{self.service}":
            raise faults.invalid_field("name", f"{name[:80]!r} is not of the form {PREFIX}/{self.service}/UUID")
        return _uuid(row_id, field="name")

    async def _row(self, row_id: str, owner: str) -> Row:
        row = await self._caller.ask(self._log.get, row_id)
        if row is None or row.owner != owner:
            name = self._name(row_id)
            kept = f"{self._settings.operations_kept_s:g} s"
            raise Fault(
                FaultData(
                    Kind.NOT_FOUND,
                    "OPERATION_NOT_FOUND",
                    f"name: there is no operation {name} of yours; what is done is kept for {kept}",
                    fields=(FieldViolation("name", "the name of an operation, which ListOperations lists"),),
                    resource=Resource("operation", name),
                )
            )
        return row

    def _operation(self, row: Row) -> Operation:
        state = State.DONE if row.outcome is not None else State.QUEUED if row.run is None else State.RUNNING
        return Operation(
            name=self._name(row.id),
            id=row.id,
            kind=row.kind,
            owner=row.owner,
            request=msgspec.json.decode(row.request, type=self.kinds[row.kind].request),
            state=state,
            created_at=row.created_ms / 1000,
            ended_at=None if row.ended_ms is None else row.ended_ms / 1000,
            sequence=row.last,
            outcome=row.outcome,
        )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _uuid(text: str, *, field: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise faults.invalid_field(
            field, f"{text[:80]!r} is not a UUID such as 123e4567-e89b-12d3-a456-426614174000"
        ) from None


def _draining() -> Fault:
    return faults.unavailable(
        "DRAINING", "this server is shutting down; ask another, with the last sequence seen", retry_after_ms=200
    )
