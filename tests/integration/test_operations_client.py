"""Following operations with the SDK, over servers that stop, are killed, and come back."""

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import inkwell
from inkwell.converters import operation as converters
from inkwell.longrunning import GIVE_UP_S, Following
from inkwell.operations.v1 import operations_pb2
from tests.support.child_work import Todo
from tests.support.operations import Caller, Number, ServiceProcess, serving

WHOLE = [inkwell.Queued, inkwell.Started, *[inkwell.OperationProgress] * 3, inkwell.OperationDone]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test service's operations carry numbers."""
    monkeypatch.setitem(converters.KNOWN, Number.DESCRIPTOR.full_name, (Number, lambda number: number.value))


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[Caller]:
    async with serving(tmp_path / "operations.sqlite") as caller:
        yield caller


def held(tmp_path: Path) -> Todo:
    return Todo(steps=3, wait_for=str(tmp_path / "go"))


async def test_a_blocking_client_follows_an_operation(caller: Caller, tmp_path: Path) -> None:
    name = (await caller.begin(held(tmp_path))).name
    await caller.until(name, "started")

    def follow() -> None:
        with inkwell.Client(f"localhost:{caller.port}") as client:
            operation = client.operation(name)
            assert (operation.name, operation.done, operation.metadata) == (name, False, 3)
            with pytest.raises(inkwell.DeadlineExceeded):
                operation.result(timeout_s=0.05)
            (tmp_path / "go").touch()
            heard: list[inkwell.OperationEvent] = []
            assert operation.result(on_event=heard.append) == 3
            assert operation.done
            assert [type(event) for event in heard] == WHOLE
            assert [event.sequence for event in heard] == [1, 2, 3, 4, 5, 6]
            assert heard[-1] == inkwell.OperationDone(6, 3, None)
            assert list(operation.events(after_sequence=4)) == heard[4:]
            assert list(operation.events(after_sequence=6)) == []
            assert client.operation(name).result() == 3
            assert [each.name for each in client.operations("test", done=True)] == [name]
            assert client.operations("test", done=False) == []
            operation.delete()
            with pytest.raises(inkwell.NotFound):
                operation.refresh()

    await asyncio.to_thread(follow)


async def test_an_asynchronous_client_follows_an_operation(caller: Caller, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    name = (await caller.begin(held(tmp_path))).name
    async with inkwell.AsyncClient(f"localhost:{caller.port}") as client:
        operation = await client.operation(name)
        assert (operation.name, operation.metadata) == (name, 3)
        heard: list[inkwell.OperationEvent] = []
        assert await operation.result(on_event=heard.append) == 3
        assert [type(event) for event in heard] == WHOLE
        assert [event async for event in operation.events(after_sequence=4)] == heard[4:]
        assert [each.name for each in await client.operations("test", done=True)] == [name]
        assert await client.operations("test", done=False) == []
        await operation.delete()
        with pytest.raises(inkwell.NotFound):
            await operation.refresh()


async def test_more_operations_than_a_page_are_listed(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inkwell.longrunning._PAGE_SIZE", 2)
    names = [(await caller.begin(Todo())).name for _ in range(5)]
    async with inkwell.AsyncClient(f"localhost:{caller.port}") as client:
        assert [each.name for each in await client.operations("test")] == list(reversed(names))
        listed = await asyncio.to_thread(inkwell.Client(f"localhost:{caller.port}").operations, "test")
        assert [each.name for each in listed] == list(reversed(names))


async def test_the_error_that_it_ended_in_is_raised(caller: Caller) -> None:
    async with inkwell.AsyncClient(f"localhost:{caller.port}") as client:
        failed = await client.operation((await caller.begin(Todo(then="fault"))).name)
        with pytest.raises(inkwell.FailedPrecondition, match="there is no cuda here") as error:
            await failed.result()
        assert error.value.reason == "NO_SUCH_DEVICE"
        running = await client.operation((await caller.begin(Todo(then="sleep"))).name)
        await caller.until(running.name, "progress")
        waiting = asyncio.create_task(running.result())
        await running.cancel()
        with pytest.raises(inkwell.Cancelled) as cancelled:
            await waiting
        assert cancelled.value.reason == "OPERATION_CANCELLED"
        blocking = inkwell.Client(f"localhost:{caller.port}")
        with pytest.raises(inkwell.Cancelled):
            await asyncio.to_thread(lambda: blocking.operation(running.name).result())
        with pytest.raises(inkwell.NotFound):
            await client.operation(f"operations/test/{uuid.uuid4()}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_events_go_on_where_the_server_left_off(number: signal.Signals, tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path / "operations.sqlite")
    await service.start()
    caller = Caller(service.port)
    name = (await caller.begin(held(tmp_path))).name
    heard: dict[str, list[inkwell.OperationEvent]] = {"blocking": [], "asynchronous": []}
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear(who: str, event: inkwell.OperationEvent) -> None:
        heard[who].append(event)
        if all(any(isinstance(each, inkwell.Started) for each in events) for events in heard.values()):
            loop.call_soon_threadsafe(begun.set)

    def follow() -> Any:
        with inkwell.Client(f"localhost:{service.port}") as client:
            return client.operation(name).result(on_event=lambda event: hear("blocking", event))

    async with inkwell.AsyncClient(f"localhost:{service.port}") as client:
        operation = await client.operation(name)
        results = [
            asyncio.create_task(asyncio.to_thread(follow)),
            asyncio.create_task(operation.result(on_event=lambda event: hear("asynchronous", event))),
        ]
        await begun.wait()
        await service.end(number)
        await service.start()
        (tmp_path / "go").touch()
        assert await asyncio.gather(*results) == [3, 3]
    assert heard["blocking"] == heard["asynchronous"]
    assert [event.sequence for event in heard["blocking"]] == list(range(1, len(heard["blocking"]) + 1))
    assert [type(event) for event in heard["blocking"]].count(inkwell.Started) == 2
    await service.end()
    await caller.channel.close()


def test_a_watcher_gives_up_in_the_end_and_at_once_where_asking_again_is_no_use() -> None:
    now = 0.0
    following = Following("operations/test/1", 7, clock=lambda: now)
    assert following.request() == operations_pb2.WatchRequest(name="operations/test/1", after_sequence=7)
    with pytest.raises(inkwell.NotFound):
        following.delay_s(inkwell.NotFound("gone"))
    lost = inkwell.Unavailable("restarting")
    delays = [following.delay_s(lost) for _ in range(8)]
    assert delays == sorted(delays)
    assert delays[-1] == 3.0
    assert following.delay_s(inkwell.Unavailable("busy", retry_after_s=2.5)) >= 2.5
    now = GIVE_UP_S - 1
    following.take(operations_pb2.WatchResponse(sequence=8))  # it was back, for a moment
    now = GIVE_UP_S + 1
    assert following.delay_s(lost) == delays[0]
    now += GIVE_UP_S
    with pytest.raises(inkwell.Unavailable):
        following.delay_s(lost)
    with pytest.raises(inkwell.InternalError, match="from message 8 to message 10"):
        following.take(operations_pb2.WatchResponse(sequence=10))


def test_what_this_version_does_not_know() -> None:
    assert converters.event(operations_pb2.WatchResponse(sequence=1)) is None
    response = operations_pb2.WatchResponse(sequence=1)
    response.done.response.type_url = "type.googleapis.com/inkwell.future.v1.Thing"
    with pytest.raises(inkwell.InternalError, match=r"inkwell\.future\.v1\.Thing; update it"):
        converters.event(response)
