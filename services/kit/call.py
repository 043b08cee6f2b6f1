"""What a servicer asks about the call it is in."""

import contextvars
from dataclasses import dataclass

import grpc

from services.kit import faults
from services.kit.admission import Priority

PRIORITY_KEY = "inkwell-priority"


@dataclass
class CallLabels:
    """Metric labels that only the servicer knows."""

    model: str = ""
    hardware: str = ""
    method: str = ""  # instead of the call's own path, where a handler takes paths that callers make up


current_labels: contextvars.ContextVar[CallLabels] = contextvars.ContextVar("inkwell_call_labels")


def label_call(*, model: str, hardware: str) -> None:
    """Name the model and hardware that serve the current call, for its metrics and log line."""
    labels = current_labels.get(None)
    if labels is not None:
        labels.model, labels.hardware = model, hardware


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
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
