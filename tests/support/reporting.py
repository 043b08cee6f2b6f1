"""A backend that says how loaded it is, as a test wants it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from services.kit import orca
from services.kit.orca import Load
from tests.support.backend import Backend, Behaviour, echo

IDLE = Load(slots=8, running=0, waiting=0, wait_s=0.0, call_s=1.0)


class Reporting(Backend):
    """Reports `load` to who follows it: at once, and when `say` changes it."""

    def __init__(self, load: Load = IDLE, behaviour: Behaviour = echo) -> None:
        super().__init__(behaviour)
        self.load = load
        self._news = asyncio.Event()

    def say(self, load: Load) -> None:
        """This is the load from now on."""
        self.load = load
        self._news.set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == orca.STREAM:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return super().service(handler_call_details)

    async def _stream(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        while True:
            yield orca.encode(self.load)
            self._news.clear()
            await self._news.wait()


async def with_report(
    load: Load, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
) -> AsyncGenerator[bytes, None]:
    """A behaviour: an echo whose trailers report that load."""
    context.set_trailing_metadata(((orca.LOAD_KEY, orca.encode(load)), ("x-kept", "yes")))
    async for request in requests:
        yield request
