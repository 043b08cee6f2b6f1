"""Making blocking calls: one answer, a stream of events, or a shared stream of many."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from inkwell import types
from inkwell.batch import IMAGE_BYTES_MOST, WINDOW, BatchBook, BatchItem, Outcome
from inkwell.channel import DEFAULT_TIMEOUT_S, call_metadata, named, open_channel, traced, wait_until_ready
from inkwell.converters import shared
from inkwell.credentials import AccessToken, authorized
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from inkwell.errors import TooLarge, error_from_rpc
from inkwell.files import load
from inkwell.gateway.v1 import gateway_pb2_grpc
from inkwell.longrunning import OperationsStub
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from inkwell.operations.v1 import operations_pb2_grpc

Event = TypeVar("Event")


class Calls:
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
        """Nothing is sent yet.

        target: "host:port" or any gRPC name, such as "dns:///inkwell:50050".
        hardware: ordered preference for the gateway, such as "cuda, cpu"; "cuda!" for only that.
        priority: "low", "normal" or "high".
        timeout_s: how long each call may take unless the call says otherwise; None for ever.
        wait_for_ready_s: how long a call waits for a connection, within its time; None fails at once while nobody
            answers.
        credentials: `grpc.ChannelCredentials` for TLS, such as `inkwell.tls(ca="ca.crt")`; None for plaintext.
        token: a JWT or an API key that says who calls, or what answers one before every call; with credentials only,
            but for a server on this machine.
        metadata: sent with every call.
        """
        self._target = target
        self._timeout_s = timeout_s
        self._wait_for_ready_s = wait_for_ready_s
        credentials, proof = authorized(target, credentials, token)
        self._metadata = (*call_metadata(hardware, priority, metadata), *proof)
        self._channel = open_channel(target, credentials)
        self._ocr = ocr_pb2_grpc.OcrServiceStub(self._channel)
        self._diffusion = diffusion_pb2_grpc.DiffusionServiceStub(self._channel)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self._operations = OperationsStub(self._channel)
        self._watch = operations_pb2_grpc.OperationsWatchServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def _prepare(self, timeout_s: float | None) -> float | None:
        """Wait for a connection if that was asked for; answers what is left of the call's time, in seconds."""
        if self._wait_for_ready_s is None:
            return timeout_s
        if timeout_s is None:
            wait_until_ready(self._channel, self._target, self._wait_for_ready_s)
            return None
        began = time.monotonic()
        wait_until_ready(self._channel, self._target, min(self._wait_for_ready_s, timeout_s))
        return max(0.0, timeout_s - (time.monotonic() - began))

    def _unary(
        self, method: Any, request: Any, timeout_s: float | None, request_id: str | None = None
    ) -> tuple[Any, types.ServedBy]:
        metadata = named(self._metadata, request_id)
        timeout = self._prepare(self._timeout_s if timeout_s is None else timeout_s)
        call = method.future(request, timeout=timeout, metadata=metadata)
        try:
            answer = call.result()
            return answer, shared.served_by(call.initial_metadata())
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
        request_id: str | None = None,
    ) -> Generator[Event, None, None]:
        metadata = named(self._metadata, request_id)
        timeout = self._prepare(self._timeout_s if timeout_s is None else timeout_s)
        call = method(request, timeout=timeout, metadata=metadata)
        event: Event | None = None
        served: types.ServedBy | None = None
        sequence = 0
        try:
            for response in call:
                sequence = shared.in_sequence(sequence, response)
                served = shared.also_told(served or shared.served_by(call.initial_metadata()), event)
                event = convert(response, served)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()  # for Ctrl-C, an early close and a failing caller; nothing once the call has ended
        if not isinstance(event, final):
            raise shared.no_result()

    def _batch(
        self, images: Iterator[BatchItem], book: BatchBook, timeout_s: float | None
    ) -> Generator[Outcome, None, None]:
        timeout = self._prepare(timeout_s)
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

        call = self._ocr.BatchRecognize(requests(), timeout=timeout, metadata=traced(self._metadata))
        calls.put(call)
        served: types.ServedBy | None = None
        try:
            for response in call:
                served = served or shared.served_by(call.initial_metadata())
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
        content = load(source, most=IMAGE_BYTES_MOST)
    except OSError as error:
        book.fail_unreadable(caller_id, error)
        return None
    except TooLarge as error:
        book.fail(caller_id, error)
        return None
    return book.request(caller_id, content)


def last(events: Generator[Event, None, None], on_event: Callable[[Event], object] | None) -> Event | None:
    """The last of `events`, all of which `on_event` sees."""
    latest: Event | None = None
    try:
        for latest in events:
            if on_event is not None:
                on_event(latest)
    finally:
        events.close()
    return latest
