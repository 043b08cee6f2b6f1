"""An operation, as the client for asyncio holds it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
from google.longrunning import operations_pb2

from inkwell import types
from inkwell.converters import operation
from inkwell.errors import InkwellError, Unavailable, error_from_rpc
from inkwell.longrunning import Following

if TYPE_CHECKING:
    from inkwell.aio_calls import AsyncCalls

Result = TypeVar("Result")


class AsyncOperation(Generic[Result]):
    """Work that goes on at the server without this program; see `inkwell.Operation`."""

    def __init__(self, calls: "AsyncCalls", message: operations_pb2.Operation) -> None:
        self._calls = calls
        self._message = message

    def __repr__(self) -> str:
        return f"<AsyncOperation {self.name} {'done' if self.done else 'under way'}>"

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

    async def refresh(self, *, timeout_s: float | None = None) -> "AsyncOperation[Result]":
        """Look again; answers itself."""
        request = operations_pb2.GetOperationRequest(name=self.name)
        self._message, _ = await self._calls._unary(self._calls._operations().GetOperation, request, timeout_s)
        return self

    async def result(
        self,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[types.OperationEvent], object] | None = None,
    ) -> Result:
        """Wait until it is done; see `Operation.result`. Cancelling the task that waits does not end the operation."""
        if not self.done or on_event is not None:
            async for event in self.events(timeout_s=timeout_s):
                if on_event is not None:
                    on_event(event)
        result, error = operation.outcome(self._message)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    async def events(
        self, after_sequence: int = 0, *, timeout_s: float | None = None
    ) -> AsyncGenerator[types.OperationEvent, None]:
        """Everything it has said after that sequence and says as it goes on; see `Operation.events`."""
        calls = self._calls
        following = Following(self.name, after_sequence, timeout_s=timeout_s)
        while True:
            was_done = self.done
            stream: Any = None
            try:
                timeout = await calls._prepare(following.left_s())
                stream = calls._watch().Watch(following.request(), timeout=timeout, metadata=calls._metadata)
                async for response in stream:
                    event = following.take(response)
                    if response.HasField("done"):
                        self._message = response.done
                    if event is not None:
                        yield event
                if was_done or self.done:
                    return
                # It was done before, with nothing left to say, or else something on the way ended the stream.
                await self.refresh(timeout_s=timeout)
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
            await asyncio.sleep(following.delay_s(failure))

    async def cancel(self, *, timeout_s: float | None = None) -> None:
        """End it, if it is not done; it then raises Cancelled."""
        request = operations_pb2.CancelOperationRequest(name=self.name)
        await self._calls._unary(self._calls._operations().CancelOperation, request, timeout_s)
        await self.refresh(timeout_s=timeout_s)

    async def delete(self, *, timeout_s: float | None = None) -> None:
        """Let the server forget an operation that is done."""
        request = operations_pb2.DeleteOperationRequest(name=self.name)
        await self._calls._unary(self._calls._operations().DeleteOperation, request, timeout_s)
