"""A tiny gRPC server whose behaviour a test chooses: what stands behind the gateway when transport is the subject.

Messages are bytes. A behaviour is one async generator for every arity: it takes the request messages (one, of a unary
request) and yields the response messages (one, of a unary response).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

Behaviour = Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext], AsyncGenerator[bytes, None]]

UNARY = "/inkwell.ocr.v1.OcrService/Recognize"
SERVER_STREAM = "/inkwell.ocr.v1.OcrService/StreamRecognize"
READ_DOCUMENT = "/inkwell.ocr.v1.OcrService/ReadDocument"
BIDI = "/inkwell.ocr.v1.OcrService/BatchRecognize"
CLIENT_STREAM = "/inkwell.ocr.v1.OcrService/Collect"  # not in the protos
DIFFUSION_STREAM = "/inkwell.diffusion.v1.DiffusionService/Generate"
_ARITIES = {
    UNARY: (0, 0),
    SERVER_STREAM: (0, 1),
    READ_DOCUMENT: (0, 1),
    BIDI: (1, 1),
    CLIENT_STREAM: (1, 0),
    DIFFUSION_STREAM: (0, 1),
}


async def echo(requests: AsyncIterator[bytes], _context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
    async for request in requests:
        yield request


class Backend(grpc.GenericRpcHandler):  # type: ignore[misc]
    """One server on a port of its own; `call_count` counts what reached it, `metadata` is of the last call."""

    def __init__(self, behaviour: Behaviour = echo) -> None:
        self.behaviour = behaviour
        self.port = 0
        self.call_count = 0
        self.metadata: dict[str, Any] = {}
        self.time_left: float | None = None
        self.entered = asyncio.Event()  # a call arrived
        self.cancelled = asyncio.Event()  # a call was cancelled
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, host: str = "127.0.0.1") -> "Backend":
        await self._health.set("readiness", health_pb2.HealthCheckResponse.SERVING)
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", -1),
            # So that tests of dead connections may probe them often.
            ("grpc.http2.min_ping_interval_without_data_ms", 100),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        self._server = grpc.aio.server(options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"{host}:{self.port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        """End at once: connections are closed, calls under way fail."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def restart(self) -> None:
        """Come back on the same port."""
        self._health = health.aio.HealthServicer()
        await self.start()

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set("readiness", status.SERVING if ready else status.NOT_SERVING)

    async def reached(self, begin: Callable[[float], Any], deadline_s: float) -> Any:
        """A call that `begin` made with that deadline, and that has arrived here.

        One whose deadline passed on its way, on a machine that is busy, is made again with twice the time.
        """
        while True:
            call, ended = begin(deadline_s), asyncio.Event()
            call.add_done_callback(lambda _, ended=ended: ended.set())
            waits = [asyncio.create_task(event.wait()) for event in (self.entered, ended)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if self.entered.is_set():
                return call
            deadline_s *= 2

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        arity = _ARITIES.get(handler_call_details.method)
        if arity is None:
            return None

        async def produce(
            requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
        ) -> AsyncGenerator[bytes, None]:
            self.call_count += 1
            self.metadata = dict(context.invocation_metadata() or ())
            self.time_left = context.time_remaining()
            self.entered.set()
            try:
                async with contextlib.aclosing(self.behaviour(requests, context)) as produced:
                    async for message in produced:
                        yield message
            except (asyncio.CancelledError, GeneratorExit):  # the latter if it stood in a write
                self.cancelled.set()
                raise

        async def to_many(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with contextlib.aclosing(produce(request if arity[0] else _one(request), context)) as produced:
                async for message in produced:
                    try:
                        await context.write(message)
                    except grpc.aio.InternalError:
                        return  # the caller is gone

        async def to_one(request: Any, context: grpc.aio.ServicerContext) -> bytes | None:
            messages = [message async for message in produce(request if arity[0] else _one(request), context)]
            return messages[-1] if messages else None

        kinds = ("unary", "stream")
        make = getattr(grpc, f"{kinds[arity[0]]}_{kinds[arity[1]]}_rpc_method_handler")
        return make(to_many if arity[1] else to_one)


async def _one(request: bytes) -> AsyncIterator[bytes]:
    yield request
