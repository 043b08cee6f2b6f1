"""The gRPC surface of operations: google.longrunning.Operations and inkwell.operations.v1.OperationsWatchService."""

import base64
import contextlib
import re
from collections.abc import AsyncGenerator, Callable

import grpc
import msgspec
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from inkwell.operations.v1 import operations_pb2 as watch_pb2
from inkwell.operations.v1 import operations_pb2_grpc as watch_pb2_grpc
from services.kit import errors, faults, identity
from services.kit.call import time_left
from services.kit.faults import FaultData, Kind
from services.kit.operations.kinds import (
    Cancelled,
    Done,
    Event,
    Failed,
    Operation,
    Progress,
    Queued,
    Started,
    Succeeded,
)
from services.kit.operations.service import PREFIX, Operations

FULL_NAME = "google.longrunning.Operations"

_PAGE_MOST = 200
_PAGE = 50
# Sent back this long before the caller's own deadline would end the call without an answer.
_DEADLINE_MARGIN_S = 0.2
_FILTER = re.compile(r"\s*done\s*=\s*(true|false)\s*")

Owner = Callable[[grpc.aio.ServicerContext], str]
"""Names who calls. Operations are seen by their owner only."""


def register(server: grpc.aio.Server, operations: Operations, *, owner: Owner = identity.current) -> list[str]:
    """Add both servicers; answers their full names, as `ServiceServer` wants them of `register`."""
    surface = _Operations(operations, owner)
    methods = {
        "GetOperation": (surface.get, operations_pb2.GetOperationRequest),
        "ListOperations": (surface.page, operations_pb2.ListOperationsRequest),
        "CancelOperation": (surface.cancel, operations_pb2.CancelOperationRequest),
        "DeleteOperation": (surface.delete, operations_pb2.DeleteOperationRequest),
        "WaitOperation": (surface.wait, operations_pb2.WaitOperationRequest),
    }
    # Not operations_pb2_grpc: which of its modules googleapis-common-protos builds it on changes between versions, and
    # the wrong pair defines every message twice.
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            behaviour,
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, (behaviour, request) in methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FULL_NAME, handlers),))
    watch_pb2_grpc.add_OperationsWatchServiceServicer_to_server(_Watch(operations, owner), server)
    return [FULL_NAME, watch_pb2.DESCRIPTOR.services_by_name["OperationsWatchService"].full_name]


def to_message(operations: Operations, operation: Operation) -> operations_pb2.Operation:
    """The google.longrunning.Operation: what calls that begin one answer with."""
    kind = operations.kinds[operation.kind]
    message = operations_pb2.Operation(
        name=operation.name, metadata=_packed(kind.metadata_message(operation.request)), done=operation.done
    )
    match operation.outcome:
        case Succeeded(response):
            message.response.CopyFrom(_packed(kind.response_message(msgspec.json.decode(response, type=kind.response))))
        case Failed(fault):
            message.error.CopyFrom(errors.to_status(fault))
        case Cancelled():
            message.error.CopyFrom(_cancelled(operation))
    return message


class _Operations:
    def __init__(self, operations: Operations, owner: Owner) -> None:
        self._operations = operations
        self._owner = owner

    async def get(
        self, request: operations_pb2.GetOperationRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.Operation:
        return self._message(await self._operations.get(request.name, owner=self._owner(context)))

    async def page(
        self, request: operations_pb2.ListOperationsRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.ListOperationsResponse:
        collection = f"{PREFIX}/{self._operations.service}"
        if request.name not in ("", PREFIX, collection):
            raise faults.invalid_field("name", f"{request.name[:80]!r} is not {collection!r}")
        if not 0 <= request.page_size <= _PAGE_MOST:
            raise faults.invalid_field("page_size", f"{request.page_size} is not 1 to {_PAGE_MOST}, or 0 for {_PAGE}")
        done: bool | None = None
        if request.filter.strip():
            matched = _FILTER.fullmatch(request.filter)
            if matched is None:
                raise faults.invalid_field(
                    "filter", f"{request.filter[:80]!r} is neither 'done=true' nor 'done=false', nor empty for all"
                )
            done = matched[1] == "true"
        found, following = await self._operations.page(
            owner=self._owner(context),
            done=done,
            before=_position(request.page_token),
            limit=request.page_size or _PAGE,
        )
        return operations_pb2.ListOperationsResponse(
            operations=[self._message(operation) for operation in found],
            next_page_token="" if following is None else _token(following),
        )

    async def cancel(
        self, request: operations_pb2.CancelOperationRequest, context: grpc.aio.ServicerContext
    ) -> empty_pb2.Empty:
        await self._operations.cancel(request.name, owner=self._owner(context))
        return empty_pb2.Empty()

    async def delete(
        self, request: operations_pb2.DeleteOperationRequest, context: grpc.aio.ServicerContext
    ) -> empty_pb2.Empty:
        await self._operations.delete(request.name, owner=self._owner(context))
        return empty_pb2.Empty()

    async def wait(
        self, request: operations_pb2.WaitOperationRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.Operation:
        limits = []
        if request.HasField("timeout"):
            limits.append(request.timeout.ToMicroseconds() / 1e6)
            if limits[0] < 0:
                raise faults.invalid_field("timeout", f"{limits[0]:g} s is below 0")
        left = time_left(context)
        if left is not None:
            limits.append(max(0.0, left - _DEADLINE_MARGIN_S))
        timeout_s = min(limits, default=None)
        return self._message(await self._operations.wait(request.name, timeout_s=timeout_s, owner=self._owner(context)))

    def _message(self, operation: Operation) -> operations_pb2.Operation:
        return to_message(self._operations, operation)


class _Watch(watch_pb2_grpc.OperationsWatchServiceServicer):
    def __init__(self, operations: Operations, owner: Owner) -> None:
        self._operations = operations
        self._owner = owner

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[watch_pb2.WatchResponse, None]:
        watched = self._operations.watch(request.name, request.after_sequence, owner=self._owner(context))
        async with contextlib.aclosing(watched) as events:
            async for sequence, event, ended in events:
                response = watch_pb2.WatchResponse(sequence=sequence)
                if ended is not None:
                    response.done.CopyFrom(to_message(self._operations, ended))
                else:
                    _fill(response, event)
                yield response


def _fill(response: watch_pb2.WatchResponse, event: Event) -> None:
    match event:
        case Queued(position):
            response.queued.SetInParent()
            response.queued.position = position
        case Started(hardware, runtime, model):
            response.started.SetInParent()
            response.started.hardware, response.started.runtime, response.started.model = hardware, runtime, model
        case Progress():
            progress = response.progress
            progress.stage, progress.note = event.stage, event.note
            progress.progress.step, progress.progress.step_count = event.step, event.step_count
            progress.progress.eta_ms = event.eta_ms
        case Done():
            raise AssertionError("it comes with its operation")


def _cancelled(operation: Operation) -> status_pb2.Status:
    return errors.to_status(FaultData(Kind.CANCELLED, "OPERATION_CANCELLED", f"{operation.name} was cancelled"))


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _token(position: tuple[int, str]) -> str:
    created_ms, row_id = position
    return base64.urlsafe_b64encode(f"{created_ms}:{row_id}".encode()).decode()


def _position(token: str) -> tuple[int, str] | None:
    if not token:
        return None
    try:
        created_ms, _, row_id = base64.urlsafe_b64decode(token.encode()).decode().partition(":")
        return int(created_ms), row_id
    except ValueError:
        raise faults.invalid_field(
            "page_token", "it is not the next_page_token of a response; leave it empty for the first page"
        ) from None
