"""An operation, as the blocking client holds it."""

import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
from google.longrunning import operations_pb2

from inkwell import types
from inkwell.converters import operation
from inkwell.errors import InkwellError, Unavailable, error_from_rpc
from inkwell.longrunning import Following

if TYPE_CHECKING:
    from inkwell.calls import Calls

Result = TypeVar("Result")


class Operation(Generic[Result]):
    """Work that goes on at the server without this program: through disconnects, and restarts of either.

    Keep its `name`; `Client.operation(name)` finds it again, as long as the server keeps what came of it.
    """

    def __init__(self, calls: "Calls", message: operations_pb2.Operation) -> None:
        self._calls = calls
        self._message = message

    def __repr__(self) -> str:
        return f"<Operation {self.name} {'done' if self.done else 'under way'}>"

    @property
    def name(self) -> str:
        """Such as "operations/compiler/6f1c…"."""
        return str(self._message.name)

    @property
    def done(self) -> bool:
        """Whether it had ended when this program last looked."""
        return bool(self._message.done)

    @property
    def metadata(self) -> Any:
        """What it is about."""
        return operation.unpack(self._message.metadata)

    def refresh(self, *, timeout_s: float | None = None) -> "Operation[Result]":
        """Look again; answers itself."""
        request = operations_pb2.GetOperationRequest(name=self.name)
        self._message, _ = self._calls._unary(self._calls._operations.GetOperation, request, timeout_s)
        return self

    def result(
        self,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[types.OperationEvent], object] | None = None,
    ) -> Result:
        """Wait until it is done; raises the error that it ended in.

        timeout_s: raises DeadlineExceeded after so long, and the operation goes on; None waits as long as it takes.
        on_event: called with every event, from the first on.
        """
        if not self.done or on_event is not None:
            for event in self.events(timeout_s=timeout_s):
                if on_event is not None:
                    on_event(event)
        result, error = operation.outcome(self._message)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def events(
        self, after_sequence: int = 0, *, timeout_s: float | None = None
    ) -> Generator[types.OperationEvent, None, None]:
        """Everything it has said after that sequence and says as it goes on, OperationDone last.

        A stream that breaks is taken up where it broke, for a minute. Closing the iterator does not end the operation.
        """
        calls = self._calls
        following = Following(self.name, after_sequence, timeout_s=timeout_s)
        while True:
            was_done = self.done
            stream: Any = None
            try:
                timeout = calls._prepare(following.left_s())
                stream = calls._watch.Watch(following.request(), timeout=timeout, metadata=calls._metadata)
                for response in stream:
                    event = following.take(response)
                    if response.HasField("done"):
                        self._message = response.done
                    if event is not None:
                        yield event
                if was_done or self.done:
                    return
                # It was done before, with nothing left to say, or else something on the way ended the stream.
                self.refresh(timeout_s=timeout)
                if self.done:
                    continue
                failure: InkwellError = following.ended_early()
            except grpc.RpcError as error:
                failure = error_from_rpc(error, calls._target)
            except Unavailable as error:  # no connection
                failure = error
            finally:
                if stream is not None:
                    stream.cancel()
            time.sleep(following.delay_s(failure))

    def cancel(self, *, timeout_s: float | None = None) -> None:
        """End it, if it is not done; it then raises Cancelled."""
        request = operations_pb2.CancelOperationRequest(name=self.name)
        self._calls._unary(self._calls._operations.CancelOperation, request, timeout_s)
        self.refresh(timeout_s=timeout_s)

    def delete(self, *, timeout_s: float | None = None) -> None:
        """Let the server forget an operation that is done."""
        request = operations_pb2.DeleteOperationRequest(name=self.name)
        self._calls._unary(self._calls._operations.DeleteOperation, request, timeout_s)
