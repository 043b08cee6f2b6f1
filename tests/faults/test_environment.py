"""What the machine does to the services: its clock jumps, its disk is full. What was admitted is not lost."""

import asyncio
import resource
import time
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from tests.integration.test_gateway import outcome
from tests.support.child_work import Todo
from tests.support.operations import Caller, Number, ServiceProcess, serving

DAY_S = 86_400


def clock_jumps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """From now on the time of day is another in this process; what measures durations is not touched, as by NTP."""
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + seconds)


@pytest.mark.parametrize("seconds", [DAY_S, -DAY_S])
async def test_operations_do_not_mind_the_time_of_day(
    monkeypatch: pytest.MonkeyPatch, seconds: float, tmp_path: Path
) -> None:
    async with serving(tmp_path / "operations.sqlite", operations_concurrency=1) as caller:
        release = tmp_path / "release"
        runs = await caller.begin(Todo(wait_for=str(release)))
        await caller.until(runs.name, "started")
        waits = await caller.begin(Todo(steps=2))
        clock_jumps(monkeypatch, seconds)
        comes = await caller.begin(Todo(steps=3))
        await asyncio.to_thread(release.touch)
        for name, steps in ((runs.name, 1), (waits.name, 2), (comes.name, 3)):
            events = await caller.events(name)
            assert [event.WhichOneof("event") for event in events].count("started") == 1
            assert ended(events) == steps


def ended(events: list[Any]) -> int:
    """What the operation answered."""
    answer = Number()
    assert events[-1].done.response.Unpack(answer), events[-1]
    return answer.value


async def test_a_full_disk_refuses_operations_and_loses_none(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path / "operations.sqlite", {"operations_attempts": "3"})
    await service.start()
    assert service.process is not None
    caller = Caller(service.port)
    release = tmp_path / "release"
    try:
        runs = await caller.begin(Todo(wait_for=str(release), result=str(tmp_path / "result")))
        await caller.until(runs.name, "started")
        # No file of that process can grow, which its database sees as it sees a full disk.
        _, most = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (0, most))
        request_id = str(uuid.uuid4())
        refused = await outcome(caller.begin(Todo(steps=2), request_id, timeout=60))
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert rpc_status.from_call(refused) is not None
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (most, most))
        again = await caller.begin(Todo(steps=2), request_id, timeout=60)
        await asyncio.to_thread(release.touch)
        assert ended(await caller.events(runs.name)) == 1
        assert ended(await caller.events(again.name)) == 2
    finally:
        await service.end()
        await caller.channel.close()
