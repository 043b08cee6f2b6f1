"""Making calls on an event loop: one answer, a stream of events, or a shared stream of many."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from inkwell import types
from inkwell.aio_stream import messages
from inkwell.batch import IMAGE_BYTES_MOST, WINDOW, BatchBook, BatchItem, Outcome
from inkwell.channel import DEFAULT_TIMEOUT_S, call_metadata, named, open_aio_channel, traced, wait_until_ready_async
from inkwell.converters import shared
from inkwell.credentials import AccessToken, authorized
from inkwell.errors import TooLarge, error_from_rpc
from inkwell.files import load
from inkwell.longrunning import OperationsStub
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from inkwell.operations.v1 import operations_pb2_grpc

Event = TypeVar("Event")


class AsyncCalls:
    """A connection, and the ways to call over it."""

    def __init__(
        self,
        target: str = "localhost:50050",
        *,
        hardware: str | None = None,
        priority: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        wait_for_ready_s: float | None = None,
        credentials: Any | None = None,
        token: AccessToken | None = None,
        metadata: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    ) -> None:
        """Nothing is opened yet; the first call binds the client to the running event loop."""
        self._target = target
        self._timeout_s = timeout_s
        self._wait_for_ready_s = wait_for_ready_s
        credentials, proof = authorized(target, credentials, token)
        self._metadata = (*call_metadata(hardware, priority, metadata), *proof)
        self._credentials = credentials
        self._opened: Any | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close()

    def _channel(self) -> Any:
        # Opened here and not in the constructor: a grpc.aio channel belongs to the event loop it is made on.
        if self._closed:
            raise ValueError("the client is closed")
        if self._opened is None:
            self._opened = open_aio_channel(self._target, self._credentials)
        return self._opened

    def _operations(self) -> OperationsStub:
        return OperationsStub(self._channel())

    def _watch(self) -> operations_pb2_grpc.OperationsWatchServiceStub:
        return operations_pb2_grpc.OperationsWatchServiceStub(self._channel())

    async def _prepare(self, timeout_s: float | None) -> float | None:
        """Wait for a connection if that was asked for; answers what is left of the call's time, in seconds."""
        if self._wait_for_ready_s is None:
            return timeout_s
        if timeout_s is None:
            await wait_until_ready_async(self._channel(), self._target, self._wait_for_ready_s)
            return None
        began = time.monotonic()
        await wait_until_ready_async(self._channel(), self._target, min(self._wait_for_ready_s, timeout_s))
        return max(0.0, timeout_s - (time.monotonic() - began))

    async def _unary(
        self, method: Any, request: Any, timeout_s: float | None, request_id: str | None = None
    ) -> tuple[Any, types.ServedBy]:
        metadata = named(self._metadata, request_id)
        timeout = await self._prepare(self._timeout_s if timeout_s is None else timeout_s)
        try:
            call = method(request, timeout=timeout, metadata=metadata)
            answer = await call
            return answer, shared.served_by(await call.initial_metadata())
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error

    async def _stream(
        self,
        method: Any,
        request: Any,
        convert: Callable[[Any, types.ServedBy], Event | None],
        final: type[Any],
        timeout_s: float | None,
        request_id: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        metadata = named(self._metadata, request_id)
        timeout = await self._prepare(self._timeout_s if timeout_s is None else timeout_s)
        call = method(request, timeout=timeout, metadata=metadata)
        event: Event | None = None
        served: types.ServedBy | None = None
        sequence = 0
        try:
            async for response in call:
                sequence = shared.in_sequence(sequence, response)
                served = shared.also_told(served or shared.served_by(await call.initial_metadata()), event)
                event = convert(response, served)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()  # for an early close and a failing caller; nothing once the call has ended
        if not isinstance(event, final):
            raise shared.no_result()

    async def _later(
        self, request: Callable[[], Awaitable[Any]], start: Callable[[Any], AsyncGenerator[Event, None]]
    ) -> AsyncGenerator[Event, None]:
        # A stream whose request has to be awaited first, because a file has to be read.
        events = start(await request())
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def _batch(
        self, images: Iterable[BatchItem] | AsyncIterable[BatchItem], book: BatchBook, timeout_s: float | None
    ) -> AsyncGenerator[Outcome, None]:
        timeout = await self._prepare(timeout_s)
        places = asyncio.Semaphore(WINDOW)
        stub = ocr_pb2_grpc.OcrServiceStub(self._channel())
        call = stub.BatchRecognize(timeout=timeout, metadata=traced(self._metadata))

        async def send() -> None:
            source = _iterate(images)
            try:
                while True:
                    await places.acquire()
                    try:
                        item = await anext(source)
                    except StopAsyncIteration:
                        break
                    request = await _batch_request(book, item)
                    if request is None:
                        places.release()
                    else:
                        await call.write(request)
                await call.done_writing()
            except Exception as error:  # noqa: BLE001 - raised to the caller, below
                # Once the call is done, a failing write says nothing that the call's own status does not say better.
                if not call.done():
                    book.source_error = error
                    call.cancel()

        sender = asyncio.create_task(send())
        served: types.ServedBy | None = None
        try:
            async for response in messages(call):
                served = served or shared.served_by(await call.initial_metadata())
                for failure in book.failures():
                    yield failure
                outcome = book.outcome(response, served)
                if outcome is not None:
                    yield outcome
                    places.release()
            for outcome in (*book.failures(), *book.unanswered()):
                yield outcome
        except grpc.RpcError as error:
            for failure in book.failures():
                yield failure
            raise error_from_rpc(error, self._target) from error
        except asyncio.CancelledError:
            # A call that this program cancels ends so, too; told apart from the cancelling of our own task.
            if book.source_error is None:
                raise
            for failure in book.failures():
                yield failure
            raise book.source_error from None
        finally:
            call.cancel()
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def load_async(source: types.ImageSource, *, field: str = "image.content", most: int) -> bytes:
    """`inkwell.files.load` without blocking the event loop."""
    if isinstance(source, bytes | bytearray | memoryview):
        return load(source, field=field, most=most)
    return await asyncio.to_thread(load, source, field=field, most=most)


async def _batch_request(book: BatchBook, item: BatchItem) -> ocr_pb2.BatchRecognizeRequest | None:
    caller_id, source = book.identify(item)
    try:
        content = await load_async(source, most=IMAGE_BYTES_MOST)
    except OSError as error:
        book.fail_unreadable(caller_id, error)
        return None
    except TooLarge as error:
        book.fail(caller_id, error)
        return None
    return book.request(caller_id, content)


async def _iterate(images: Iterable[BatchItem] | AsyncIterable[BatchItem]) -> AsyncIterator[BatchItem]:
    if isinstance(images, AsyncIterable):
        async for item in images:
            yield item
    else:
        for item in images:
            yield item


async def last(events: AsyncGenerator[Event, None], on_event: Callable[[Event], object] | None) -> Event | None:
    """The last of `events`, all of which `on_event` sees."""
    latest: Event | None = None
    try:
        async for latest in events:
            if on_event is not None:
                on_event(latest)
    finally:
        await events.aclose()
    return latest
