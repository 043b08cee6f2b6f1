"""The byte pass-through: every call of a routed service goes to an endpoint and back, unparsed, in all four arities."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from services.gateway import asked, metadata, methods
from services.gateway.feed import RequestFeed
from services.gateway.methods import FULL_NAMES, SHARED_NAMES, Method
from services.gateway.routed import RoutedCall, Routing
from services.gateway.unary import Unary
from services.kit.call import label_method
from services.kit.errors import DOMAIN

# Opens one attempt: called with the endpoint's multicallable, the timeout and the metadata.
_Open = Callable[[Any, float | None, metadata.Metadata], Any]


class Proxy(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers for every method that no servicer of the gateway's own answers; register it after those.

    Health, reflection and channelz are the gateway's own, whatever the order of registration.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._handlers = {path: _handler(routing, method) for path, method in methods.METHODS.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        path: str = handler_call_details.method
        known = self._handlers.get(path)
        if known is not None:
            return known
        if path.startswith("/grpc."):
            return None
        method = methods.find(path)
        return _UNROUTED if method is None else _handler(self._routing, method)


def _handler(routing: Routing, method: Method) -> grpc.RpcMethodHandler:
    relay = _relay_stream if method.response_streaming else _relay_one

    async def one_request(request: bytes, context: grpc.aio.ServicerContext) -> bytes | None:
        def opened(stub: Any, timeout: float | None, passed: metadata.Metadata) -> Any:
            if not method.response_streaming:
                return Unary(stub, request, timeout, passed)
            return stub(request, timeout=timeout, metadata=passed)

        about = asked.read(method, request)
        routing.access.check_models(method, request)
        with RoutedCall(routing, about, context) as call:
            return await _attempts(call, opened, relay)

    async def many_requests(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes | None:
        about = asked.Asked(method)
        requests = routing.access.checked(method, requests)
        if asked.names_model(method) and routing.fleet.reads_streams(method.service):
            about, requests = await asked.read_first(method, requests)
        feed = RequestFeed(requests, keep_bytes=routing.settings.replay_bytes)

        def opened(stub: Any, timeout: float | None, passed: metadata.Metadata) -> Any:
            upstream = stub(timeout=timeout, metadata=passed)
            feed.attach(upstream)
            return upstream

        if not method.known:
            label_method(f"/{method.label}")
        with RoutedCall(routing, about, context) as call:
            call.feed = feed
            try:
                return await _attempts(call, opened, relay)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if feed.error is not None and not (task is not None and task.cancelling()):
                    raise feed.error from None
                raise
            finally:
                await feed.close()

    if method.request_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if method.response_streaming else grpc.stream_unary_rpc_method_handler
        )
        return make(many_requests)
    make = grpc.unary_stream_rpc_method_handler if method.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(one_request)


async def _attempts(
    call: RoutedCall, opened: _Open, relay: Callable[[RoutedCall, Any], Awaitable[bytes | None]]
) -> bytes | None:
    endpoint = await call.first()
    while True:
        timeout = call.begin(endpoint)
        upstream: Any = None
        try:
            upstream = opened(endpoint.stub(call.method), timeout, call.metadata)
            return await relay(call, upstream)
        except grpc.aio.AioRpcError as error:
            failure = error
        finally:
            endpoint.end()
            if upstream is not None:
                # Without effect if it has ended; else our caller is gone, and the endpoint has to know.
                upstream.cancel()
        following = await call.again(failure)
        if following is None:
            await call.pass_status(failure)
        endpoint = following


async def _relay_one(call: RoutedCall, upstream: Any) -> bytes:
    response: bytes = await upstream
    call.learn(response)
    call.reply_with_header(await upstream.initial_metadata())
    call.context.set_trailing_metadata(call.trailers(await upstream.trailing_metadata()))
    return response


async def _relay_stream(call: RoutedCall, upstream: Any) -> None:
    message = await upstream.read()
    # The header waits for the first message (or the end): until then the call can still be moved elsewhere.
    await call.send_header(await upstream.initial_metadata())
    while message is not grpc.aio.EOF:
        # One message at a time: a caller that reads slowly slows the endpoint down, and nothing piles up here.
        await call.write(message)
        message = await upstream.read()
    call.context.set_trailing_metadata(call.trailers(await upstream.trailing_metadata()))


async def _unrouted(_requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
    label_method("other")
    routed = ", ".join((*FULL_NAMES.values(), *SHARED_NAMES))
    message = f"the gateway does not route this service; it routes: {routed}"
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="SERVICE_NOT_ROUTED", domain=DOMAIN))
    code = grpc.StatusCode.UNIMPLEMENTED
    status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
    await context.abort(code, message, ((metadata.DETAILS_KEY, status.SerializeToString()),))


_UNROUTED = grpc.stream_stream_rpc_method_handler(_unrouted)
