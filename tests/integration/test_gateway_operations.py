"""Calls about an operation go to the server that has it, whichever gateway and pool they come through."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.rpc import error_details_pb2

from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from inkwell.operations.v1 import operations_pb2 as watch_pb2
from inkwell.operations.v1 import operations_pb2_grpc as watch_pb2_grpc
from services.gateway.endpoint import State
from services.kit import errors, faults
from tests.integration.test_gateway import detail, outcome
from tests.support.gateway import Gateway, pool, running
from tests.support.reporting_backend import ReportingBackend, report

GET = "/google.longrunning.Operations/GetOperation"
COMPILE = "/inkwell.compiler.v1.CompilerService/Compile"
WATCH = "/inkwell.operations.v1.OperationsWatchService/Watch"


class Compiling(ReportingBackend):
    """Keeps operations by name; `asked` counts the calls about them."""

    def __init__(self, label: str, operations: dict[str, int], *, store: str = "") -> None:
        super().__init__(report(label, store=store))
        self.operations = operations
        self.asked = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        match handler_call_details.method:
            case "/inkwell.compiler.v1.CompilerService/Compile":
                return grpc.unary_unary_rpc_method_handler(
                    self._compile, compiler_pb2.CompileRequest.FromString, _to_bytes
                )
            case "/google.longrunning.Operations/GetOperation":
                return grpc.unary_unary_rpc_method_handler(
                    self._get, operations_pb2.GetOperationRequest.FromString, _to_bytes
                )
            case "/inkwell.operations.v1.OperationsWatchService/Watch":
                return grpc.unary_stream_rpc_method_handler(self._watch, watch_pb2.WatchRequest.FromString, _to_bytes)
        return super().service(handler_call_details)

    async def _compile(self, request: compiler_pb2.CompileRequest, _context: Any) -> operations_pb2.Operation:
        name = f"operations/compiler/{request.request_id or f'00000000-0000-0000-0000-{len(self.operations):012}'}"
        self.operations[name] = self.operations.get(name, 0) + 1
        return operations_pb2.Operation(name=name)

    async def _get(self, request: operations_pb2.GetOperationRequest, context: Any) -> operations_pb2.Operation:
        self.asked += 1
        if request.name not in self.operations:
            await errors.abort(context, faults.not_found("operation", request.name, (), field="name"))
        return operations_pb2.Operation(name=request.name, done=True)

    async def _watch(self, request: watch_pb2.WatchRequest, _context: Any) -> AsyncIterator[watch_pb2.WatchResponse]:
        assert request.name in self.operations
        yield watch_pb2.WatchResponse(sequence=7)


def _to_bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


@contextlib.asynccontextmanager
async def two(*, stores: tuple[str, str] = ("one", "two"), **settings: Any) -> AsyncIterator[Any]:
    """Compilers on cpu and cuda, each with operations of its own, and a gateway in front."""
    shared: dict[str, int] = {}
    cpu = Compiling("cpu", shared, store=stores[0])
    cuda = Compiling("cuda", shared if stores[0] == stores[1] else {}, store=stores[1])
    for backend in (cpu, cuda):
        await backend.start()
    try:
        pools = pool("cpu", cpu, service="compiler"), pool("cuda", cuda, service="compiler", hardware="cuda")
        async with running(*pools, **settings) as gateway:
            await gateway.until(lambda: all(gateway.endpoint(each).report is not None for each in (cpu, cuda)))
            yield cpu, cuda, gateway
    finally:
        for backend in (cpu, cuda):
            await backend.stop()


async def begin(gateway: Gateway, *, hardware: str, request_id: str = "") -> str:
    stub = compiler_pb2_grpc.CompilerServiceStub(gateway.channel)
    request = compiler_pb2.CompileRequest(model="m", request_id=request_id)
    operation = await stub.Compile(request, metadata=(("inkwell-hardware", hardware),))
    return str(operation.name)


async def get(gateway: Gateway, name: str, hardware: str | None = None) -> operations_pb2.Operation:
    stub = operations_pb2_grpc.OperationsStub(gateway.channel)
    metadata = (("inkwell-hardware", hardware),) if hardware else None
    return await stub.GetOperation(operations_pb2.GetOperationRequest(name=name), metadata=metadata)


async def test_an_operation_is_found_where_it_was_begun() -> None:
    async with two() as (cpu, cuda, gateway):
        name = await begin(gateway, hardware="cuda")
        assert name in cuda.operations
        for hardware in (None, "cpu", "cpu!"):
            assert (await get(gateway, name, hardware)).done
        assert (cpu.asked, cuda.asked) == (0, 3)
        watched = watch_pb2_grpc.OperationsWatchServiceStub(gateway.channel).Watch(watch_pb2.WatchRequest(name=name))
        assert [response.sequence async for response in watched] == [7]


async def test_a_gateway_that_did_not_see_it_begin_asks_once_and_remembers() -> None:
    async with two() as (cpu, cuda, gateway):
        name = "operations/compiler/8f14e45f-ceea-467f-a1d6-0123456789ab"
        cuda.operations[name] = 1
        for _ in range(3):
            assert (await get(gateway, name)).done
        assert (cpu.asked, cuda.asked) == (1, 4)


async def test_one_that_nobody_has_is_not_found_and_one_that_a_silent_server_may_have_is_unavailable() -> None:
    async with two() as (_, cuda, gateway):
        name = "operations/compiler/8f14e45f-ceea-467f-a1d6-0123456789ab"
        error = await outcome(get(gateway, name))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        await cuda.stop()
        await gateway.until_state(cuda, State.UNREACHABLE)
        error = await outcome(get(gateway, name))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "OPERATION_HOME_UNREACHABLE"
        assert cuda.address in (error.details() or "")


async def test_a_call_for_an_operation_whose_server_restarts_waits_for_it() -> None:
    async with two() as (_, cuda, gateway):
        name = await begin(gateway, hardware="cuda")
        await cuda.set_ready(False)
        await gateway.until_state(cuda, State.NOT_READY)
        error = await outcome(get(gateway, name))
        assert error.code() is grpc.StatusCode.UNAVAILABLE  # and never NOT_FOUND from the other
        assert "cuda (1 not_ready)" in (error.details() or "")
        await cuda.set_ready(True)
        await gateway.until_state(cuda, State.READY)
        assert (await get(gateway, name)).done


async def test_a_repeated_compile_is_the_same_operation_wherever_the_caller_would_have_it() -> None:
    async with two() as (cpu, cuda, gateway):
        request_id = "8f14e45f-ceea-467f-a1d6-0123456789ab"
        name = await begin(gateway, hardware="cuda", request_id=request_id)
        assert await begin(gateway, hardware="cpu", request_id=request_id) == name
        assert (cuda.operations, cpu.operations) == ({name: 2}, {})
        # Another gateway, which has to ask.
        pools = pool("cpu", cpu, service="compiler"), pool("cuda", cuda, service="compiler", hardware="cuda")
        async with running(*pools) as other:
            await other.until(lambda: all(other.endpoint(each).report is not None for each in (cpu, cuda)))
            assert await begin(other, hardware="cpu", request_id=request_id) == name
        assert (cuda.operations, cpu.operations) == ({name: 3}, {})


async def test_servers_that_share_a_database_are_one_home() -> None:
    async with two(stores=("same", "same")) as (cpu, cuda, gateway):
        name = await begin(gateway, hardware="cuda")
        assert (await get(gateway, name)).done
        await cuda.stop()
        await gateway.until_state(cuda, State.UNREACHABLE)
        assert (await get(gateway, name)).done
        assert cpu.asked + cuda.asked == 2
