"""Operations: their state, their events, and what they carry."""

from collections.abc import Callable
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from inkwell import types
from inkwell.converters import shared
from inkwell.errors import InkwellError, InternalError, error_from_status
from inkwell.operations.v1 import operations_pb2 as watch_pb2

Known = dict[str, tuple[type[Message], Callable[[Any], Any]]]

# By full name, the messages that operations carry as metadata or response, and what makes a dataclass of each.
KNOWN: Known = {}


def unpack(carried: any_pb2.Any) -> Any:
    """The dataclass of what an operation carries; None of nothing. Raises InternalError for a type not known here."""
    if not carried.type_url:
        return None
    name = carried.TypeName()
    kind, convert = KNOWN.get(name, (None, None))
    if kind is None or convert is None:
        raise InternalError(f"this version of the SDK does not know {name}; update it", reason="TYPE_UNKNOWN")
    try:
        return convert(kind.FromString(carried.value))
    except DecodeError as error:
        raise InternalError(f"the server sent a {name} that cannot be read", reason="MESSAGE_BROKEN") from error


def outcome(message: operations_pb2.Operation) -> tuple[Any, InkwellError | None]:
    """Result and error of an operation that is done; (None, None) of one that is not."""
    if message.HasField("error"):
        return None, error_from_status(message.error)
    return unpack(message.response), None


def event(response: watch_pb2.WatchResponse) -> types.OperationEvent | None:
    """None for an event that this version does not know."""
    number = response.sequence
    match response.WhichOneof("event"):
        case "queued":
            return types.Queued(number, response.queued.position)
        case "started":
            return shared.started(number, response.started)
        case "progress":
            said = response.progress
            return types.OperationProgress(
                number, said.progress.step, said.progress.step_count, said.progress.eta_ms, said.stage, said.note
            )
        case "done":
            return types.OperationDone(number, *outcome(response.done))
    return None
