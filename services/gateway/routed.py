"""One call on its way through the gateway: where it may go, where it is, and whether it may be tried again."""

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

import grpc

from services.gateway import metadata, preference, retry
from services.gateway.access import Access, caller_of
from services.gateway.asked import Asked, begun
from services.gateway.endpoint import Endpoint
from services.gateway.feed import RequestFeed
from services.gateway.metrics import NO_POOL, GatewayMetrics
from services.gateway.overload import Overload, Place
from services.gateway.pools import Fleet, none_ready
from services.gateway.settings import Settings
from services.gateway.tiers import Tiers
from services.kit import faults, tracing
from services.kit.boundary import REQUEST_ID_KEY
from services.kit.call import priority_of, received, reply_with, request_id, time_left
from services.kit.errors import CODES
from services.kit.faults import Fault

_CANCELLED_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Routing:
    """What every call needs."""

    fleet: Fleet
    settings: Settings
    metrics: GatewayMetrics
    overload: Overload
    access: Access


class RoutedCall:
    """Used as `with RoutedCall(...) as call`, which counts the call when it is left."""

    def __init__(self, routing: Routing, asked: Asked, context: grpc.aio.ServicerContext) -> None:
        self.asked = asked
        self.method = asked.method
        self.context = context
        self.metadata: metadata.Metadata = ()
        self.attempts = 0
        self.answered = False  # something was sent to the caller, so there is no second try
        self.feed: RequestFeed | None = None  # of a call whose requests are a stream
        self.code = grpc.StatusCode.OK
        self._fleet = routing.fleet
        self._settings = routing.settings
        self._metrics = routing.metrics
        self._overload = routing.overload
        self._access = routing.access
        self._place: Place | None = None
        self._began = 0.0  # the attempt, of time.monotonic
        self._writing_s = 0.0  # of it, what the caller took to take what it was sent
        self._tiers: Tiers = ()
        self._wanted = preference.NO_PREFERENCE
        self._configured = 0  # of which configuration the tiers are
        self._home: str | None = None  # store of the operation that the call is about
        self._endpoint: Endpoint | None = None
        self._under_way = False  # an attempt is
        self._tried: list[Endpoint] = []
        self._deadline: float | None = None  # on the loop's clock
        self._wait_left_s = routing.settings.retry_wait_s
        self._span = tracing.current()  # of the call
        self._attempt: tracing.Span | None = None

    def __enter__(self) -> "RoutedCall":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Fault):
            self.code = CODES[error.data.kind]
        elif isinstance(error, asyncio.CancelledError):
            self.code = grpc.StatusCode.CANCELLED
            end = self._attempts_end()
            late = end is not None and asyncio.get_running_loop().time() >= end
            # Our caller's deadline and the endpoint's pass at nearly the same time, and either may be seen first.
            if late and self._under_way and self._endpoint is not None and not self._excuses_silence():
                self._endpoint.kept_silent()
        elif error is not None and not isinstance(error, grpc.aio.AbortError):
            self.code = grpc.StatusCode.INTERNAL
        if self._attempt is not None:
            self._attempt.end_call(self.code.name, server=False)
        pool = self._endpoint.pool if self._endpoint is not None else NO_POOL
        self._metrics.ended(pool, self.method.label, self.code.name)
        if self._place is not None:
            seconds: float | None = None
            # How long a stream of requests takes is its caller's choice.
            if error is None and self.feed is None:
                seconds = time.monotonic() - self._began - self._writing_s
            self._overload.leave(self._place, method=self.method.label, began=self._began, seconds=seconds)

    async def first(self) -> Endpoint:
        """Read what the caller wants, wait for its turn and choose an endpoint.

        Raises Fault if the call cannot be sent anywhere, or there are too many.
        """
        said = received(self.context)
        passed = metadata.to_upstream(pair for pair in said if pair[0] != REQUEST_ID_KEY)
        # The boundary gave the call an id if the caller had none: with it, logs of both sides can be joined.
        self.metadata = self._access.to_service((*passed, (REQUEST_ID_KEY, request_id())))
        left = time_left(self.context)
        if left is not None:
            self._deadline = asyncio.get_running_loop().time() + left
        self._wanted = preference.from_metadata(said)
        if self.asked.operation:
            self._home = await self._fleet.homes.find(self.asked, metadata=self.metadata, time_left_s=left)
        if self.method.operation_name is None:
            queued_ns = tracing.now_ns()
            self._place, endpoint = await self._overload.admit(
                self._find,
                caller=caller_of(self.context),
                priority=priority_of(self.context),
                ends_at=self._attempts_end(),
                counted=not self.method.request_streaming,
            )
            if self._span is not None:
                self._span.past("queue", queued_ns)
            return endpoint
        # A call about an operation is no work, and is what people look with when there is too much of it.
        chosen = self._fleet.choose(self._find())
        if chosen is None:
            raise none_ready(self._tiers)
        return chosen

    def _find(self) -> Tiers:
        # Once, and again when the configuration changes: each asking is a turn in the shares of a canary.
        if not self._tiers or self._configured != self._fleet.configured:
            self._configured = self._fleet.configured
            tiers = self._fleet.tiers(self.asked, self._wanted, home=self._home)
            self._tiers = self._access.narrowed(tiers, lambda pool: pool.name)
        return self._tiers

    def _excuses_silence(self) -> bool:
        # An endpoint may be waiting for the caller's requests, or for an operation to end.
        return self.answered or self.feed is not None or self.method.operation_name is not None

    def _attempts_end(self) -> float | None:
        return None if self._deadline is None else self._deadline - self._settings.deadline_margin_ms / 1000

    def begin(self, endpoint: Endpoint) -> float | None:
        """Count an attempt at the endpoint; answers its timeout in seconds, None without a deadline.

        Raises Fault if the deadline leaves no time for an attempt.
        """
        timeout: float | None = None
        if self._deadline is not None:
            left = self._deadline - asyncio.get_running_loop().time()
            timeout = left - self._settings.deadline_margin_ms / 1000
            if timeout <= 0:
                raise faults.deadline_too_short(
                    f"{max(0, int(left * 1000))} ms are left, and the gateway keeps "
                    f"{self._settings.deadline_margin_ms} ms for itself"
                )
        self.attempts += 1
        if self._place is not None:
            self._overload.move(self._place, endpoint.pool)
            self._began, self._writing_s = time.monotonic(), 0.0
        self._endpoint = endpoint
        self._under_way = True
        if self._span is not None:
            self._trace_attempt(self._span, endpoint)
        endpoint.begin(self._fleet.next_turn())
        return timeout

    def _trace_attempt(self, span: tracing.Span, endpoint: Endpoint) -> None:
        if span.recorded:
            told = {"server.address": endpoint.address, "inkwell.pool": endpoint.pool, "inkwell.attempt": self.attempts}
            self._attempt = span = span.begin("attempt", told, client=True)
        others = (pair for pair in self.metadata if pair[0] != tracing.PARENT_KEY)
        self.metadata = (*others, (tracing.PARENT_KEY, span.traceparent))

    async def again(self, error: grpc.aio.AioRpcError) -> Endpoint | None:
        """After a failed attempt: the endpoint to try next, or None if the error is the caller's answer.

        Another endpoint is asked at once. If there is none, waits as long as the failed one wished and until one is
        ready, within the deadline and the `retry_wait_s` of the whole call.
        """
        failed = self._endpoint
        if failed is None:
            return None
        self._under_way = False
        if self._attempt is not None:
            self._attempt.end_call(error.code().name, server=False)
        failed.failed(error, silence_is_fine=self._excuses_silence())
        trailing = error.trailing_metadata() or ()
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry.asks_to_wait(trailing):
            self._overload.endpoint_full(failed.pool)
        if self.answered or self.attempts >= self._settings.max_attempts:
            return None
        if self.feed is not None and not self.feed.repeatable:
            return None
        if self._fleet.cannot(failed, self.asked, error):
            self._tried.append(failed)
            endpoint = self._fleet.choose(self._find(), self._tried)
            if endpoint is not None:
                self._metrics.retried(failed.pool, "cannot")
            return endpoint
        if not retry.is_lost(error):
            return None
        asked = retry.wish(trailing)
        if not asked.allowed or not self._overload.may_retry(failed.pool):
            return None
        self._tried.append(failed)
        endpoint = self._fleet.choose(self._find(), self._tried)
        reason = "elsewhere"
        if endpoint is None:
            reason = "waited"
            delay_s = asked.delay_s if asked.delay_s is not None else retry.backoff_s(self.attempts)
            endpoint = await self._wait(delay_s, failed)
        if endpoint is not None:
            self._metrics.retried(failed.pool, reason)
        return endpoint

    async def _wait(self, delay_s: float, failed: Endpoint) -> Endpoint | None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        end = began + self._wait_left_s
        attempts_end = self._attempts_end()
        if attempts_end is not None:
            end = min(end, attempts_end)
        if began + delay_s >= end:
            return None
        await asyncio.sleep(delay_s)
        endpoint: Endpoint | None = None
        try:
            async with asyncio.timeout_at(end):
                while endpoint is None:
                    tiers = self._find()
                    endpoint = self._fleet.choose(tiers, (failed,)) or self._fleet.choose(tiers)
                    if endpoint is None:
                        await self._fleet.wait_change()
        except TimeoutError:
            return None
        self._wait_left_s -= loop.time() - began
        return endpoint

    def trailers(self, received: metadata.Metadata) -> metadata.Metadata:
        """The trailers of a call that ended well, as they are passed on; the endpoint's load is read from them."""
        if self._endpoint is not None:
            self._endpoint.answered(received)
        return metadata.trailers(received)

    def learn(self, response: bytes) -> None:
        """Note where the operation lives that this call began."""
        if self.asked.begins and self._endpoint is not None:
            self._fleet.homes.learn(begun(response), self._endpoint)

    def _header(self, sent: metadata.Metadata) -> metadata.Metadata:
        self.answered = True
        if self.feed is not None:
            self.feed.commit()
        served = self._endpoint.served if self._endpoint is not None else ()
        return metadata.to_caller(sent, served)

    def reply_with_header(self, sent: metadata.Metadata) -> None:
        """Have the endpoint's initial metadata, and who serves the call, go to the caller with the one answer."""
        reply_with(self._header(sent))

    async def send_header(self, sent: metadata.Metadata) -> None:
        """Send the caller the endpoint's initial metadata and who serves it."""
        try:
            await self.context.send_initial_metadata(self._header(sent))
        except grpc.aio.InternalError:
            await self._until_cancelled()
            raise

    async def write(self, message: bytes) -> None:
        """Send the caller one message of a stream."""
        began = time.monotonic()
        try:
            await self.context.write(message)
        except grpc.aio.InternalError:
            await self._until_cancelled()
            raise
        self._writing_s += time.monotonic() - began

    async def _until_cancelled(self) -> None:
        # Sending fails when the caller is gone, and grpc.aio is about to cancel this handler for it. Wait for that, so
        # that the call ends as every cancelled one does and not as a defect.
        await asyncio.sleep(_CANCELLED_WITHIN_S)

    async def pass_status(self, error: grpc.aio.AioRpcError) -> NoReturn:
        """End the call with the endpoint's status, details and trailers; raises grpc.aio.AbortError."""
        served: metadata.Metadata = ()
        if not self.answered:
            if error.initial_metadata():
                await self.send_header(error.initial_metadata())
            elif self._endpoint is not None:
                # Without a header the caller's own retries still work, so who served goes with the trailers. (A status
                # that is set on the context instead of aborted with would bring a header, of a unary call.)
                served = self._endpoint.served
        self.code = error.code()
        trailing = (*metadata.trailers(error.trailing_metadata()), *served)
        try:
            await self.context.abort(error.code(), error.details() or "", trailing)
        except grpc.aio.InternalError:
            await self._until_cancelled()
            raise
        raise AssertionError("abort returned")
