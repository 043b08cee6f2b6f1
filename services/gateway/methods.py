"""Which gRPC services the gateway routes, and the shape of their methods.

The one table that ties the names used in the configuration to protobuf services. Another service needs a line in
`_SERVICES` and nothing else. The calls about operations are the same for all services: which of them is meant stands in
the operation's name, so of these, and of no others, the gateway reads the request.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError

from inkwell.compiler.v1 import compiler_pb2
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from inkwell.operations.v1 import operations_pb2 as watch_pb2
from services.kit import faults

_SERVICES: dict[str, ServiceDescriptor] = {
    "ocr": ocr_pb2.DESCRIPTOR.services_by_name["OcrService"],
    "diffusion": diffusion_pb2.DESCRIPTOR.services_by_name["DiffusionService"],
    "compiler": compiler_pb2.DESCRIPTOR.services_by_name["CompilerService"],
}

# Configuration name -> full protobuf name, such as "ocr" -> "inkwell.ocr.v1.OcrService".
FULL_NAMES: dict[str, str] = {name: descriptor.full_name for name, descriptor in _SERVICES.items()}
_NAMES: dict[str, str] = {full: name for name, full in FULL_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Method:
    """One routed method."""

    path: str  # as on the wire: "/inkwell.ocr.v1.OcrService/Recognize"
    label: str  # for metrics: "inkwell.ocr.v1.OcrService/Recognize", or ".../other" for methods not in the table
    service: str  # configuration name: "ocr"
    request_streaming: bool
    response_streaming: bool
    # Of a call about an operation: the name in its request, which says the service; `service` is empty until then.
    operation_name: Callable[[bytes], str] | None = None
    known: bool = True  # False for a path that the protos of this build do not have, so the caller may have made it up


METHODS: dict[str, Method] = {
    f"/{descriptor.full_name}/{method.name}": Method(
        path=f"/{descriptor.full_name}/{method.name}",
        label=f"{descriptor.full_name}/{method.name}",
        service=name,
        request_streaming=method.client_streaming,
        response_streaming=method.server_streaming,
    )
    for name, descriptor in _SERVICES.items()
    for method in descriptor.methods
}


def _named(message: Any) -> Callable[[bytes], str]:
    def name(request: bytes) -> str:
        return str(message.FromString(request).name)

    return name


_OPERATIONS = "google.longrunning.Operations"
_WATCH = watch_pb2.DESCRIPTOR.services_by_name["OperationsWatchService"].full_name
# Full names of the services that are not one service's own.
SHARED_NAMES = (_OPERATIONS, _WATCH)
METHODS |= {
    f"/{full}/{name}": Method(
        path=f"/{full}/{name}",
        label=f"{full}/{name}",
        service="",
        request_streaming=False,
        response_streaming=streaming,
        operation_name=_named(message),
    )
    for full, name, message, streaming in (
        (_OPERATIONS, "GetOperation", operations_pb2.GetOperationRequest, False),
        (_OPERATIONS, "ListOperations", operations_pb2.ListOperationsRequest, False),
        (_OPERATIONS, "CancelOperation", operations_pb2.CancelOperationRequest, False),
        (_OPERATIONS, "DeleteOperation", operations_pb2.DeleteOperationRequest, False),
        (_OPERATIONS, "WaitOperation", operations_pb2.WaitOperationRequest, False),
        (_WATCH, "Watch", watch_pb2.WatchRequest, True),
    )
}


def addressed(method: Method, request: bytes) -> Method:
    """The method with the service that this request is for; raises Fault for an operation's name that says none."""
    if method.operation_name is None:
        return method
    try:
        name = method.operation_name(request)
    except DecodeError:
        raise faults.invalid_field("name", "the request cannot be read; is it a message of this method?") from None
    first, _, rest = name.partition("/")
    service = rest.partition("/")[0]
    if first != "operations" or service not in FULL_NAMES:
        raise faults.invalid_field(
            "name",
            f"{name[:80]!r} names no service; accepted: operations/SERVICE/ID, or operations/SERVICE to list, with"
            f" SERVICE one of {', '.join(FULL_NAMES)}",
        )
    return replace(method, service=service)


def find(path: str) -> Method | None:
    """The method at a wire path; None if its service is not routed here.

    A method that this build's protos do not know is passed on as a stream both ways, which on the wire every arity is:
    an older gateway serves a newer service.
    """
    known = METHODS.get(path)
    if known is not None:
        return known
    full, _, name = path.removeprefix("/").rpartition("/")
    service = _NAMES.get(full)
    if service is None or not name:
        return None
    return Method(path, f"{full}/other", service, request_streaming=True, response_streaming=True, known=False)
