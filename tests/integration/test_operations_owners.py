"""Operations are seen by the caller who began them, and by nobody else."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2

from services.kit.identity import CALLER_KEY
from tests.support.child_work import Todo
from tests.support.operations import Caller, serving

NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALICE: Any = {"metadata": ((CALLER_KEY, "corp/alice"),)}
BOB: Any = {"metadata": ((CALLER_KEY, "corp/bob"),)}


@pytest.fixture
async def caller(tmp_path: Path) -> AsyncIterator[Caller]:
    async with serving(tmp_path / "operations.db") as started:
        yield started


def wait(caller: Caller, name: str, **options: Any) -> Any:
    call = caller.channel.unary_unary(
        "/google.longrunning.Operations/WaitOperation",
        request_serializer=operations_pb2.WaitOperationRequest.SerializeToString,
        response_deserializer=operations_pb2.Operation.FromString,
    )
    return call(operations_pb2.WaitOperationRequest(name=name), **options)


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("other", [BOB, {}])
async def test_another_callers_operation_is_not_there(caller: Caller, other: Any) -> None:
    begun = await caller.begin(Todo(steps=1), **ALICE)
    calls = caller.operations
    name = begun.name
    assert await code(calls.GetOperation(operations_pb2.GetOperationRequest(name=name), **other)) is NOT_FOUND
    assert await code(calls.CancelOperation(operations_pb2.CancelOperationRequest(name=name), **other)) is NOT_FOUND
    assert await code(calls.DeleteOperation(operations_pb2.DeleteOperationRequest(name=name), **other)) is NOT_FOUND
    assert await code(wait(caller, name, **other)) is NOT_FOUND
    assert await code(caller.watch(name, **other).read()) is NOT_FOUND
    listed = await calls.ListOperations(operations_pb2.ListOperationsRequest(), **other)
    assert not listed.operations

    done = await wait(caller, name, **ALICE)
    assert done.done
    listed = await calls.ListOperations(operations_pb2.ListOperationsRequest(), **ALICE)
    assert [operation.name for operation in listed.operations] == [name]


async def test_another_callers_request_id_gives_nothing_away(caller: Caller) -> None:
    request_id = str(uuid.uuid4())
    await caller.begin(Todo(steps=1), request_id, **ALICE)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await caller.begin(Todo(steps=1), request_id, **BOB)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert "alice" not in (caught.value.details() or "")
