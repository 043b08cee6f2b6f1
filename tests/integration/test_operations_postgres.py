"""Operations on Postgres, which several replicas share: what one does, all tell, and what one loses, another does."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.longrunning import operations_pb2
from google.rpc import code_pb2
from grpc_status import rpc_status

from tests.faults.test_gateway import call_to_end
from tests.integration.test_gateway import outcome
from tests.support.child_work import Todo
from tests.support.operations import Caller, ServiceProcess
from tests.support.postgres import Postgres, postgres
from tests.support.processes import alive


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


class Replica:
    def __init__(self, address: str) -> None:
        self.process = ServiceProcess(
            Path("unused"), {"operations_database": address, "operations_lost_after_s": "1", "drain_grace_s": "10"}
        )
        self.caller = Caller(self.process.port)


@pytest.fixture
async def replicas(server: Postgres) -> AsyncIterator[tuple[Replica, Replica]]:
    both = Replica(server.address), Replica(server.address)
    await asyncio.gather(*(each.process.start() for each in both))
    yield both
    for each in both:
        await each.process.end()
        await each.caller.channel.close()


async def running_at(replicas: tuple[Replica, Replica], todo: Todo) -> tuple[str, Replica, Replica]:
    """An operation that has begun, where it runs, and the other one."""
    first, second = replicas
    name = (await first.caller.begin(todo)).name
    # Through the one that did not take the request.
    _, *pids = json.loads((await second.caller.until(name, "progress")).progress.note)
    return (name, first, second) if is_below(pids[0], first) else (name, second, first)


def is_below(pid: int, replica: Replica) -> bool:
    assert replica.process.process is not None
    return replica.process.process.pid in [parent.pid for parent in psutil.Process(pid).parents()]


def pids_of(told: list[Any]) -> list[int]:
    return [pid for each in told if each.HasField("progress") for pid in json.loads(each.progress.note)[1:]]


async def test_every_replica_tells_the_same(replicas: tuple[Replica, Replica]) -> None:
    first, second = replicas
    name = (await first.caller.begin(Todo(steps=3))).name
    told = await asyncio.gather(first.caller.events(name), second.caller.events(name))
    assert told[0] == told[1]
    assert told[0][-1].done.HasField("response")
    assert await first.caller.get(name) == await second.caller.get(name)


async def test_cancelling_through_one_ends_the_work_in_the_other(replicas: tuple[Replica, Replica]) -> None:
    name, runs, other = await running_at(replicas, Todo(then="sleep"))
    await other.caller.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=name))
    told = await runs.caller.events(name)
    assert told[-1].done.error.code == code_pb2.CANCELLED
    while alive(pids_of(told)):  # noqa: ASYNC110 - the other process tells nobody
        await asyncio.sleep(0.01)
    # There is a place again for what comes next, in both.
    for each in (runs, other):
        assert (await each.caller.events((await each.caller.begin(Todo())).name))[-1].done.HasField("response")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_what_one_leaves_another_does(
    replicas: tuple[Replica, Replica], number: signal.Signals, tmp_path: Path
) -> None:
    name, runs, other = await running_at(replicas, Todo(steps=2, then="sleep", result=str(tmp_path / "result")))
    watching = runs.caller.watch(name)
    assert (await watching.read()).HasField("queued")  # it is there: what meets a shutdown on its way ends otherwise
    (tmp_path / "result").touch()  # what the next run finds, and answers with
    await runs.process.end(number)
    assert (await outcome(call_to_end(watching))).code() is grpc.StatusCode.UNAVAILABLE
    told = await other.caller.events(name)
    assert [each.sequence for each in told] == list(range(1, len(told) + 1))
    assert [each.WhichOneof("event") for each in told].count("started") == 2
    assert told[-1].done.HasField("response")
    assert not alive(pids_of(told))


async def test_a_database_that_is_away_costs_time_and_nothing_else(server: Postgres, tmp_path: Path) -> None:
    replica = Replica(server.address)
    await replica.process.start()
    go = tmp_path / "go"
    name = (await replica.caller.begin(Todo(steps=3, wait_for=str(go)))).name
    await replica.caller.until(name, "started")
    await asyncio.to_thread(server.stop)
    go.touch()  # the work goes on, and has nobody to tell
    with pytest.raises(grpc.aio.AioRpcError) as away:
        await replica.caller.get(name)
    assert away.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "OPERATIONS_DATABASE_AWAY" in str(rpc_status.from_call(away.value))
    await asyncio.to_thread(server.start)
    told = await replica.caller.events(name)
    assert [each.WhichOneof("event") for each in told] == ["queued", "started", *["progress"] * 3, "done"]
    assert told[-1].done.HasField("response")
    assert (await replica.caller.events((await replica.caller.begin(Todo())).name))[-1].done.HasField("response")
    await replica.process.end()
    await replica.caller.channel.close()
