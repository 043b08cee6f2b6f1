"""What a servicer asks about the call it is in."""

import contextvars
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc

from services.kit import faults
from services.kit.admission import Priority

PRIORITY_KEY = "inkwell-priority"
# In a reply's header: which model answered, from which weights, and what computed it.
MODEL_KEY = "inkwell-model"
MODEL_VERSION_KEY = "inkwell-model-version"
RUNTIME_KEY = "inkwell-runtime"
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")


@dataclass(slots=True)
class CallLabels:
    """Of one call, what the boundary and what is behind it tell each other: metric labels, and what is sent."""

    model: str = ""
    hardware: str = ""
    method: str = ""  # instead of the call's own path, where a handler takes paths that callers make up
    served: tuple[tuple[str, str], ...] = ()  # what the reply's header says of the model
    header_sent: bool = False
    header: tuple[Any, ...] | None = None  # of a unary reply, to be sent with it and instead of `served`
    request_id: str = ""
    received: tuple[Any, ...] | None = None  # the caller's metadata


current_labels: contextvars.ContextVar[CallLabels] = contextvars.ContextVar("inkwell_call_labels")


def label_call(*, model: str, hardware: str, runtime: str = "", version: str = "") -> None:
    """Name the model and hardware that serve the current call, for its metrics, its log line and the reply's header.

    runtime: what computes the model, such as "torch"; version: of its weights. The header has both, or neither.
    """
    labels = current_labels.get(None)
    if labels is not None:
        labels.model, labels.hardware = model, hardware
        if runtime:
            named = ((MODEL_KEY, model), (MODEL_VERSION_KEY, version), (RUNTIME_KEY, runtime))
            # Names come from folders, and a header is ASCII.
            labels.served = tuple((key, quote(value, safe=_PLAIN)) for key, value in named if value)


def received(context: grpc.aio.ServicerContext) -> tuple[Any, ...]:
    """The metadata that the caller sent."""
    labels = current_labels.get(None)
    # grpc.aio decodes it anew for everyone who asks.
    if labels is not None and labels.received is not None:
        return labels.received
    return tuple(context.invocation_metadata() or ())


def request_id() -> str:
    """The id of the current call in the logs; empty outside a call."""
    labels = current_labels.get(None)
    return labels.request_id if labels is not None else ""


def reply_with(header: tuple[Any, ...]) -> None:
    """Let the boundary send this header with the unary reply of the current call, in one piece."""
    current_labels.get().header = header


async def send_header(context: grpc.aio.ServicerContext) -> None:
    """Send the reply's header now, with what `label_call` said; the boundary sends that of a unary reply by itself.

    Not before the call is admitted: a refusal that comes without a header may be retried by the client's own policy.
    """
    labels = current_labels.get(None)
    served: tuple[tuple[str, str], ...] = ()
    if labels is not None:
        labels.header_sent, served = True, labels.served
    await context.send_initial_metadata(served)


def label_method(label: str) -> None:
    """Count the current call under this method, not under its path; for handlers that answer for any path."""
    labels = current_labels.get(None)
    if labels is not None:
        labels.method = label


def priority_of(context: grpc.aio.ServicerContext) -> Priority:
    """The caller's priority from metadata `inkwell-priority`, NORMAL without it; raises Fault for another value."""
    value = _metadata_value(context, PRIORITY_KEY)
    if value is None:
        return Priority.NORMAL
    try:
        return Priority[value.strip().upper()]
    except KeyError:
        known = ", ".join(p.name.lower() for p in Priority)
        raise faults.invalid_field(
            f"metadata {PRIORITY_KEY}", f"{value[:40]!r} is not a priority; accepted: {known}"
        ) from None


def time_left(context: grpc.aio.ServicerContext) -> float | None:
    """Seconds until the caller's deadline, None without one."""
    left = context.time_remaining()
    # grpc answers a number of years when the caller set no deadline.
    return None if left is None or left > 10 * 365 * 86400 else left


def _metadata_value(context: grpc.aio.ServicerContext, key: str) -> str | None:
    for name, value in received(context):
        if name == key:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
