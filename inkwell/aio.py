"""The client for asyncio: the same calls as `inkwell.Client`, to be awaited or iterated with `async for`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from inkwell import converters, types
from inkwell.aio_stream import messages
from inkwell.batch import WINDOW, BatchBook, BatchItem, Outcome
from inkwell.channel import DEFAULT_TIMEOUT_S, call_metadata, open_aio_channel, wait_until_ready_async
from inkwell.converters import PaintOptions, ReadOptions, Service
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.errors import Unimplemented, error_from_rpc
from inkwell.gateway.v1 import gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc

Event = TypeVar("Event")


class AsyncClient:
    """Reads and paints through one server, on one event loop.

    Arguments, results and errors are those of `inkwell.Client`. Cancelling the task that awaits a call, or closing
    (`aclose`) the iterator of one, cancels it at the server.
    """

    def __init__(
        self,
        target: str = "localhost:50050",
        *,
        hardware: str | None = None,
        priority: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        wait_for_ready_s: float | None = None,
        credentials: Any | None = None,
        metadata: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    ) -> None:
        """Nothing is opened yet; the first call binds the client to the running event loop."""
        self._target = target
        self._timeout_s = timeout_s
        self._wait_for_ready_s = wait_for_ready_s
        self._metadata = call_metadata(hardware, priority, metadata)
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

    # --- reading ---------------------------------------------------------------------------------------------------

    async def read(
        self,
        image: types.ImageSource,
        *,
        model: str = "",
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        timeout_s: float | None = None,
        on_event: Callable[[types.ReadEvent], object] | None = None,
    ) -> types.Reading:
        """Read one line of handwriting; see `Client.read`."""
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        if on_event is None:
            request = converters.recognize_request(await _load(image), options)
            stub = ocr_pb2_grpc.OcrServiceStub(self._channel())
            answer, served = await self._unary(stub.Recognize, request, timeout_s)
            return converters.reading(answer.recognition, served)
        result = await _last(self._read_events(image, options, timeout_s), on_event)
        assert isinstance(result, types.ReadResult)
        return result.reading

    def read_stream(
        self,
        image: types.ImageSource,
        *,
        model: str = "",
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[types.ReadEvent, None]:
        """The same as events, the result last; see `Client.read_stream`."""
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        return self._read_events(image, options, timeout_s)

    def read_many(
        self,
        images: Iterable[BatchItem] | AsyncIterable[BatchItem],
        *,
        model: str = "",
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Read many lines over one stream, yielding as they are ready; see `Client.read_many`."""
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        return self._batch(images, BatchBook(options), timeout_s)

    # --- painting --------------------------------------------------------------------------------------------------

    async def paint(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str = "",
        seed: int | None = None,
        image_count: int | None = None,
        media_type: str = "",
        quality: int | None = None,
        previews: bool = False,
        timeout_s: float | None = None,
        on_event: Callable[[types.PaintEvent], object] | None = None,
    ) -> list[types.Picture]:
        """Paint pictures; see `Client.paint`."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        result = await _last(self._paint_events(options, timeout_s), on_event)
        assert isinstance(result, types.PaintResult)
        return list(result.pictures)

    def paint_stream(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str = "",
        seed: int | None = None,
        image_count: int | None = None,
        media_type: str = "",
        quality: int | None = None,
        previews: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[types.PaintEvent, None]:
        """The same as events, the result last; see `Client.paint_stream`."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        return self._paint_events(options, timeout_s)

    # --- what there is ---------------------------------------------------------------------------------------------

    async def models(self, service: Service | None = None, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models of one service, or of every service that the server offers."""
        if service == "ocr":
            readers = ocr_pb2_grpc.OcrServiceStub(self._channel())
            answer, _ = await self._unary(readers.ListModels, ocr_pb2.ListModelsRequest(), timeout_s)
            return list(converters.ocr_models(answer))
        if service == "diffusion":
            painters = diffusion_pb2_grpc.DiffusionServiceStub(self._channel())
            answer, _ = await self._unary(painters.ListModels, diffusion_pb2.ListModelsRequest(), timeout_s)
            return list(converters.diffusion_models(answer))
        try:
            found = await self.models("ocr", timeout_s=timeout_s)
        except Unimplemented:
            return await self.models("diffusion", timeout_s=timeout_s)
        try:
            return found + await self.models("diffusion", timeout_s=timeout_s)
        except Unimplemented:
            return found

    async def schedulers(self, *, timeout_s: float | None = None) -> list[types.Scheduler]:
        """The schedulers that `paint` knows by name."""
        stub = diffusion_pb2_grpc.DiffusionServiceStub(self._channel())
        request = diffusion_pb2.ListSchedulersRequest()
        answer, _ = await self._unary(stub.ListSchedulers, request, timeout_s)
        return converters.schedulers(answer)

    async def fleet(self, *, service: str = "", hardware: str = "", timeout_s: float | None = None) -> list[types.Pool]:
        """The pools behind a gateway, with the state and load of their endpoints; empty strings for all."""
        stub = gateway_pb2_grpc.GatewayServiceStub(self._channel())
        request = converters.list_pools_request(service, hardware)
        answer, _ = await self._unary(stub.ListPools, request, timeout_s)
        return converters.pools(answer)

    # --- calls -----------------------------------------------------------------------------------------------------

    def _channel(self) -> Any:
        # Opened here and not in the constructor: a grpc.aio channel belongs to the event loop it is made on.
        if self._closed:
            raise ValueError("the client is closed")
        if self._opened is None:
            self._opened = open_aio_channel(self._target, self._credentials)
        return self._opened

    async def _prepare(self) -> None:
        if self._wait_for_ready_s is not None:
            await wait_until_ready_async(self._channel(), self._target, self._wait_for_ready_s)

    async def _unary(self, method: Any, request: Any, timeout_s: float | None) -> tuple[Any, types.ServedBy]:
        await self._prepare()
        timeout = self._timeout_s if timeout_s is None else timeout_s
        try:
            call = method(request, timeout=timeout, metadata=self._metadata)
            answer = await call
            return answer, converters.served_by(await call.initial_metadata())
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error

    async def _stream(
        self,
        method: Any,
        request: Any,
        convert: Callable[[Any, types.ServedBy], Event | None],
        final: type[Any],
        timeout_s: float | None,
    ) -> AsyncGenerator[Event, None]:
        await self._prepare()
        timeout = self._timeout_s if timeout_s is None else timeout_s
        call = method(request, timeout=timeout, metadata=self._metadata)
        event: Event | None = None
        served: types.ServedBy | None = None
        try:
            async for response in call:
                served = converters.also_told(served or converters.served_by(await call.initial_metadata()), event)
                event = convert(response, served)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()  # for an early close and a failing caller; nothing once the call has ended
        if not isinstance(event, final):
            raise converters.no_result()

    async def _read_events(
        self, image: types.ImageSource, options: ReadOptions, timeout_s: float | None
    ) -> AsyncGenerator[types.ReadEvent, None]:
        request = converters.stream_recognize_request(await _load(image), options)
        method = ocr_pb2_grpc.OcrServiceStub(self._channel()).StreamRecognize
        events: AsyncGenerator[types.ReadEvent, None] = self._stream(
            method, request, converters.read_event, types.ReadResult, timeout_s
        )
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    def _paint_events(self, options: PaintOptions, timeout_s: float | None) -> AsyncGenerator[types.PaintEvent, None]:
        request = converters.generate_request(options)
        method = diffusion_pb2_grpc.DiffusionServiceStub(self._channel()).Generate
        return self._stream(method, request, converters.paint_event, types.PaintResult, timeout_s)

    async def _batch(
        self, images: Iterable[BatchItem] | AsyncIterable[BatchItem], book: BatchBook, timeout_s: float | None
    ) -> AsyncGenerator[Outcome, None]:
        await self._prepare()
        places = asyncio.Semaphore(WINDOW)
        call = ocr_pb2_grpc.OcrServiceStub(self._channel()).BatchRecognize(timeout=timeout_s, metadata=self._metadata)

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
                served = served or converters.served_by(await call.initial_metadata())
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


async def _load(source: types.ImageSource) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    return await asyncio.to_thread(converters.load_image, source)


async def _batch_request(book: BatchBook, item: BatchItem) -> ocr_pb2.BatchRecognizeRequest | None:
    caller_id, source = book.identify(item)
    try:
        content = await _load(source)
    except OSError as error:
        book.fail_unreadable(caller_id, error)
        return None
    return book.request(caller_id, content)


async def _iterate(images: Iterable[BatchItem] | AsyncIterable[BatchItem]) -> AsyncIterator[BatchItem]:
    if isinstance(images, AsyncIterable):
        async for item in images:
            yield item
    else:
        for item in images:
            yield item


async def _last(events: AsyncGenerator[Event, None], on_event: Callable[[Event], object] | None) -> Event | None:
    last: Event | None = None
    try:
        async for last in events:
            if on_event is not None:
                on_event(last)
    finally:
        await events.aclose()
    return last
