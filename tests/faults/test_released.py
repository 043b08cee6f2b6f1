"""However a call ends, what was taken for it is given back: tasks, places in queues and slots, files, processes.

{unary, server stream, bidi, operation} x {caller cancels, deadline, caller killed, service killed, engine killed,
drain}. What there is of each is counted before and after, and so are the calls that began and ended.
"""

import asyncio
import collections
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.longrunning import operations_pb2

from services.gateway.endpoint import State
from services.kit.server import ServiceServer
from tests.support import counting_service
from tests.support.backend import BIDI, SERVER_STREAM, UNARY
from tests.support.caller_process import caller_process
from tests.support.child_work import Todo
from tests.support.counting_service import pool_at, request
from tests.support.gateway import Gateway, pool, running
from tests.support.operations import serving
from tests.support.processes import alive
from tests.support.service_process import started

KINDS = {"unary": UNARY, "server stream": SERVER_STREAM, "bidi": BIDI}
SLOTS = 4  # of the engine
QUEUED = 2  # what the gateway gives a service beyond its slots: half as many (services/gateway/limiter.py)
HELD = SLOTS + QUEUED
OK, GONE, LATE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED


async def until(condition: Callable[[], bool], what: Callable[[], object] = lambda: None) -> None:
    """Return once it holds; of things that tell nobody when they change."""
    try:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(what()) from None


def census() -> dict[str, Any]:
    """What there is, in this process and of what it started."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {
        "tasks": collections.Counter(getattr(task.get_coro(), "__qualname__", "?") for task in others),
        "files": len(os.listdir("/proc/self/fd")),
        "processes": len(psutil.Process().children(recursive=True)),
    }


def at_most(after: dict[str, Any], before: dict[str, Any], *kinds: str) -> bool:
    """Whether there is no more of anything; less there may be, of what was ending."""
    return all(after[kind] <= before[kind] for kind in kinds or before)


@dataclass
class House:
    """A gateway and a counting service in this process, and the engine in its own."""

    service: ServiceServer
    gateway: Gateway
    before: dict[str, Any]

    @property
    def admission(self) -> Any:
        assert self.service.host is not None
        return self.service.host.admission

    async def hold(self, path: str, release: Path) -> list[Any]:
        """Calls that fill the slots and begin a queue, each of which has begun in the service."""
        asked = request(count=3, hold_at=2, release=str(release))
        calls = [begin(self.gateway.channel, path, asked) for _ in range(HELD)]
        await self.until_held()
        return calls

    async def until_held(self) -> None:
        def places() -> tuple[int, int]:
            return self.admission.running_count, self.admission.waiting_count

        await until(lambda: places() == (SLOTS, QUEUED), places)

    async def assert_released(self) -> None:
        """Everything that was taken is given back, and what follows is served."""
        assert await self.gateway.channel.unary_unary(UNARY)(request(count=2), timeout=60) == b"2"
        async with asyncio.timeout(60):
            await self.gateway.idle()
            await self.service._boundary.wait_idle()
        await until(lambda: not (self.admission.running_count or self.admission.waiting_count))
        await until(lambda: at_most(census(), self.before), lambda: f"{self.before} before, {census()} after")
        (endpoint,) = self.gateway.fleet.pools[0].endpoints
        assert endpoint.in_flight == 0
        assert endpoint.calls == counted(self.service, "inkwell_requests_total")


def begin(channel: grpc.aio.Channel, path: str, asked: bytes, **options: Any) -> Any:
    if path == UNARY:
        return channel.unary_unary(path)(asked, **options)
    if path == SERVER_STREAM:
        return channel.unary_stream(path)(asked, **options)

    async def one() -> AsyncIterator[bytes]:
        yield asked

    return channel.stream_stream(path)(one(), **options)


async def end_of(call: Any, path: str) -> grpc.StatusCode:
    """The status it ends with."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if path == UNARY:
            await call
        else:
            while await call.read() is not grpc.aio.EOF:
                pass
    code: grpc.StatusCode = await call.code()
    return code


async def ends(calls: list[Any], path: str) -> list[grpc.StatusCode]:
    async with asyncio.timeout(60):
        return [await end_of(call, path) for call in calls]


def counted(server: ServiceServer, name: str) -> float:
    """The sum of a counter over all its labels."""
    samples = (sample for family in server.metrics.registry.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    service = counting_service.build(counting_service.Settings(slots=SLOTS, drain_grace_s=20))
    await service.start()
    await service.wait_ready()
    async with running(pool_at(service)) as gateway:
        # Once, so that everything that stays for good is there.
        for path in KINDS.values():
            assert await end_of(begin(gateway.channel, path, request(count=1)), path) is OK
        await gateway.idle()
        yield House(service, gateway, census())
    await service.stop(0)


@pytest.mark.parametrize("kind", KINDS)
async def test_when_callers_cancel(house: House, kind: str, tmp_path: Path) -> None:
    calls = await house.hold(KINDS[kind], tmp_path / "release")
    running, waiting = calls[0], calls[-1]
    running.cancel()
    waiting.cancel()
    await until(lambda: counted(house.service, "inkwell_cancelled_total") == 2)
    (tmp_path / "release").touch()
    # Their neighbours in the engine and in the queue go on as if nothing had been.
    assert await ends(calls[1:-1], KINDS[kind]) == [OK] * (HELD - 2)
    await house.assert_released()


@pytest.mark.parametrize("kind", KINDS)
async def test_when_deadlines_pass(house: House, kind: str, tmp_path: Path) -> None:
    asked = request(count=3, hold_at=2, release=str(tmp_path / "release"))
    calls = [begin(house.gateway.channel, KINDS[kind], asked, timeout=0.8) for _ in range(HELD)]
    assert await ends(calls, KINDS[kind]) == [LATE] * HELD
    await house.assert_released()


@pytest.mark.parametrize("kind", KINDS)
async def test_when_a_caller_is_killed(house: House, kind: str, tmp_path: Path) -> None:
    asked = request(count=3, hold_at=2, release=str(tmp_path / "release"))
    async with caller_process(f"127.0.0.1:{house.gateway.server.port}", KINDS[kind], asked, calls=HELD) as caller:
        await house.until_held()
        caller.kill()
    await house.assert_released()


@pytest.mark.parametrize("kind", KINDS)
async def test_when_the_engine_is_killed(house: House, kind: str, tmp_path: Path) -> None:
    calls = await house.hold(KINDS[kind], tmp_path / "release")
    assert house.service.host is not None
    assert house.service.host.pid is not None
    os.kill(house.service.host.pid, signal.SIGKILL)
    (tmp_path / "release").touch()
    # An answer that began cannot be taken back; what had none is computed by the next engine.
    ended = await ends(calls, KINDS[kind])
    assert ended.count(GONE) <= (0 if kind == "unary" else SLOTS)
    assert ended.count(OK) + ended.count(GONE) == HELD
    await house.assert_released()


@pytest.mark.parametrize("kind", KINDS)
async def test_when_the_service_is_killed(kind: str, tmp_path: Path) -> None:
    service = counting_service.process(slots=str(SLOTS))
    async with started(service), running(pool("ocr-cpu", service)) as gateway:
        path, release = KINDS[kind], tmp_path / "release"
        assert await end_of(begin(gateway.channel, path, request(count=1)), path) is OK
        await gateway.idle()
        before = census()
        asked = request(count=3, hold_at=2, release=str(release))
        calls = [begin(gateway.channel, path, asked) for _ in range(SLOTS)]
        # One that comes when the endpoint is known to be gone is refused instead.
        await until(lambda: gateway.endpoint(service).in_flight == SLOTS)
        if path != UNARY:
            for call in calls:
                assert await call.read() == b"1"
        await service.end()
        await gateway.until_state(service, State.UNREACHABLE)
        release.touch()
        await service.start()
        assert await ends(calls, path) == [OK if path == UNARY else GONE] * SLOTS
        await gateway.until_state(service, State.READY)
        await gateway.idle()
        await until(lambda: at_most(census(), before), lambda: f"{before} before, {census()} after")
        assert gateway.endpoint(service).in_flight == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["service", "gateway"])
async def test_when_a_server_drains(house: House, kind: str, which: str, tmp_path: Path) -> None:
    """grpc.aio's stop() returns before handlers have ended (grpc #37239), and those need the engine or the pools."""
    calls = await house.hold(KINDS[kind], tmp_path / "release")
    server = house.service if which == "service" else house.gateway.server
    assert house.service.host is not None
    engine = house.service.host.pid
    assert engine is not None
    draining = asyncio.create_task(server.stop())
    await until(lambda: server._boundary.draining)
    (tmp_path / "release").touch()
    assert await ends(calls, KINDS[kind]) == [OK] * HELD
    await draining
    assert (house.admission.running_count, house.admission.waiting_count) == (0, 0)
    assert counted(server, "inkwell_requests_in_flight") == 0
    if which == "service":
        assert not psutil.pid_exists(engine)


# --- operations ---


@pytest.mark.parametrize("how", ["cancelled", "its work is killed", "its watcher leaves", "its watcher is late"])
async def test_when_an_operation_is(how: str, tmp_path: Path) -> None:
    async with serving(tmp_path / "operations.sqlite") as caller:
        await caller.events((await caller.begin(Todo())).name)
        before = census()
        operation = await caller.begin(Todo(then="sleep"))
        folder, *pids = json.loads((await caller.until(operation.name, "progress")).progress.note)
        match how:
            case "cancelled":
                await caller.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
            case "its work is killed":
                os.kill(pids[0], signal.SIGKILL)
            case "its watcher leaves":
                watching = caller.watch(operation.name)
                await watching.read()
                watching.cancel()
            case "its watcher is late":
                watching = caller.watch(operation.name, timeout=0.5)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in watching:
                        pass
                assert await watching.code() is LATE
        if how.startswith("its watcher"):
            # The operation does not depend on who looks.
            assert len(alive(pids)) == 3
            await caller.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
        assert (await caller.events(operation.name))[-1].HasField("done")
        await until(lambda: not alive(pids), lambda: pids)
        assert not (await asyncio.to_thread(Path(folder).exists))
        # Not the files: the database's connections are opened as they are needed, and kept.
        await until(
            lambda: at_most(census(), before, "tasks", "processes"), lambda: f"{before} before, {census()} after"
        )


async def test_when_a_service_with_an_operation_drains(tmp_path: Path) -> None:
    before = census()
    async with serving(tmp_path / "operations.sqlite") as caller:
        operation = await caller.begin(Todo(then="sleep"))
        folder, *pids = json.loads((await caller.until(operation.name, "progress")).progress.note)
    assert not alive(pids)
    assert not (await asyncio.to_thread(Path(folder).exists))
    assert census()["processes"] == before["processes"]
