"""kill -9 of a whole service with operations at many moments: nothing is lost, told twice, or done twice to the end.

`make soak` does the same 50 times.
"""

import asyncio
import contextlib
import json
import os
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.child_work import Todo
from tests.support.operations import Caller, Number, ServiceProcess
from tests.support.processes import alive

KILLS = int(os.environ.get("INKWELL_KILLS", "10"))
SEED = int(os.environ.get("INKWELL_SEED", "1"))
STEPS = 5


@dataclass
class Watched:
    """An operation, and all that its watcher was told over however many streams."""

    request_id: str
    todo: Todo
    told: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"operations/test/{self.request_id}"


class Watchers:
    """One watcher an operation, which asks again, with the last sequence it has seen, whenever its stream breaks."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._told = 0
        self._more = asyncio.Event()
        self._watched: set[str] = set()
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, watched: Watched) -> None:
        if watched.name not in self._watched:
            self._watched.add(watched.name)
            self.tasks.append(asyncio.create_task(self._watch(watched)))

    async def wait_for(self, count: int) -> None:
        """Return when `count` more events have come, or nothing more will."""
        target = self._told + count
        while self._told < target and not all(task.done() for task in self.tasks):
            self._more.clear()
            await self._more.wait()

    async def _watch(self, watched: Watched) -> None:
        while True:
            call = self._caller.watch(watched.name, len(watched.told), wait_for_ready=True)
            with lost_connections():
                async for response in call:
                    assert response.sequence == len(watched.told) + 1, "an event is missing, or came twice"
                    watched.told.append(response)
                    self._told += 1
                    self._more.set()
                self._more.set()
                return


@contextlib.contextmanager
def lost_connections() -> Any:
    """Swallows what a call to a killed server ends with."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise


async def submit(caller: Caller, watched: Watched) -> None:
    """Under its request id, again and again until it was accepted."""
    while True:
        with lost_connections():
            accepted = await caller.begin(watched.todo, watched.request_id, wait_for_ready=True)
            assert accepted.name == watched.name
            return


def assert_one_result(watched: Watched) -> None:
    """What the work left behind is there, which it would not be twice; its processes and temporary files are not."""
    assert Path(watched.todo.result).exists()
    for response in watched.told:
        if response.HasField("progress"):
            folder, *pids = json.loads(response.progress.note)
            assert not Path(folder).exists()
            assert not alive(pids)


@pytest.mark.timeout(60 + 15 * KILLS)
async def test_killed_at_random_moments_every_operation_ends_once_and_every_watcher_hears_it_all(
    tmp_path: Path,
) -> None:
    chance = random.Random(SEED)
    service = ServiceProcess(
        tmp_path / "operations.sqlite", {"operations_concurrency": "2", "operations_attempts": "1000"}
    )
    caller = Caller(service.port)
    watchers = Watchers(caller)
    operations: list[Watched] = []
    submitting: list[asyncio.Task[None]] = []
    for number in range(KILLS):
        await service.start()
        watched = Watched(
            str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            Todo(steps=STEPS, result=str(tmp_path / f"result-{number}")),
        )
        operations.append(watched)
        accepted = asyncio.create_task(submit(caller, watched))
        submitting.append(accepted)
        if chance.random() < 0.7:  # else it is killed while it takes the request, or before
            await accepted
            watchers.add(watched)
            await watchers.wait_for(chance.randrange(STEPS + 4))
        await service.end()
    await service.start()
    await asyncio.gather(*submitting)
    for watched in operations:
        watchers.add(watched)
    await asyncio.gather(*watchers.tasks)

    runs = 0
    for watched in operations:
        kinds = [response.WhichOneof("event") for response in watched.told]
        assert kinds.count("done") == 1
        assert kinds[-1] == "done"
        runs += kinds.count("started")
        ended = Number()
        assert watched.told[-1].done.response.Unpack(ended), watched.told[-1]
        assert ended.value == STEPS
        # Whoever comes late is told the same.
        assert await caller.events(watched.name) == watched.told
        assert_one_result(watched)
    assert runs > len(operations), "no kill met an operation that ran, so nothing was tested"
    assert await service.end() != 0
    await caller.channel.close()
