"""The one table from domain faults to gRPC status codes, and the google.rpc details that go with them."""

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.kit.faults import Fault, FaultData, Kind

DOMAIN = "inkwell.dev"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

CODES: dict[Kind, grpc.StatusCode] = {
    Kind.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Kind.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Kind.CANCELLED: grpc.StatusCode.CANCELLED,
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}


def to_status(fault: Fault | FaultData) -> status_pb2.Status:
    """The google.rpc.Status of a fault: ErrorInfo always; BadRequest, ResourceInfo and RetryInfo where they apply."""
    data = fault.data if isinstance(fault, Fault) else fault
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=data.reason, domain=DOMAIN, metadata=data.metadata)]
    if data.fields:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in data.fields
                ]
            )
        )
    if data.resource is not None:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=data.resource.type, resource_name=data.resource.name, description=data.message
            )
        )
    if data.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(data.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=CODES[data.kind].value[0], message=data.message, details=[_packed(detail) for detail in details]
    )


async def abort(
    context: grpc.aio.ServicerContext, fault: Fault, more_trailers: Iterable[tuple[str, str | bytes]] = ()
) -> None:
    """End the call with the fault's status; raises grpc.aio.AbortError, as abort always does."""
    status = rpc_status.to_status(to_status(fault))
    trailers = [*status.trailing_metadata, *more_trailers]
    if fault.data.kind is Kind.OVERLOADED and fault.data.retry_after_ms is not None:
        # gRPC clients with a retry policy wait this long instead of their own backoff.
        trailers.append((PUSHBACK_KEY, str(fault.data.retry_after_ms)))
    await context.abort(status.code, status.details, tuple(trailers))


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
