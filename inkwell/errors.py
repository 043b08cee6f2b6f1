"""What a call can end with instead of its result.

    InkwellError
    ├── InvalidRequest       a field of the request is wrong, whatever the state of the server
    ├── NotFound             it names a model, scheduler, … that is not there
    ├── TooLarge             it can never fit there; do not retry
    ├── Overloaded           a bound is reached; retry after `retry_after_s`
    ├── Unavailable          unreachable, loading, draining, engine lost; a retry is safe
    ├── DeadlineExceeded     it did not, or could not, finish within its timeout
    ├── FailedPrecondition   the server lacks what it takes, such as the hardware
    ├── Unimplemented        the server does not have this call
    ├── Unauthenticated      the server does not know who calls
    ├── PermissionDenied     it knows, and refuses
    ├── Cancelled            somebody cancelled it
    └── InternalError        a defect of the server

Every error carries the details that the server sent with it (google.rpc ErrorInfo, BadRequest, RetryInfo and
ResourceInfo) and a `hint`: one sentence on what to do.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A request field by its path in the proto ("decoding.beam_width"), and what would be accepted there."""

    field: str
    description: str


class InkwellError(Exception):
    """A call that ended without its result; catch this for all of them."""

    default_code: ClassVar[str] = "UNKNOWN"
    default_hint: ClassVar[str] = "The server's log has more."

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        fields: Iterable[FieldViolation] = (),
        resource: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What happened, in a sentence."""
        self.code = code or self.default_code
        """gRPC status code by name, such as "INVALID_ARGUMENT"."""
        self.reason = reason
        """UPPER_SNAKE name of this very failure, such as "QUEUE_FULL"; empty when the server did not say."""
        self.fields = tuple(fields)
        """The request fields that are wrong."""
        self.resource = resource
        """Name of what was looked for and not found; empty for other errors."""
        self.retry_after_s = retry_after_s
        """Seconds after which the same call may succeed; None when the server did not say."""
        self.metadata = dict(metadata or {})
        """Whatever else the server told about it."""

    @property
    def hint(self) -> str:
        """One sentence on what to do."""
        return self.default_hint


class InvalidRequest(InkwellError):
    """A field of the request is wrong, whatever the state of the server; `fields` name it and what is accepted."""

    default_code = "INVALID_ARGUMENT"

    @property
    def hint(self) -> str:
        names = ", ".join(violation.field for violation in self.fields)
        return f"Correct {names}." if names else "Correct the request; the same one will fail again."


class NotFound(InkwellError):
    """The request names something that is not there; the message lists what is."""

    default_code = "NOT_FOUND"
    default_hint = "Take a name from the message, or ask for models(), schedulers(), adapters() and controls()."


class TooLarge(InkwellError):
    """The request can never fit there, whatever the load."""

    default_code = "RESOURCE_EXHAUSTED"
    default_hint = "Send less: a smaller picture, size or file, or fewer pictures; the same request will fail again."


class Overloaded(InkwellError):
    """A bound on calls or bytes is reached; later the same call may succeed."""

    default_code = "RESOURCE_EXHAUSTED"

    @property
    def hint(self) -> str:
        return f"Try again {_later(self.retry_after_s)}, or call a fleet with more machines."


class Unavailable(InkwellError):
    """Unreachable, loading, draining or its engine lost; a retry is safe."""

    default_code = "UNAVAILABLE"

    @property
    def hint(self) -> str:
        if self.reason == "UNREACHABLE":
            return "Check the address, and that the server is running and speaks the same TLS or plaintext."
        return f"Try again {_later(self.retry_after_s)}."


class DeadlineExceeded(InkwellError):
    """The call did not finish within its timeout, or was refused because it could not."""

    default_code = "DEADLINE_EXCEEDED"
    default_hint = "Allow more time (timeout), or ask for less: fewer steps, fewer pictures, a narrower beam."


class FailedPrecondition(InkwellError):
    """The server lacks what the call needs, such as the hardware."""

    default_code = "FAILED_PRECONDITION"
    default_hint = "Ask for other hardware or another model; fleet() and models() list what there is."


class Unimplemented(InkwellError):
    """The server does not have this call."""

    default_code = "UNIMPLEMENTED"
    default_hint = "Call a gateway, which has them all, or the service that does this; or update the server."


class Unauthenticated(InkwellError):
    """The server does not know who calls."""

    default_code = "UNAUTHENTICATED"
    default_hint = "Send valid credentials."


class PermissionDenied(InkwellError):
    """The server knows who calls, and refuses."""

    default_code = "PERMISSION_DENIED"
    default_hint = "Ask whoever runs the server for access."


class Cancelled(InkwellError):
    """The call was cancelled: by this program, or on the way."""

    default_code = "CANCELLED"
    default_hint = "Call again if it was not meant to be."


class InternalError(InkwellError):
    """A defect of the server, or an answer that makes no sense."""

    default_code = "INTERNAL"


_BY_CODE: dict[str, type[InkwellError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNIMPLEMENTED": Unimplemented,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "CANCELLED": Cancelled,
}


def error_from_rpc(error: Any, target: str) -> InkwellError:
    """The InkwellError for a `grpc.RpcError` of a call to `target`.

    The details are read even where they disagree with the status line, which intermediaries may have rewritten.
    """
    if isinstance(error, grpc.FutureCancelledError):
        return Cancelled("the call was cancelled by this program")
    details: status_pb2.Status | None = None
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                details = status_pb2.Status.FromString(value)
            except DecodeError:
                details = None
    code = error.code().name
    message = error.details() or ""
    if details is None or not details.details:
        return _bare_error(code, message, target)
    return _detailed_error(code, details.message or message, details)


def error_from_status(status: status_pb2.Status) -> InkwellError:
    """The InkwellError for a `google.rpc.Status` inside an answer."""
    known = status.code in code_pb2.Code.values()
    return _detailed_error(code_pb2.Code.Name(status.code) if known else "UNKNOWN", status.message, status)


def invalid(field: str, description: str) -> InvalidRequest:
    """A request that this SDK refuses to send; `description` says what would be accepted."""
    return InvalidRequest(
        f"{field}: {description}", reason="INVALID_FIELD", fields=(FieldViolation(field, description),)
    )


def _bare_error(code: str, message: str, target: str) -> InkwellError:
    """From a status without details: it comes from gRPC itself or from a proxy, not from a service of Inkwell."""
    if code == "UNAVAILABLE":
        return Unavailable(f"cannot reach {target}: {message}", reason="UNREACHABLE")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"no answer from {target} in time", reason="DEADLINE_EXCEEDED")
    if code == "RESOURCE_EXHAUSTED":
        never = "larger than max" in message  # gRPC's own words about its message size limits, on either side
        kind: type[InkwellError] = TooLarge if never else Overloaded
        return kind(message, reason="MESSAGE_TOO_LARGE" if never else "")
    if code == "UNIMPLEMENTED":
        return Unimplemented(f"{target} does not have this call: {message}")
    return _BY_CODE.get(code, InternalError)(message or code, code=code)


def _detailed_error(code: str, message: str, status: status_pb2.Status) -> InkwellError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    resource = error_details_pb2.ResourceInfo()
    retryable = False
    for detail in status.details:
        with contextlib.suppress(DecodeError):  # a garbled detail must not hide the error itself
            detail.Unpack(info)
            detail.Unpack(bad_request)
            detail.Unpack(resource)
            retryable = detail.Unpack(retry) or retryable
    kind = _BY_CODE.get(code, InternalError)
    if code == "RESOURCE_EXHAUSTED":
        kind = Overloaded if retryable else TooLarge
    return kind(
        message or info.reason or code,
        code=code,
        reason=info.reason,
        fields=(FieldViolation(v.field, v.description) for v in bad_request.field_violations),
        resource=resource.resource_name,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retryable else None,
        metadata=info.metadata,
    )


def _later(retry_after_s: float | None) -> str:
    return "later" if retry_after_s is None else f"in {retry_after_s:.3g} s"
