"""A document's jobs in the engine: admitted like any call's, and not given up for what passes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from services.kit import faults
from services.kit.admission import Priority
from services.kit.engine_api import Accepted, Finished
from services.kit.engine_host import EngineHost
from services.kit.faults import Fault

log = structlog.get_logger(__name__)

# The engine process ended with the job inside it: nothing was lost but time. A job that is there each time the engine
# ends may be what ends it, so it is not tried without end.
_LOST_MOST = 3


@dataclass(frozen=True)
class Done:
    """What a job yielded."""

    payload: msgspec.Raw
    queue_ms: float
    engine_ms: float


class Worker:
    """Runs one document's jobs at its caller's priority. `on_accepted` is told whenever the engine takes one up."""

    def __init__(
        self, host: EngineHost, priority: Priority, *, wait_ready_s: float, on_accepted: Callable[[], None]
    ) -> None:
        self._host = host
        self._priority = priority
        self._wait_ready_s = wait_ready_s
        self._on_accepted = on_accepted

    async def run(self, work: msgspec.Struct, *, cost: float) -> Done:
        """The result of a LayoutJob or ReadJob; `cost` as in `EngineHost.admit`.

        The document was admitted, so its jobs find no queue full. What waits with too many bytes is waited for, as is
        an engine that starts, and a job that went down with its engine is sent again. Raises Fault when the job itself
        fails. Cancelling cancels the job.
        """
        lost = 0
        while True:
            try:
                return await self._try(work, cost)
            except Fault as fault:
                match fault.data.reason:
                    case "QUEUE_BYTES_FULL":
                        await asyncio.sleep((fault.data.retry_after_ms or 50) / 1000)
                    case "ENGINE_NOT_READY":
                        await self._until_ready(fault)
                    case "ENGINE_LOST":
                        lost += 1
                        if lost == _LOST_MOST:
                            raise
                        log.info("job lost with its engine; sending it again", job=type(work).__name__)
                        await self._until_ready(fault)
                    case _:
                        raise

    async def _try(self, work: msgspec.Struct, cost: float) -> Done:
        # No deadline here: the whole document has one, and ends with all its jobs when it passes.
        async with self._host.admit(priority=self._priority, time_left_s=None, cost=cost, part_of_admitted=True) as job:
            job.start(work)
            async for event in job:
                if isinstance(event, Accepted):
                    self._on_accepted()
                elif isinstance(event, Finished):
                    return Done(event.payload, job.queue_ms, job.engine_ms)
        raise faults.internal("the engine ended a job without a result")

    async def _until_ready(self, why: Fault) -> None:
        try:
            async with asyncio.timeout(self._wait_ready_s):
                await self._host.wait_ready()
        except TimeoutError:
            raise why from None
