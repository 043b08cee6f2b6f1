"""A unary call to an endpoint with as little around it as can be: most of what passes through the gateway is one.

grpc.aio wraps each call in a task of its own and copies its metadata several times over. This speaks to the layer
below, as grpc.aio does itself, and is used like its call object. That layer is private to grpcio:
tests/unit/gateway/test_unary.py holds it to what is needed here, requirements/ to the version it was written for.
"""

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any

import grpc
from grpc._cython import cygrpc

from services.gateway.metadata import Metadata

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class Unary:
    """Begun when it is awaited, once. Raises what grpc.aio's call raises: AioRpcError, or CancelledError.

    multicallable: `Channel.unary_unary` of grpc.aio, without serializers. timeout: in seconds, None for no deadline.
    """

    def __init__(self, multicallable: Any, request: bytes, timeout: float | None, metadata: Metadata) -> None:
        self._request = request
        self._metadata = metadata
        deadline = None if timeout is None else time.time() + timeout
        self._call = multicallable._channel.call(
            multicallable._method, deadline, None, None, multicallable._registered_call_handle
        )
        # So that closing the channel ends the call.
        multicallable._python_channel._register_call(self)

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._response().__await__()

    async def _response(self) -> bytes:
        call = self._call
        response: bytes | None = await call.unary_unary(self._request, self._metadata, cygrpc.build_census_context())
        if call.is_ok() and response is not None:
            return response
        if call.is_locally_cancelled():
            raise asyncio.CancelledError
        status = await call.status()
        raise grpc.aio.AioRpcError(
            _CODES.get(status.code(), grpc.StatusCode.UNKNOWN),
            grpc.aio.Metadata.from_tuple(await call.initial_metadata() or ()),
            grpc.aio.Metadata.from_tuple(status.trailing_metadata() or ()),
            details=status.details(),
            debug_error_string=status.debug_error_string(),
        )

    async def initial_metadata(self) -> Metadata:
        """What the endpoint sent ahead of its answer."""
        received: Metadata = await self._call.initial_metadata() or ()
        return received

    async def trailing_metadata(self) -> Metadata:
        """What the endpoint sent after its answer."""
        received: Metadata = (await self._call.status()).trailing_metadata() or ()
        return received

    def cancel(self) -> bool:
        """Tell the endpoint that nobody waits any more; False, and without effect, if the call has ended."""
        if self._call.done():
            return False
        self._call.cancel("Locally cancelled by application!")
        return True

    async def code(self) -> grpc.StatusCode:
        """How the call ended, once it has: a channel that is closed with a grace waits for this."""
        return _CODES.get((await self._call.status()).code(), grpc.StatusCode.UNKNOWN)

    def done(self) -> bool:
        """Whether the call has ended."""
        ended: bool = self._call.done()
        return ended

    def add_done_callback(self, callback: Callable[["Unary"], None]) -> None:
        """Call back with this object when the call has ended."""
        self._call.add_done_callback(lambda *_: callback(self))
