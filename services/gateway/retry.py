"""What an endpoint that failed a call says about trying again."""

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from services.gateway.metadata import DETAILS_KEY, PUSHBACK_KEY, Pair
from services.kit.errors import DOMAIN


@dataclass(frozen=True, slots=True)
class RetryWish:
    """allowed: False if the endpoint asks not to retry. delay_s: wait this long before asking it again, if it said."""

    allowed: bool
    delay_s: float | None


MODEL_TOO_LARGE = "MODEL_TOO_LARGE"
# Reasons of our services that say something of the machine, not of the request.
_LACKING = frozenset((MODEL_TOO_LARGE, "HARDWARE_MISSING", "TENSORRT_NOT_HERE", "PRECISION_NOT_SUPPORTED"))
_RESET = "CANCELLED"  # what gRPC says of a stream that was reset with that code
_NOTHING_SAID = RetryWish(allowed=True, delay_s=None)


def wish(trailing: Iterable[Pair]) -> RetryWish:
    """Read `grpc-retry-pushback-ms`, else google.rpc.RetryInfo, from an error's trailers.

    As gRPC has it, a pushback that is negative or not a number forbids the retry. Pushback goes before RetryInfo.
    """
    found = dict(trailing)
    pushback = found.get(PUSHBACK_KEY)
    if pushback is not None:
        try:
            delay_ms = int(pushback)
        except ValueError:
            delay_ms = -1
        return RetryWish(False, None) if delay_ms < 0 else RetryWish(True, delay_ms / 1000)
    details = found.get(DETAILS_KEY)
    if not isinstance(details, bytes):
        return _NOTHING_SAID
    try:
        status = status_pb2.Status.FromString(details)
        for detail in status.details:
            info = error_details_pb2.RetryInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
                return RetryWish(True, max(0.0, info.retry_delay.ToTimedelta().total_seconds()))
    except (DecodeError, OverflowError):
        # Details are the endpoint's own business; it is only their retry delay that we cannot read.
        return _NOTHING_SAID
    return _NOTHING_SAID


def is_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether nothing will come of the attempt, and another may be made.

    CANCELLED without a word of explanation comes from no handler: so gRPC ends a call that meets the shutdown of the
    server it is sent to, whose stream is reset. That its own caller left is not told by an error.
    """
    if error.code() is grpc.StatusCode.CANCELLED:
        return not error.trailing_metadata() and error.details() == _RESET
    return error.code() is grpc.StatusCode.UNAVAILABLE


def asks_to_wait(trailing: Iterable[Pair]) -> bool:
    """Whether an error's trailers say when to come back: of RESOURCE_EXHAUSTED, that later there may be room."""
    return any(key == PUSHBACK_KEY for key, _ in trailing)


def lacks(error: grpc.aio.AioRpcError) -> str:
    """The reason, if the endpoint refused the call for what it has not and another may have; "" for anything else."""
    if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION):
        return ""
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    if not isinstance(details, bytes):
        return ""
    try:
        for detail in status_pb2.Status.FromString(details).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
                return info.reason if info.domain == DOMAIN and info.reason in _LACKING else ""
    except DecodeError:
        return ""
    return ""


def backoff_s(attempt: int) -> float:
    """Seconds to wait before asking the same endpoint again when it did not say: 0.05, 0.1, 0.2 … at most 1."""
    return float(min(1.0, 0.05 * 2 ** (attempt - 1)))
