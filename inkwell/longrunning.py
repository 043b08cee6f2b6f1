"""google.longrunning.Operations as this SDK calls it, and watching an operation over streams that may break."""

import time
from collections.abc import Callable
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

from inkwell import types
from inkwell.converters import operation, shared
from inkwell.errors import DeadlineExceeded, InkwellError, Unavailable
from inkwell.operations.v1 import operations_pb2 as watch_pb2

# A server that is restarted, or a gateway that finds another one, is back well within this time.
GIVE_UP_S = 60.0
_FIRST_DELAY_S = 0.1
_DELAY_MOST_S = 3.0
_PAGE_SIZE = 200


class OperationsStub:
    """The calls, over a blocking channel or one of grpc.aio.

    Not google.longrunning.operations_pb2_grpc: which of its modules googleapis-common-protos builds it on changes
    between versions, and the wrong pair defines every message twice.
    """

    def __init__(self, channel: Any) -> None:
        def method(name: str, request: Any, response: Any) -> Any:
            return channel.unary_unary(
                f"/google.longrunning.Operations/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )

        pb = operations_pb2
        self.GetOperation = method("GetOperation", pb.GetOperationRequest, pb.Operation)
        self.ListOperations = method("ListOperations", pb.ListOperationsRequest, pb.ListOperationsResponse)
        self.CancelOperation = method("CancelOperation", pb.CancelOperationRequest, empty_pb2.Empty)
        self.DeleteOperation = method("DeleteOperation", pb.DeleteOperationRequest, empty_pb2.Empty)


class Following:
    """What a watcher has seen of an operation, and whether it asks again when the stream breaks.

    after_sequence: it has seen the events up to this one. timeout_s: time that it has, None for ever.
    """

    def __init__(
        self,
        name: str,
        after_sequence: int,
        *,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._failed_since: float | None = None
        self._delay_s = _FIRST_DELAY_S
        self.sequence = after_sequence

    def request(self) -> watch_pb2.WatchRequest:
        """For all that has not been seen."""
        return watch_pb2.WatchRequest(name=self._name, after_sequence=self.sequence)

    def left_s(self) -> float | None:
        """Seconds that are left, None for any number."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def take(self, response: watch_pb2.WatchResponse) -> types.OperationEvent | None:
        """The event of the next message; raises InternalError if one is missing before it."""
        self.sequence = shared.in_sequence(self.sequence, response)
        self._failed_since, self._delay_s = None, _FIRST_DELAY_S
        return operation.event(response)

    def ended_early(self) -> Unavailable:
        """The error of a stream that something on the way ended well, before the operation was done."""
        return Unavailable(f"the stream of {self._name} ended before it was done", reason="STREAM_ENDED")

    def delay_s(self, error: InkwellError) -> float:
        """How long to wait before asking again; raises `error` where that would not help, or has not for too long.

        Raises DeadlineExceeded if no time is left.
        """
        if not isinstance(error, Unavailable) and not _stream_broke(error):
            raise error
        now = self._clock()
        self._failed_since = now if self._failed_since is None else self._failed_since
        if now - self._failed_since >= GIVE_UP_S:
            raise error
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _DELAY_MOST_S)
        delay_s = max(delay_s, min(error.retry_after_s or 0.0, _DELAY_MOST_S))
        if (left_s := self.left_s()) is None:
            return delay_s
        if not left_s:
            raise DeadlineExceeded(f"{self._name} was not done in time", reason="DEADLINE_EXCEEDED") from error
        return min(delay_s, left_s)


def _stream_broke(error: InkwellError) -> bool:
    # A process that is killed may end its streams so; without details, so no service said it.
    return error.code in ("INTERNAL", "UNKNOWN") and not error.reason and "stream" in error.message.lower()


def list_request(service: str, done: bool | None, page_token: str) -> operations_pb2.ListOperationsRequest:
    """One page. done: only those that are, or are not, done; None for all."""
    return operations_pb2.ListOperationsRequest(
        name=f"operations/{service}",
        filter="" if done is None else f"done={str(done).lower()}",
        page_size=_PAGE_SIZE,
        page_token=page_token,
    )
