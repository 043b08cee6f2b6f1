"""Operations as their callers see them, over a real server and a real SQLite file."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import sqlalchemy
from google.longrunning import operations_pb2
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from services.kit.operations.log import Log
from tests.support.child_work import Todo
from tests.support.operations import Caller, Number, ServiceProcess, serving
from tests.support.processes import alive

pb = operations_pb2


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[Caller]:
    async with serving(tmp_path / "operations.sqlite", operations_queue_limit=3) as caller:
        yield caller


def held(tmp_path: Path, **more: Any) -> Todo:
    """Work that waits until `release`."""
    return Todo(wait_for=str(tmp_path / "go"), **more)


def release(tmp_path: Path) -> None:
    (tmp_path / "go").touch()


def kinds(responses: list[Any]) -> list[str]:
    return [response.WhichOneof("event") for response in responses]


def reason(status: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status is not None, "no google.rpc.Status came with it"
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "inkwell.dev"
    return str(info.reason)


async def refused(call: Any, code: grpc.StatusCode, expected: str, *words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code() is code, failed.value
    assert reason(rpc_status.from_call(failed.value)) == expected
    for word in words:
        assert word in str(failed.value.details())


async def test_an_operation_tells_its_course_and_its_result(caller: Caller) -> None:
    operation = await caller.begin(Todo(steps=3))
    assert operation.name.startswith("operations/test/")
    assert not operation.done
    told = await caller.events(operation.name)
    assert kinds(told) == ["queued", "started", "progress", "progress", "progress", "done"]
    assert [response.sequence for response in told] == [1, 2, 3, 4, 5, 6]
    assert told[0].queued.position == 0
    assert told[1].started.runtime == "none"
    assert [(r.progress.progress.step, r.progress.progress.step_count) for r in told[2:5]] == [(1, 3), (2, 3), (3, 3)]
    assert told[2].progress.stage == "counting"
    done = await caller.get(operation.name)
    assert told[-1].done == done
    result, about = Number(), Number()
    assert done.response.Unpack(result)
    assert result.value == 3
    assert done.metadata.Unpack(about)
    assert about.value == 3


async def test_every_watcher_is_told_the_same_whenever_it_comes(caller: Caller, tmp_path: Path) -> None:
    operation = await caller.begin(held(tmp_path, steps=3))
    early = [asyncio.create_task(caller.events(operation.name)) for _ in range(3)]
    await caller.until(operation.name, "started")
    release(tmp_path)
    told = [await task for task in early]
    assert told[0] == told[1] == told[2] == await caller.events(operation.name)
    assert await caller.events(operation.name, after=4) == told[0][4:]
    assert await caller.events(operation.name, after=len(told[0])) == []


async def test_a_request_id_names_one_request(caller: Caller) -> None:
    request_id = str(uuid.uuid4())
    first = await caller.begin(Todo(steps=2), request_id)
    assert first.name == f"operations/test/{request_id}"
    assert (await caller.begin(Todo(steps=2), request_id.upper())).name == first.name
    told = await caller.events(first.name)
    assert (await caller.begin(Todo(steps=2), request_id)).done
    assert await caller.events(first.name) == told
    await refused(
        caller.begin(Todo(steps=3), request_id), grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", request_id
    )
    await refused(caller.begin(Todo(), "7"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "request_id", "UUID")


async def test_operations_wait_for_their_turn_and_are_told_their_place(caller: Caller, tmp_path: Path) -> None:
    running = await caller.begin(held(tmp_path))
    await caller.until(running.name, "started")
    first, second, third = [await caller.begin(Todo()) for _ in range(3)]
    await refused(caller.begin(Todo()), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "limit")
    await caller.operations.CancelOperation(pb.CancelOperationRequest(name=second.name))
    release(tmp_path)
    told = await caller.events(third.name)
    assert [response.queued.position for response in told if response.HasField("queued")] == [2, 1, 0]
    assert kinds(await caller.events(first.name)) == ["queued", "started", "progress", "done"]
    assert kinds(await caller.events(second.name)) == ["queued", "done"]


async def test_cancelling_ends_the_work_at_once_and_removes_its_files(caller: Caller) -> None:
    operation = await caller.begin(Todo(then="sleep"))
    watching = asyncio.create_task(caller.events(operation.name))
    folder, *pids = json.loads((await caller.until(operation.name, "progress")).progress.note)
    assert len(alive(pids)) == 3
    await caller.operations.CancelOperation(pb.CancelOperationRequest(name=operation.name))
    assert not alive(pids)
    assert not (await asyncio.to_thread(Path(folder).exists))
    told = await watching
    assert told[-1].done.error.code == code_pb2.CANCELLED
    assert reason(told[-1].done.error) == "OPERATION_CANCELLED"
    # Once more does no harm, and what comes next is served.
    await caller.operations.CancelOperation(pb.CancelOperationRequest(name=operation.name))
    assert await caller.events(operation.name) == told
    assert kinds(await caller.events((await caller.begin(Todo())).name))[-1] == "done"


async def test_work_that_fails_says_why(caller: Caller) -> None:
    error = (await caller.events((await caller.begin(Todo(then="fault"))).name))[-1].done.error
    assert (error.code, reason(error)) == (code_pb2.FAILED_PRECONDITION, "NO_SUCH_DEVICE")
    assert error.message == "there is no cuda here"
    error = (await caller.events((await caller.begin(Todo(then="crash"))).name))[-1].done.error
    assert (error.code, reason(error)) == (code_pb2.INTERNAL, "PROCESS_KILLED")
    assert "SIGSEGV" in error.message
    error = (await caller.events((await caller.begin(Todo(then="defect"))).name))[-1].done.error
    assert (error.code, reason(error)) == (code_pb2.INTERNAL, "PROCESS_FAILED")
    assert "secret" not in error.message


async def test_listing_pages_newest_first(caller: Caller, tmp_path: Path) -> None:
    names = []
    for _ in range(4):
        names.append((await caller.begin(Todo())).name)
        await caller.events(names[-1])
    running = (await caller.begin(held(tmp_path))).name

    async def listed(**request: Any) -> Any:
        return await caller.operations.ListOperations(pb.ListOperationsRequest(**request))

    everything = await listed()
    assert [operation.name for operation in everything.operations] == [running, *reversed(names)]
    assert everything.next_page_token == ""
    paged, token = [], ""
    while True:
        page = await listed(name="operations/test", page_size=2, page_token=token)
        assert len(page.operations) <= 2
        paged += page.operations
        token = page.next_page_token
        if not token:
            break
    assert paged == list(everything.operations)
    assert [each.name for each in (await listed(filter="done=false")).operations] == [running]
    assert [each.name for each in (await listed(filter=" done = true")).operations] == list(reversed(names))
    release(tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "operations/other"}, "operations/test"),
        ({"filter": "name=x"}, "done=true"),
        ({"page_size": 201}, "1 to 200"),
        ({"page_size": -1}, "1 to 200"),
        ({"page_token": "7"}, "next_page_token"),
        ({"page_token": "é"}, "next_page_token"),
    ]
    for request, word in wrong:
        await refused(listed(**request), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", *request, word)


async def test_what_is_done_can_be_forgotten(caller: Caller, tmp_path: Path) -> None:
    operation = await caller.begin(held(tmp_path))
    delete = pb.DeleteOperationRequest(name=operation.name)
    await refused(
        caller.operations.DeleteOperation(delete), grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_DONE", "cancel"
    )
    release(tmp_path)
    await caller.events(operation.name)
    await caller.operations.DeleteOperation(delete)
    for call in (caller.get(operation.name), caller.events(operation.name), caller.operations.DeleteOperation(delete)):
        await refused(call, grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", operation.name)


async def test_waiting_ends_with_the_operation_or_with_the_time(caller: Caller, tmp_path: Path) -> None:
    wait = caller.channel.unary_unary(
        "/google.longrunning.Operations/WaitOperation",
        request_serializer=pb.WaitOperationRequest.SerializeToString,
        response_deserializer=pb.Operation.FromString,
    )
    operation = await caller.begin(held(tmp_path))
    soon = duration_pb2.Duration(nanos=1_000_000)
    assert not (await wait(pb.WaitOperationRequest(name=operation.name, timeout=soon))).done
    # The caller's own deadline would come without an answer, so there is one before it; late on a busy machine.
    for deadline_s in (0.5, 5, 50):
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert not (await wait(pb.WaitOperationRequest(name=operation.name), timeout=deadline_s)).done
            break
    else:
        raise AssertionError("there was no answer before any deadline")

    async def done() -> Any:
        return await wait(pb.WaitOperationRequest(name=operation.name))

    waiting = asyncio.create_task(done())
    release(tmp_path)
    assert (await waiting).done
    before = duration_pb2.Duration(seconds=-1)
    await refused(
        wait(pb.WaitOperationRequest(name=operation.name, timeout=before)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "timeout",
    )


async def test_names_and_sequences_that_there_are_not(caller: Caller) -> None:
    known = await caller.begin(Todo())
    last = (await caller.events(known.name))[-1].sequence
    unknown = f"operations/test/{uuid.uuid4()}"
    await refused(caller.get(unknown), grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", unknown)
    other = f"operations/other/{uuid.uuid4()}"
    for name in ("", "operations/test", other, "operations/test/7", f"{known.name}/x"):
        await refused(caller.get(name), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "name")
        await refused(caller.events(name), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "name")
    for after in (-1, last + 1):
        await refused(
            caller.events(known.name, after),
            grpc.StatusCode.INVALID_ARGUMENT,
            "SEQUENCE_UNKNOWN",
            "after_sequence",
            f"0 to {last}",
        )


async def test_a_service_that_stops_sends_watchers_elsewhere_and_is_back_with_its_operations(tmp_path: Path) -> None:
    file = tmp_path / "operations.sqlite"
    told: list[Any] = []
    async with serving(file, operations_attempts=1) as caller:
        running = await caller.begin(held(tmp_path, steps=3))
        queued = await caller.begin(Todo())
        watching = caller.watch(running.name)
        while not (told and told[-1].HasField("started")):
            told.append(await watching.read())
    with pytest.raises(grpc.aio.AioRpcError) as left:
        await watching.read()
    assert left.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(rpc_status.from_call(left.value)) == "DRAINING"
    release(tmp_path)
    # One attempt is allowed: that the service stopped is no attempt.
    async with serving(file, operations_attempts=1) as caller:
        rest = await caller.events(running.name, after=len(told))
        assert kinds(rest)[-5:] == ["started", "progress", "progress", "progress", "done"]
        assert [response.sequence for response in told + rest] == list(range(1, len(told + rest) + 1))
        assert rest[-1].done.HasField("response")
        assert (await caller.events(queued.name))[-1].done.HasField("response")
        assert await caller.events(running.name) == told + rest


async def test_what_was_lost_too_often_is_not_begun_again(tmp_path: Path) -> None:
    service = ServiceProcess(tmp_path / "operations.sqlite", {"operations_attempts": "1"})
    caller = Caller(service.port)
    await service.start()
    operation = await caller.begin(held(tmp_path))
    await caller.until(operation.name, "started")
    await service.end()
    await service.start()
    error = (await caller.events(operation.name))[-1].done.error
    assert (error.code, reason(error)) == (code_pb2.INTERNAL, "OPERATION_LOST_TOO_OFTEN")
    # Two on one file would run each other's operations.
    second = ServiceProcess(service.file)
    with pytest.raises(AssertionError, match=f"in use by process {service.process.pid}"):  # type: ignore[union-attr]
        await second.start()
    assert await second.process.wait() == 1  # type: ignore[union-attr]
    await service.end()
    await caller.channel.close()


async def test_a_request_whose_process_was_lost_before_it_was_queued_is_done(tmp_path: Path) -> None:
    file = tmp_path / "operations.sqlite"
    row_id = str(uuid.uuid4())
    written = Log(sqlalchemy.URL.create("sqlite", database=str(file)), schema=None, clock_ms=lambda: 1)
    written.create()
    written.insert(row_id, kind="work", owner="", request='{"steps":2}', priority=2, most=1)
    written.close()
    async with serving(file) as caller:
        assert kinds(await caller.events(f"operations/test/{row_id}"))[-4:] == [
            "started",
            "progress",
            "progress",
            "done",
        ]


async def test_what_came_of_an_operation_is_kept_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path / "operations.sqlite", operations_kept_s=3600, operations_lost_after_s=0.1) as caller:
        operation = await caller.begin(Todo())
        await caller.events(operation.name)
        assert (await caller.get(operation.name)).done
        later = time.time() + 3601
        monkeypatch.setattr("services.kit.operations.log.time", SimpleNamespace(time=lambda: later))
        listing = pb.ListOperationsRequest()
        while (await caller.operations.ListOperations(listing)).operations:
            pass
        await refused(caller.get(operation.name), grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", "kept for 3600 s")


@pytest.mark.parametrize("address", ["/dev/null/x.sqlite", "postgresql://inkwell:secret@127.0.0.1:1/inkwell"])
async def test_a_database_that_cannot_be_had_is_an_error_at_start(address: str) -> None:
    service = ServiceProcess(Path("unused"), {"operations_database": address})
    with pytest.raises(AssertionError, match="cannot start") as failed:
        await service.start()
    assert "secret" not in str(failed.value)
    assert await service.process.wait() == 1  # type: ignore[union-attr]
