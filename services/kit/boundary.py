"""The interceptor around every handler: faults become statuses, calls are counted, logged and waited for.

All four arities go through here. Handlers never see a message that is too large or does not parse: the deserializer
hands the boundary a marker instead, so that the caller gets a precise status and not gRPC's INTERNAL.
"""

import asyncio
import contextlib
import inspect
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from services.kit import errors, faults, orca, reply, tracing
from services.kit.admission import Admission
from services.kit.call import CallLabels, current_labels
from services.kit.faults import Fault
from services.kit.identity import current_caller
from services.kit.metrics import Metrics
from services.kit.tracing import Span, Tracing

log = structlog.get_logger(__name__)

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Infrastructure calls: answered while draining, neither counted nor logged.
_UNCOUNTED = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.", "/inkwell.endpoint.", f"/{orca.SERVICE}/")


# What load balancers and probes ask, who show no credentials.
_FOR_ALL = "/grpc.health."

# Finds out who makes a call, by its path and context, and sets `identity.current_caller`; raises Fault to refuse it.
Guard = Callable[[str, grpc.aio.ServicerContext], Awaitable[None]]


# A caller that is refused while it sends a stream of requests: the refusal waits for it to be silent for so long …
_PAUSE_S = 0.1
# … and not longer than this.
_HEARD_OUT_WITHIN_S = 1.0

# Within so many seconds a handler is cancelled whose caller has left.
_CANCELLED_WITHIN_S = 1.0
_HANDLERS_MOST = 256  # kept wrapped; callers make paths up


@dataclass(frozen=True)
class _BadMessage:
    """Stands in for a request message that could not be taken in."""

    fault: Fault


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps the handlers of one server and knows what is under way in them.

    admission: the queue whose load every call's trailers report.
    """

    def __init__(self, metrics: Metrics, *, max_message_bytes: int, admission: Admission | None = None) -> None:
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes
        self._admission = admission
        self._admitted = _Calls()
        self._refused = _Calls()  # because they came while the server drains
        self.draining = False
        self.stopping = False  # the server ends what is under way
        # By method, what was wrapped and the wrapped: every call of a method brings the same handler, as a rule.
        self._handlers: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}
        self.guard: Guard | None = None
        self.tracing: Tracing | None = None

    async def wait_idle(self) -> None:
        """Return when every handler has ended, its `finally` blocks included.

        Not waited for are calls that the drain refuses: callers that come again at once would never let it end.
        """
        await self._admitted.none.wait()

    async def wait_refused(self) -> None:
        """Return when every call that the drain refuses has been told so."""
        await self._refused.none.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            return handler
        if method.startswith(_UNCOUNTED):
            if self.guard is None or method.startswith(_FOR_ALL):
                return handler
            return self._admitting(handler, method, self.guard)
        known = self._handlers.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = self._wrapped(handler, method)
        if known is not None or len(self._handlers) < _HANDLERS_MOST:
            self._handlers[method] = (handler, wrapped)
        return wrapped

    def _admitting(self, handler: grpc.RpcMethodHandler, method: str, guard: Guard) -> grpc.RpcMethodHandler:
        """Infrastructure with the guard before it, and otherwise as it is."""
        behaviour = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary

        async def admit(context: grpc.aio.ServicerContext) -> None:
            try:
                await guard(method, context)
            except Fault as fault:
                log.warning("refused", method=method, reason=fault.data.reason, peer=context.peer())
                await errors.abort(context, fault)

        async def to_one(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await admit(context)
            answer = behaviour(request, context)  # channelz answers without a coroutine
            return await answer if inspect.isawaitable(answer) else answer

        async def to_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await admit(context)
            async with contextlib.aclosing(behaviour(request, context)) as produced:
                async for message in produced:
                    yield message

        return handler._replace(
            unary_unary=to_one if handler.unary_unary else None,
            unary_stream=to_stream if handler.unary_stream else None,
            stream_unary=to_one if handler.stream_unary else None,
            stream_stream=to_stream if handler.stream_stream else None,
        )

    def _wrapped(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        deserializer = self._guarded(handler.request_deserializer)
        unary = handler.stream_unary if handler.request_streaming else handler.unary_unary
        serialize = handler.response_serializer

        async def to_one(request: Any, context: grpc.aio.ServicerContext) -> Any:
            requests = _Requests(request) if handler.request_streaming else None
            async with self._call(method, context, requests) as labels:
                answer = await unary(_checked(request) if requests is None else requests.checked(), context)
                self._report_load(context)
                header = labels.served if labels.header is None else labels.header
                if not header or labels.header_sent:
                    return answer
                if self.stopping or context.code() is not None:
                    await context.send_initial_metadata(header)
                    return answer
                try:
                    await reply.send(context, header, answer if serialize is None else serialize(answer))
                except grpc.aio.InternalError:
                    # The caller is gone, and grpc.aio is about to cancel this handler for it.
                    await asyncio.sleep(_CANCELLED_WITHIN_S)
                    raise
            raise asyncio.CancelledError  # nothing is left to send

        async def to_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            requests = _Requests(request) if handler.request_streaming else None
            async with self._call(method, context, requests):
                behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                produced = behaviour(_checked(request) if requests is None else requests.checked(), context)
                if hasattr(produced, "__aiter__"):
                    # Closing it here runs the handler's `finally` blocks before the call counts as over.
                    async with contextlib.aclosing(produced):
                        async for message in produced:
                            yield message
                else:
                    await produced  # a handler that writes through the context
                self._report_load(context)

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(to_stream if handler.response_streaming else to_one, deserializer, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(
        self, method: str, context: grpc.aio.ServicerContext, requests: "_Requests | None"
    ) -> AsyncIterator[CallLabels]:
        began = time.monotonic()
        # Asked now: a stream that its caller left may be closed after grpc has freed the call, and the context's
        # methods then read freed memory (a segmentation fault of grpcio 1.85 was traced to `peer`).
        peer = context.peer()
        left = context.time_remaining()
        received = tuple(context.invocation_metadata() or ())
        metadata = dict(received)
        request_id: Any = metadata.get(REQUEST_ID_KEY)
        if not (isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id)):
            request_id = f"{random.getrandbits(128):032x}"  # as of a uuid4, at a tenth of the cost
        labels = CallLabels(request_id=request_id, received=received)
        current_labels.set(labels)
        span: Span | None = None
        if self.tracing is not None:
            span = self.tracing.call(method, metadata)
            span.set({"inkwell.request_id": request_id})
            structlog.contextvars.bind_contextvars(request_id=request_id, trace_id=span.trace_id)
        elif trace_id := tracing.trace_id_of(metadata):
            structlog.contextvars.bind_contextvars(request_id=request_id, trace_id=trace_id)
        else:
            structlog.contextvars.bind_contextvars(request_id=request_id)
        code = "OK"
        calls = self._refused if self.draining else self._admitted
        calls.begin()
        self._metrics.in_flight.inc()
        try:
            if self.draining:
                raise faults.unavailable("DRAINING", "this server is shutting down; call another", retry_after_ms=100)
            if self.guard is not None:
                await self.guard(method, context)
            yield labels
        except (asyncio.CancelledError, GeneratorExit):
            # GeneratorExit: the caller left while a message was being written, and the stream's generator is closed.
            late = left is not None and time.monotonic() - began >= left
            code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
            raise
        except Fault as fault:
            code = errors.CODES[fault.data.kind].name
            if requests is not None:
                await requests.hear_out()
            await errors.abort(context, fault, self._load())
        except grpc.aio.AbortError:
            code = _code_name(context.code())
            raise
        except Exception:
            code = "INTERNAL"
            log.exception("call failed", method=method)
            await errors.abort(
                context, faults.internal(f"a defect of the service; its log has request id {request_id}")
            )
        finally:
            seconds = time.monotonic() - began
            counted_as = labels.method or method
            self._metrics.in_flight.dec()
            self._metrics.ended(
                counted_as,
                code,
                model=labels.model,
                hardware=labels.hardware,
                seconds=seconds,
                tenant=current_caller.get(),
                trace_id=tracing.current_trace_id(),
            )
            log.info(
                "call",
                method=method,
                code=code,
                ms=round(seconds * 1000, 1),
                model=labels.model or None,
                peer=peer,
                caller=current_caller.get() or None,
            )
            if span is not None:
                span.set({"inkwell.model": labels.model, "inkwell.hardware": labels.hardware})
                span.end_call(code, name=labels.method.removeprefix("/"))
            calls.end()

    def _report_load(self, context: grpc.aio.ServicerContext) -> None:
        if self._admission is not None:  # without a report, what the handler set stays as it is
            context.set_trailing_metadata((*(context.trailing_metadata() or ()), *self._load()))

    def _load(self) -> tuple[tuple[str, bytes], ...]:
        return () if self._admission is None else orca.trailers(self._admission)

    def _guarded(self, deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        limit = self._max_message_bytes

        def deserialize(data: bytes) -> Any:
            if len(data) > limit:
                return _BadMessage(
                    faults.too_large(
                        "message",
                        "MESSAGE_TOO_LARGE",
                        f"{len(data)} bytes are more than the limit of {limit}",
                        size_bytes=len(data),
                        limit_bytes=limit,
                    )
                )
            if deserializer is None:
                return data
            try:
                return deserializer(data)
            except DecodeError:
                return _BadMessage(
                    faults.invalid_field("message", "it is not a valid protobuf message of this method's request type")
                )

        return deserialize


def _checked(request: Any) -> Any:
    if isinstance(request, _BadMessage):
        raise request.fault
    return request


class _Calls:
    """How many calls of one kind there are."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def begin(self) -> None:
        self._count += 1
        self.none.clear()

    def end(self) -> None:
        self._count -= 1
        if self._count == 0:
            self.none.set()


class _Requests:
    """A caller's stream of requests, as grpc.aio gives it."""

    def __init__(self, received: AsyncIterator[Any]) -> None:
        self._received = received
        self._reading = False  # stays so when a read is cancelled: what grpc.aio gave is spent then

    async def checked(self) -> AsyncIterator[Any]:
        """Each request; raises the Fault of one that could not be taken in."""
        while (request := await self._read()) is not None:
            yield _checked(request)

    async def hear_out(self) -> None:
        """Drop what the caller still says until it is done or pauses, unless somebody else listens.

        A call that ends while its caller writes ends INTERNAL, "Internal error from Core", in a caller that uses
        grpc.aio: there the write that failed overwrites the status that was received. So a refusal waits for that.
        """
        if self._reading:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARD_OUT_WITHIN_S):
                heard: Any = True
                while heard is not None:
                    async with asyncio.timeout(_PAUSE_S):
                        heard = await self._read()

    async def _read(self) -> Any:
        self._reading = True
        request = await anext(self._received, None)
        self._reading = False
        return request


def _code_name(code: Any) -> str:
    # grpc.aio answers the integer or the enum, depending on who set it.
    if isinstance(code, grpc.StatusCode):
        return str(code.name)
    return next((str(c.name) for c in grpc.StatusCode if c.value[0] == code), "UNKNOWN")
