"""What can go wrong with a call, in the words of the domain.

No gRPC here: engines raise these too, and they cross the process boundary as plain data (`FaultData`). The one
table that turns them into status codes is in `services.kit.errors`.
"""

import enum
from collections.abc import Iterable, Mapping

import msgspec


class Kind(enum.StrEnum):
    """The families of faults; each maps to exactly one gRPC status code."""

    INVALID_ARGUMENT = "invalid_argument"  # the request is wrong whatever the state of the service
    NOT_FOUND = "not_found"  # it names something that is not here
    OVERLOADED = "overloaded"  # a bound on calls or bytes is reached; later it may fit
    TOO_LARGE = "too_large"  # it can never fit here; do not retry
    DEADLINE = "deadline"  # it cannot finish in the time the caller gives
    UNAVAILABLE = "unavailable"  # loading, draining, engine lost, no endpoint; retry is safe
    FAILED_PRECONDITION = "failed_precondition"  # this node lacks what it takes, such as the hardware
    UNAUTHENTICATED = "unauthenticated"  # nobody knows who calls
    PERMISSION_DENIED = "permission_denied"  # it is known who calls, and they may not
    CANCELLED = "cancelled"  # somebody cancelled the work; said of operations, not of calls
    INTERNAL = "internal"  # a defect of ours


class FieldViolation(msgspec.Struct, frozen=True):
    """Which request field is wrong and what would be accepted."""

    field: str
    description: str


class Resource(msgspec.Struct, frozen=True):
    """What was looked for and not found."""

    type: str
    name: str


class FaultData(msgspec.Struct, frozen=True):
    """A fault as it crosses the process boundary."""

    kind: Kind
    reason: str
    message: str
    fields: tuple[FieldViolation, ...] = ()
    resource: Resource | None = None
    retry_after_ms: int | None = None
    metadata: dict[str, str] = {}


class Fault(Exception):
    """A call that ends without its result, for a reason the caller is told."""

    def __init__(self, data: FaultData) -> None:
        super().__init__(data.message)
        self.data = data

    def __str__(self) -> str:
        return f"{self.data.reason}: {self.data.message}"


def invalid_field(field: str, description: str, *, reason: str = "INVALID_FIELD", **metadata: object) -> Fault:
    """The named request field breaks a limit; `description` says the limit and what would be accepted."""
    return Fault(
        FaultData(
            Kind.INVALID_ARGUMENT,
            reason,
            f"{field}: {description}",
            fields=(FieldViolation(field, description),),
            metadata=_strings({"field": field, **metadata}),
        )
    )


def invalid_fields(violations: Iterable[FieldViolation]) -> Fault:
    """Several fields are wrong at once."""
    listed = tuple(violations)
    message = "; ".join(f"{v.field}: {v.description}" for v in listed)
    return Fault(FaultData(Kind.INVALID_ARGUMENT, "INVALID_FIELD", message, fields=listed))


def not_found(resource_type: str, name: str, known: Iterable[str], *, field: str) -> Fault:
    """`name` is not one of `known`; the message lists what is."""
    shown = name if len(name) <= 80 else name[:77] + "..."
    there = ", ".join(sorted(known)) or "none"
    return Fault(
        FaultData(
            Kind.NOT_FOUND,
            f"{resource_type.upper()}_NOT_FOUND",
            f"{field}: there is no {resource_type} {shown!r}; here are: {there}",
            fields=(FieldViolation(field, f"one of: {there}"),),
            resource=Resource(resource_type, shown),
            metadata={"field": field},
        )
    )


def overloaded(reason: str, message: str, *, retry_after_ms: int, **metadata: object) -> Fault:
    """A bound is reached; the same call may succeed after `retry_after_ms`."""
    return Fault(
        FaultData(Kind.OVERLOADED, reason, message, retry_after_ms=max(1, retry_after_ms), metadata=_strings(metadata))
    )


def too_large(field: str, reason: str, description: str, **metadata: object) -> Fault:
    """The request can never be served here, whatever the load."""
    return Fault(
        FaultData(
            Kind.TOO_LARGE,
            reason,
            f"{field}: {description}",
            fields=(FieldViolation(field, description),),
            metadata=_strings({"field": field, **metadata}),
        )
    )


def unavailable(reason: str, message: str, *, retry_after_ms: int, **metadata: object) -> Fault:
    """Not now, but a retry here or elsewhere is safe."""
    return Fault(
        FaultData(Kind.UNAVAILABLE, reason, message, retry_after_ms=max(1, retry_after_ms), metadata=_strings(metadata))
    )


def failed_precondition(reason: str, message: str, **metadata: object) -> Fault:
    """This node lacks what the call needs; the message says what would help."""
    return Fault(FaultData(Kind.FAILED_PRECONDITION, reason, message, metadata=_strings(metadata)))


def unauthenticated(reason: str, message: str, **metadata: object) -> Fault:
    """Who calls is not known; the message says how to prove it, and never repeats what was sent as proof."""
    return Fault(FaultData(Kind.UNAUTHENTICATED, reason, message, metadata=_strings(metadata)))


def permission_denied(reason: str, message: str, **metadata: object) -> Fault:
    """Who calls is known and may not; the message says what they may."""
    return Fault(FaultData(Kind.PERMISSION_DENIED, reason, message, metadata=_strings(metadata)))


def deadline_too_short(message: str, **metadata: object) -> Fault:
    """The call cannot finish in the time that its deadline leaves."""
    return Fault(FaultData(Kind.DEADLINE, "DEADLINE_TOO_SHORT", message, metadata=_strings(metadata)))


def internal(message: str) -> Fault:
    """A defect of the service; the log has the details."""
    return Fault(FaultData(Kind.INTERNAL, "INTERNAL", message))


def _strings(metadata: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in metadata.items()}
