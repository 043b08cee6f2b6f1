"""The blocking client."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from inkwell import converters, types
from inkwell.batch import WINDOW, BatchBook, BatchItem, Outcome
from inkwell.channel import DEFAULT_TIMEOUT_S, call_metadata, open_channel, wait_until_ready
from inkwell.converters import PaintOptions, ReadOptions, Service
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.errors import Unimplemented, error_from_rpc
from inkwell.gateway.v1 import gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc

Event = TypeVar("Event")


class Client:
    """Reads and paints through one server: a gateway, or a service itself.

    Threads may share a client. Close it, or use it in a `with` statement. Every call raises a subclass of
    `inkwell.InkwellError`; a picture given as a path raises OSError when it cannot be read.
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
        """Nothing is sent yet.

        target: "host:port" or any gRPC name, such as "dns:///inkwell:50050".
        hardware: ordered preference for the gateway, such as "cuda, cpu"; "cuda!" for only that.
        priority: "low", "normal" or "high".
        timeout_s: how long each call may take unless the call says otherwise; None for ever.
        wait_for_ready_s: how long a call waits for a connection; None fails at once while nobody answers.
        credentials: `grpc.ChannelCredentials` for TLS; None for plaintext.
        metadata: sent with every call.
        """
        self._target = target
        self._timeout_s = timeout_s
        self._wait_for_ready_s = wait_for_ready_s
        self._metadata = call_metadata(hardware, priority, metadata)
        self._channel = open_channel(target, credentials)
        self._ocr = ocr_pb2_grpc.OcrServiceStub(self._channel)
        self._diffusion = diffusion_pb2_grpc.DiffusionServiceStub(self._channel)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(
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
        """Read one line of handwriting; options left out take the model's defaults, which `models` shows.

        image: bytes of a PNG, JPEG, WebP, TIFF or BMP file, or its path.
        beam_width: rows searched at once, 1 (greedy) to 16; hypothesis_count: how many to return, 1 to beam_width.
        length_penalty: -5 to 5, above 0 favours longer text; beam search only.
        on_event: called with every event as it comes, the result last.
        """
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        content = converters.load_image(image)
        if on_event is None:
            request = converters.recognize_request(content, options)
            answer, served = self._unary(self._ocr.Recognize, request, timeout_s)
            return converters.reading(answer.recognition, served)
        result = _last(self._read_events(content, options, timeout_s), on_event)
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
    ) -> Generator[types.ReadEvent, None, None]:
        """The same as events: queued, started, partial text, the result last. Closing it cancels the call."""
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        return self._read_events(converters.load_image(image), options, timeout_s)

    def read_many(
        self,
        images: Iterable[BatchItem],
        *,
        model: str = "",
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[Outcome, None, None]:
        """Read many lines over one stream; yields (id, Reading) or (id, InkwellError), as they are ready.

        images: pictures, or (id, picture) pairs. The id of a picture without one is its path, or its position from 0
            if it came as bytes. `images` is iterated in another thread, only as far as answers are taken: at most 16
            pictures are under way. One that cannot be read fails alone.
        timeout_s: for the whole stream; None for ever.
        """
        options = ReadOptions(model, beam_width, hypothesis_count, length_penalty, max_new_token_count)
        return self._batch(iter(images), BatchBook(options), timeout_s)

    # --- painting --------------------------------------------------------------------------------------------------

    def paint(
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
        """Paint pictures; options left out take the model's defaults, which `models` shows.

        width, height: pixels, multiples of the model's size_multiple.
        seed: 0 to 2**32 - 1, random if left out; picture i has seed + i and is the same as if asked for alone.
        media_type: "image/png" (default), "image/jpeg" or "image/webp"; quality: 1 to 100, not for PNG.
        on_event: called with every event as it comes, the result last; `previews` adds a preview after every step.
        """
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        result = _last(self._paint_events(options, timeout_s), on_event)
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
    ) -> Generator[types.PaintEvent, None, None]:
        """The same as events: queued, started, progress, previews, the result last. Closing it cancels the call."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        return self._paint_events(options, timeout_s)

    # --- what there is ---------------------------------------------------------------------------------------------

    def models(self, service: Service | None = None, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models of one service, or of every service that the server offers."""
        if service == "ocr":
            answer, _ = self._unary(self._ocr.ListModels, ocr_pb2.ListModelsRequest(), timeout_s)
            return list(converters.ocr_models(answer))
        if service == "diffusion":
            answer, _ = self._unary(self._diffusion.ListModels, diffusion_pb2.ListModelsRequest(), timeout_s)
            return list(converters.diffusion_models(answer))
        try:
            readers = self.models("ocr", timeout_s=timeout_s)
        except Unimplemented:
            return self.models("diffusion", timeout_s=timeout_s)
        try:
            return readers + self.models("diffusion", timeout_s=timeout_s)
        except Unimplemented:
            return readers

    def schedulers(self, *, timeout_s: float | None = None) -> list[types.Scheduler]:
        """The schedulers that `paint` knows by name."""
        request = diffusion_pb2.ListSchedulersRequest()
        answer, _ = self._unary(self._diffusion.ListSchedulers, request, timeout_s)
        return converters.schedulers(answer)

    def fleet(self, *, service: str = "", hardware: str = "", timeout_s: float | None = None) -> list[types.Pool]:
        """The pools behind a gateway, with the state and load of their endpoints; empty strings for all."""
        request = converters.list_pools_request(service, hardware)
        answer, _ = self._unary(self._gateway.ListPools, request, timeout_s)
        return converters.pools(answer)

    # --- calls -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._wait_for_ready_s is not None:
            wait_until_ready(self._channel, self._target, self._wait_for_ready_s)

    def _unary(self, method: Any, request: Any, timeout_s: float | None) -> tuple[Any, types.ServedBy]:
        self._prepare()
        timeout = self._timeout_s if timeout_s is None else timeout_s
        call = method.future(request, timeout=timeout, metadata=self._metadata)
        try:
            answer = call.result()
            return answer, converters.served_by(call.initial_metadata())
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()  # for Ctrl-C; nothing once the call has ended

    def _stream(
        self,
        method: Any,
        request: Any,
        convert: Callable[[Any, types.ServedBy], Event | None],
        final: type[Any],
        timeout_s: float | None,
    ) -> Generator[Event, None, None]:
        self._prepare()
        timeout = self._timeout_s if timeout_s is None else timeout_s
        call = method(request, timeout=timeout, metadata=self._metadata)
        event: Event | None = None
        served: types.ServedBy | None = None
        try:
            for response in call:
                served = converters.also_told(served or converters.served_by(call.initial_metadata()), event)
                event = convert(response, served)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()  # for Ctrl-C, an early close and a failing caller; nothing once the call has ended
        if not isinstance(event, final):
            raise converters.no_result()

    def _read_events(
        self, content: bytes, options: ReadOptions, timeout_s: float | None
    ) -> Generator[types.ReadEvent, None, None]:
        request = converters.stream_recognize_request(content, options)
        method = self._ocr.StreamRecognize
        return self._stream(method, request, converters.read_event, types.ReadResult, timeout_s)

    def _paint_events(self, options: PaintOptions, timeout_s: float | None) -> Generator[types.PaintEvent, None, None]:
        request = converters.generate_request(options)
        method = self._diffusion.Generate
        return self._stream(method, request, converters.paint_event, types.PaintResult, timeout_s)

    def _batch(
        self, images: Iterator[BatchItem], book: BatchBook, timeout_s: float | None
    ) -> Generator[Outcome, None, None]:
        self._prepare()
        # Ctrl-C may strike the main thread inside any lock written in Python and leave it held; these queues have none.
        places: SimpleQueue[bool] = SimpleQueue()
        for _ in range(WINDOW):
            places.put(True)
        calls: SimpleQueue[Any] = SimpleQueue()
        closed = False

        def requests() -> Iterator[ocr_pb2.BatchRecognizeRequest]:
            try:
                while places.get() and not closed:
                    try:
                        item = next(images)
                    except StopIteration:
                        return
                    request = _batch_request(book, item)
                    if request is None:
                        places.put(True)
                    else:
                        yield request
            except Exception as error:  # noqa: BLE001 - whatever the caller's iterable raises is raised to the caller
                book.source_error = error
                calls.get().cancel()

        call = self._ocr.BatchRecognize(requests(), timeout=timeout_s, metadata=self._metadata)
        calls.put(call)
        served: types.ServedBy | None = None
        try:
            for response in call:
                served = served or converters.served_by(call.initial_metadata())
                yield from book.failures()
                outcome = book.outcome(response, served)
                if outcome is not None:
                    yield outcome
                    places.put(True)
            yield from book.failures()
            yield from book.unanswered()
        except grpc.RpcError as error:
            yield from book.failures()
            if book.source_error is not None:
                raise book.source_error from None
            raise error_from_rpc(error, self._target) from error
        finally:
            closed = True
            places.put(False)
            call.cancel()


def _batch_request(book: BatchBook, item: BatchItem) -> ocr_pb2.BatchRecognizeRequest | None:
    caller_id, source = book.identify(item)
    try:
        content = converters.load_image(source)
    except OSError as error:
        book.fail_unreadable(caller_id, error)
        return None
    return book.request(caller_id, content)


def _last(events: Generator[Event, None, None], on_event: Callable[[Event], object] | None) -> Event | None:
    last: Event | None = None
    try:
        for last in events:
            if on_event is not None:
                on_event(last)
    finally:
        events.close()
    return last
