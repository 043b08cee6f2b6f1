"""How the SDK reaches a server: message limits, keepalive, retries and metadata, each in this one place."""

import asyncio
import json
import sys
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import grpc.aio

from inkwell.errors import Unavailable, invalid
from inkwell.version import __version__

DEFAULT_TIMEOUT_S = 300.0
"""How long a call may take when nothing else is asked for."""

MIB = 1 << 20

REQUEST_BYTES_MOST = (1 << 31) - 1
"""The longest request: protobuf's own limit. Servers take less, 32 or 64 MiB unless set otherwise, and say so."""

BATCH_REQUEST_BYTES_MOST = 32 * MIB
"""The longest request on a shared stream, where one that a server refuses would end the stream for all: what servers
take unless set otherwise."""

ENVELOPE_BYTES = 4096
"""Room for everything in a request that is not the file."""

RESPONSE_BYTES_MOST = 256 * MIB
"""The longest answer: several large pictures at once."""

RETRY_BUFFER_BYTES = 64 * MIB
"""The longest request that is retried; gRPC's default, 256 KiB, is less than a photo."""

KEEPALIVE_S = 30.0
"""A silent connection with calls under way is probed this often …"""

KEEPALIVE_TIMEOUT_S = 20.0
"""… and given up when the probe is not answered within this time."""

RECONNECT_FIRST_S = 0.2
"""A connection that failed is tried again after this time, …"""

RECONNECT_MOST_S = 5.0
"""… and then after times that grow to this one; gRPC's own two minutes would leave a server that is back unused. Both
with gRPC's jitter of ±20 %."""

REQUEST_ID_KEY = "inkwell-request-id"
"""Metadata that names a call, so that the services know its repetition: it joins the call under way, or gets the answer
that they kept, and nothing is computed twice."""

TRACE_KEY, TRACE_STATE_KEY = "traceparent", "tracestate"
"""Metadata that says which trace a call belongs to: https://www.w3.org/TR/trace-context/."""

Metadata = tuple[tuple[str, str], ...]

# UNAVAILABLE: the servers answer it when nothing was done yet. CANCELLED: what gRPC itself makes of a call that meets
# its server's shutdown; a caller that cancels is not retried. gRPC adds jitter of ±20 % to every backoff, obeys
# `grpc-retry-pushback-ms`, and retries only while no answer has begun. Throttling stops retries once a hundred tokens,
# of which a failure takes one and a call that went well gives back a tenth, are down to a half: all calls that one
# server took with it can be retried at once, yet a fleet in trouble is not buried.
SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}


def channel_options() -> list[tuple[str, Any]]:
    """gRPC channel arguments of every Inkwell client."""
    return [
        ("grpc.primary_user_agent", f"inkwell-python/{__version__}"),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", RESPONSE_BYTES_MOST),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        # A probe waits for the answer to any other ping, such as the ones that measure bandwidth after data came in; to
        # these gRPC gives a minute unless told otherwise.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 0),
        # Else a stream on which only the server speaks, such as a watch, is not probed any more after two probes.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", int(RECONNECT_FIRST_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(RECONNECT_MOST_S * 1000)),
    ]


def open_channel(target: str, credentials: Any | None) -> Any:
    """A blocking `grpc.Channel`; plaintext when `credentials` (a `grpc.ChannelCredentials`) is None."""
    if credentials is None:
        return grpc.insecure_channel(target, options=channel_options())
    return grpc.secure_channel(target, credentials, options=channel_options())


def open_aio_channel(target: str, credentials: Any | None) -> Any:
    """A `grpc.aio.Channel`, bound to the running event loop."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=channel_options())
    return grpc.aio.secure_channel(target, credentials, options=channel_options())


def call_metadata(
    hardware: str | None, priority: str | None, extra: Mapping[str, str] | Iterable[tuple[str, str]] | None
) -> Metadata:
    """The metadata of every call; raises InvalidRequest for what HTTP/2 headers cannot carry."""
    items = list(extra.items() if isinstance(extra, Mapping) else extra or ())
    if hardware:
        items.append(("inkwell-hardware", hardware))
    if priority:
        items.append(("inkwell-priority", priority))
    for key, value in items:
        if not key or not key.isascii() or key != key.lower() or not key.replace("-", "").replace("_", "").isalnum():
            raise invalid("metadata", f"keys are lower-case letters, digits, '-' and '_', not {key!r}")
        if not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise invalid(key, "metadata values are printable ASCII")  # not shown: it may be a secret
        if key == REQUEST_ID_KEY:
            raise invalid(key, "it names one call, so it cannot be sent with every call; the SDK gives each its own")
    return tuple(items)


def named(metadata: Metadata, request_id: str | None) -> Metadata:
    """The metadata of one call, with the id that all attempts at it share: one of its own if None.

    Raises InvalidRequest for one that is no UUID.
    """
    try:
        number = uuid.uuid4() if request_id is None else uuid.UUID(request_id)
    except (ValueError, TypeError, AttributeError):
        raise invalid("request_id", f"{str(request_id)[:80]!r} is not a UUID; str(uuid.uuid4()) makes one") from None
    return (*traced(metadata), (REQUEST_ID_KEY, str(number)))


def traced(metadata: Metadata) -> Metadata:
    """The metadata of a call, with the trace that the calling program is in, if it uses OpenTelemetry.

    What it has set by itself stays. OpenTelemetry is no dependency: a program that does not import it has no trace.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None or any(key == TRACE_KEY for key, _ in metadata):
        return metadata
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return metadata
    state = context.trace_state.to_header() if context.trace_state else ""
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"
    return (*metadata, (TRACE_KEY, parent), *(((TRACE_STATE_KEY, state),) if state else ()))


def wait_until_ready(channel: Any, target: str, wait_s: float) -> None:
    """Block until a connection stands; raises Unavailable after `wait_s`."""
    ready = grpc.channel_ready_future(channel)
    try:
        ready.result(timeout=wait_s)
    except grpc.FutureTimeoutError:
        raise _not_reached(target, wait_s) from None
    finally:
        ready.cancel()


async def wait_until_ready_async(channel: Any, target: str, wait_s: float) -> None:
    """The same on the event loop."""
    try:
        async with asyncio.timeout(wait_s):
            await channel.channel_ready()
    except TimeoutError:
        raise _not_reached(target, wait_s) from None


def _not_reached(target: str, wait_s: float) -> Unavailable:
    return Unavailable(f"cannot reach {target}: no connection within {wait_s:g} s", reason="UNREACHABLE")
