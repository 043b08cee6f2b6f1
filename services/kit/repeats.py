"""A repeated call is the same call: attempts with one id share one run of the handler, and its answer.

A caller that names its call by metadata `inkwell-request-id` (a UUID) may send it again without fear: after a
connection broke, through another gateway, or because a retry policy did so. An attempt that arrives while the call is
under way joins it and sees all of its messages from the first on; one that arrives later gets the answer that was
kept. The same id of the same caller with another request is an error. Failures are not kept: an attempt after one runs
anew.

When nobody listens to a call any more it is cancelled at once, as a call without an id is; an attempt that comes after
that runs anew too. What the shelf has no room for is not found again: correct, but computed again.
"""

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from prometheus_client import Counter, Gauge

from services.kit import faults
from services.kit.call import CallLabels, current_labels
from services.kit.identity import current_caller
from services.kit.metrics import Metrics
from services.kit.settings import MIB, RepeatSettings
from services.kit.shelf import Entry, Shelf

REQUEST_ID_KEY = "inkwell-request-id"

_FIELD = f"metadata {REQUEST_ID_KEY}"
# Hashing takes about a millisecond a MiB; longer requests are hashed beside the event loop.
_HASHED_ON_LOOP_BYTES = 1 * MIB


@dataclass(eq=False)
class _Listener:
    """One attempt, and how many messages it has taken."""

    taken: int = 0
    header_sent: bool = False


class _Context:
    """What a handler sees in place of its gRPC context: the first attempt's, but heard by all.

    Only what handlers of calls that may be repeated use; anything else is an AttributeError.
    """

    def __init__(self, first: grpc.aio.ServicerContext, call: "_SharedCall") -> None:
        # Copied, for grpc frees the context with the first attempt, and the call may outlive that.
        self._metadata = tuple(first.invocation_metadata() or ())
        left = first.time_remaining()
        self._deadline = None if left is None else time.monotonic() + left
        self._peer = str(first.peer())
        self._call = call

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def peer(self) -> str:
        return self._peer

    async def send_initial_metadata(self, metadata: Any) -> None:
        self._call.header = tuple(metadata)
        self._call.tell()

    def set_trailing_metadata(self, metadata: Any) -> None:
        self._call.trailers = tuple(metadata)


class _SharedCall:
    """One run of a handler, in a task of its own, and everything it said."""

    def __init__(self, shelf: Shelf["_SharedCall"], *, unary: bool) -> None:
        self._shelf = shelf
        self._messages: list[Any] = []
        self._dropped = 0  # messages that no listener needs any more, of a call that is not kept
        # Messages that some listener asked for. One reply is not waited for a second one.
        self._wanted = 2 if unary else 1
        self._asked = asyncio.Event()
        self._news = asyncio.Event()
        self._listeners: set[_Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self.entry: Entry[_SharedCall]
        self.labels = CallLabels()  # of the run; every attempt copies them
        self.header: tuple[Any, ...] | None = None
        self.trailers: tuple[Any, ...] = ()
        self.ended = False

    def start(self, entry: Entry["_SharedCall"], produced: Callable[[], AsyncGenerator[Any, None]]) -> None:
        """Run the handler, with the present context variables but labels of its own."""
        self.entry = entry
        self._task = asyncio.create_task(self._run(produced), name="shared call")

    def tell(self) -> None:
        """Wake every listener."""
        self._news.set()
        self._news = asyncio.Event()

    async def messages(self, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
        """Everything from the first message on, for one more attempt; raises what the handler raised."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            while True:
                if self.header is not None and not listener.header_sent:
                    listener.header_sent = True
                    self._share_labels(header_sent=True)
                    await context.send_initial_metadata(self.header)
                if listener.taken < self._dropped + len(self._messages):
                    message = self._messages[listener.taken - self._dropped]
                    listener.taken += 1
                    self._wanted = max(self._wanted, listener.taken + 1)
                    self._asked.set()
                    self._trim()
                    yield message
                elif self.ended:
                    break
                else:
                    await self._news.wait()
            if self._error is not None:
                raise self._error
            if self.trailers:
                context.set_trailing_metadata(self.trailers)
        finally:
            self._share_labels(header_sent=listener.header_sent)
            await self._leave(listener)

    async def _run(self, produced: Callable[[], AsyncGenerator[Any, None]]) -> None:
        current_labels.set(self.labels)
        try:
            # The handler is asked for a message when the foremost listener takes the one before it, so that a caller
            # that reads slowly slows it down as it would alone; and not later, when that one was sent: the call has
            # ended well by the time that its last message is lost on the way.
            async with contextlib.aclosing(produced()) as source:
                async for message in source:
                    self._messages.append(message)
                    self._shelf.grow(self.entry, message.ByteSize())
                    self.tell()
                    while self._wanted <= self._dropped + len(self._messages):
                        self._asked.clear()
                        await self._asked.wait()
            self._shelf.end(self.entry)
        except asyncio.CancelledError:
            # By `_leave`, and nobody listens; else by the handler itself.
            self._error = faults.internal("the call was cancelled, and not by its caller")
            self._shelf.remove(self.entry)
            raise
        except Exception as error:  # noqa: BLE001 - raised to every listener, and the boundary answers for it
            self._error = error
            self._shelf.remove(self.entry)
        finally:
            self.ended = True
            self.tell()

    def _trim(self) -> None:
        if self.entry.kept or self.ended:
            return
        needed = min(listener.taken for listener in self._listeners)
        del self._messages[: needed - self._dropped]
        self._dropped = max(self._dropped, needed)

    def _share_labels(self, *, header_sent: bool) -> None:
        mine = current_labels.get(None)
        if mine is not None:
            mine.model, mine.hardware, mine.served = self.labels.model, self.labels.hardware, self.labels.served
            mine.header_sent = header_sent

    async def _leave(self, listener: _Listener) -> None:
        self._listeners.discard(listener)
        if self._listeners:
            return
        self._error = None  # its traceback leads back here: a circle that would hold the request for a while
        if self._task is None or self._task.done():
            return
        if not self.ended:
            # Before anything is awaited: nobody may join what is about to end.
            self._shelf.remove(self.entry)
            self._task.cancel()
        # The attempt is not over before the handler's `finally` blocks are.
        await asyncio.wait([self._task])


class Repeats(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands right before the handlers, behind the boundary, which makes statuses of the faults that it raises.

    methods: paths of the methods that may be repeated. Their requests are one message; what they answer depends on
    nothing else of the call; they raise Fault instead of using their context's `abort`.
    """

    def __init__(self, methods: Collection[str], settings: RepeatSettings, metrics: Metrics) -> None:
        self._methods = frozenset(methods)
        self.shelf: Shelf[_SharedCall] = Shelf(
            count_limit=settings.repeat_count_limit,
            bytes_limit=settings.repeat_bytes_limit,
            keep_s=settings.repeat_keep_s,
            clock=time.monotonic,
        )
        self._repeated = Counter(
            "inkwell_repeated",
            "Attempts at a call with an id that was known: joined (under way), answered (kept) or refused (another"
            " request).",
            ["outcome"],
            registry=metrics.registry,
        )
        kept = Gauge("inkwell_repeated_calls", "Calls with an id that are kept in mind.", registry=metrics.registry)
        kept.set_function(lambda: len(self.shelf))
        held = Gauge("inkwell_repeated_bytes", "Bytes of their answers that are kept.", registry=metrics.registry)
        held.set_function(lambda: self.shelf.bytes_held)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method not in self._methods:
            return handler
        ids = [value for key, value in handler_call_details.invocation_metadata or () if key == REQUEST_ID_KEY]
        return self._wrapped(handler, method, ids) if ids else handler

    def _wrapped(self, handler: grpc.RpcMethodHandler, method: str, ids: list[Any]) -> grpc.RpcMethodHandler:
        async def once(request: Message, context: Any) -> AsyncGenerator[Any, None]:
            yield await handler.unary_unary(request, context)

        behaviour = handler.unary_stream if handler.response_streaming else once

        async def to_stream(request: Message, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
            request_id = _request_id(ids)
            digest = await _digest(method, request)
            unary = not handler.response_streaming
            call = self._call(request_id, digest, behaviour, request, context, unary=unary)
            async with contextlib.aclosing(call.messages(context)) as messages:
                async for message in messages:
                    yield message

        async def to_one(request: Message, context: grpc.aio.ServicerContext) -> Any:
            async with contextlib.aclosing(to_stream(request, context)) as messages:
                # To the end, for the trailers are set there.
                return [message async for message in messages][0]

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                to_stream, handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(to_one, handler.request_deserializer, handler.response_serializer)

    def _call(
        self,
        request_id: str,
        digest: bytes,
        behaviour: Any,
        request: Message,
        context: grpc.aio.ServicerContext,
        *,
        unary: bool,
    ) -> _SharedCall:
        caller = current_caller.get()
        # Nothing is awaited in here, so that of two attempts at once only one finds no call.
        try:
            entry = self.shelf.find(caller, request_id, digest, field=_FIELD)
        except faults.Fault:
            self._repeated.labels("refused").inc()
            raise
        if entry is not None:
            self._repeated.labels("answered" if entry.call.ended else "joined").inc()
            return entry.call
        call = _SharedCall(self.shelf, unary=unary)
        shared = _Context(context, call)
        call.start(self.shelf.put(caller, request_id, digest, call), lambda: behaviour(request, shared))
        return call


def _request_id(values: list[Any]) -> str:
    if len(values) > 1:
        raise faults.invalid_field(_FIELD, f"it came {len(values)} times; a call has one id")
    try:
        return str(uuid.UUID(values[0]))
    except (ValueError, AttributeError, TypeError):
        raise faults.invalid_field(
            _FIELD, f"{str(values[0])[:80]!r} is not a UUID, such as 123e4567-e89b-12d3-a456-426614174000"
        ) from None


async def _digest(method: str, request: Message) -> bytes:
    def digest() -> bytes:
        # Of the message written anew: the same request in any order of its fields, unknown fields included.
        content = request.SerializeToString(deterministic=True)
        return hashlib.sha256(method.encode() + b"\0" + content).digest()

    if request.ByteSize() <= _HASHED_ON_LOOP_BYTES:
        return digest()
    return await asyncio.to_thread(digest)
