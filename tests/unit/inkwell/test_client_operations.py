"""Watching operations through servers and intermediaries that end streams when they should not."""

from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import wrappers_pb2

import inkwell
from inkwell.converters import operation as converters
from inkwell.operations.v1 import operations_pb2 as watch_pb2
from inkwell.operations.v1 import operations_pb2_grpc as watch_pb2_grpc

NAME = "operations/test/1"
TIMEOUT_S = 90.0
Number = wrappers_pb2.Int64Value


def done() -> operations_pb2.Operation:
    operation = operations_pb2.Operation(name=NAME, done=True)
    operation.response.Pack(Number(value=7))
    return operation


class Watched(watch_pb2_grpc.OperationsWatchServiceServicer):
    """An operation of five events, the last of which says that it is done.

    `ends` are the sequences after which one watch after the other ends well, or breaks if negative; those after them
    go on to the end. It is done once the last event was sent, or from the start with `was_done`.
    """

    def __init__(self, *ends: int, was_done: bool = False) -> None:
        self.ends = list(ends)
        self.done = was_done
        self.done_after_watch = False
        self.after: list[int] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        watch_pb2_grpc.add_OperationsWatchServiceServicer_to_server(self, self._server)
        get = grpc.unary_unary_rpc_method_handler(
            self.get,
            request_deserializer=operations_pb2.GetOperationRequest.FromString,
            response_serializer=operations_pb2.Operation.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler("google.longrunning.Operations", {"GetOperation": get})
        self._server.add_generic_rpc_handlers((handlers,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def get(self, request: Any, context: Any) -> Any:
        return done() if self.done else operations_pb2.Operation(name=NAME)

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self.after.append(request.after_sequence)
        end = self.ends.pop(0) if self.ends else 5
        for sequence in range(request.after_sequence + 1, abs(end) + 1):
            if sequence == 5:
                self.done = True
                yield watch_pb2.WatchResponse(sequence=5, done=done())
            else:
                response = watch_pb2.WatchResponse(sequence=sequence)
                response.progress.stage = f"stage {sequence}"
                yield response
        self.done |= self.done_after_watch
        if end < 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(converters.KNOWN, Number.DESCRIPTOR.full_name, (Number, lambda number: number.value))


def follow_blocking(server: Watched, **options: Any) -> tuple[list[int], Any]:
    with inkwell.Client(server.address, timeout_s=TIMEOUT_S) as client:
        operation = client.operation(NAME)
        sequences = [event.sequence for event in operation.events(**options)]
        return sequences, operation.result()


async def follow(server: Watched, **options: Any) -> tuple[list[int], Any]:
    async with inkwell.AsyncClient(server.address, timeout_s=TIMEOUT_S) as client:
        operation = await client.operation(NAME)
        sequences = [event.sequence async for event in operation.events(**options)]
        return sequences, await operation.result()


@pytest.fixture
async def servers() -> AsyncIterator[list[Watched]]:
    made: list[Watched] = []
    yield made
    for server in made:
        server.stop()


@pytest.mark.parametrize(
    ("ends", "after"),
    [
        ((), [0]),
        ((2,), [0, 2]),  # something on the way ended the stream well
        ((-2, 3, -3, 4), [0, 2, 3, 3, 4]),
    ],
)
async def test_every_event_is_heard_once(ends: tuple[int, ...], after: list[int], servers: list[Watched]) -> None:
    for follower in (follow_blocking, follow):
        server = Watched(*ends)
        servers.append(server)
        result = follower(server)
        assert (result if isinstance(result, tuple) else await result) == ([1, 2, 3, 4, 5], 7)
        assert server.after == after


async def test_a_stream_with_nothing_left_to_say_ends(servers: list[Watched]) -> None:
    server = Watched(was_done=True)
    servers.append(server)
    assert follow_blocking(server, after_sequence=5) == ([], 7)
    assert await follow(server, after_sequence=5) == ([], 7)
    assert server.after == [5, 5]


async def test_an_operation_that_was_done_meanwhile_is_still_heard_to_its_end(servers: list[Watched]) -> None:
    for follower in (follow_blocking, follow):
        server = Watched(3)
        servers.append(server)
        server.done_after_watch = True
        result = follower(server)
        assert (result if isinstance(result, tuple) else await result) == ([1, 2, 3, 4, 5], 7)


async def test_a_watch_ends_with_its_time_while_nobody_answers() -> None:
    closed = Watched()
    closed.stop()
    operation_of = operations_pb2.Operation(name=NAME)
    client = inkwell.Client(closed.address, wait_for_ready_s=TIMEOUT_S)
    with client, pytest.raises(inkwell.DeadlineExceeded):
        inkwell.Operation(client, operation_of).result(timeout_s=0.2)
    async with inkwell.AsyncClient(closed.address, wait_for_ready_s=TIMEOUT_S) as aio:
        with pytest.raises(inkwell.DeadlineExceeded):
            await inkwell.AsyncOperation(aio, operation_of).result(timeout_s=0.2)
