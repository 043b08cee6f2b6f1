"""A unary reply in one piece arrives as one that grpc.aio sent, whose private layer it stands on."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from services.kit import reply

Handler = Callable[[bytes, Any], Awaitable[bytes]]


class Server(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self) -> None:
        self.handler: Handler | None = None

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self.handler)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    handlers = Server()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield handlers, channel
    await server.stop(None)


@pytest.mark.parametrize("message", [b"", b"\0" * 300_000])
async def test_it_is_all_there_and_nothing_is_logged(
    served: tuple[Server, grpc.aio.Channel], message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    server, channel = served

    async def answer(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("after-bin", b"\xff\0"),))
        await reply.send(context, (("ahead", "1"), ("ahead-bin", b"\0\1")), request)
        raise asyncio.CancelledError

    server.handler = answer
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            call = channel.unary_unary("/a/B")(message, timeout=30)
            assert await call == message
            assert tuple(await call.initial_metadata()) == (("ahead", "1"), ("ahead-bin", b"\0\1"))
            assert tuple(await call.trailing_metadata()) == (("after-bin", b"\xff\0"),)
            assert await call.code() is grpc.StatusCode.OK
    assert not caplog.records


async def test_to_a_caller_that_left_it_fails_as_sending_does(served: tuple[Server, grpc.aio.Channel]) -> None:
    server, channel = served
    entered, failed = asyncio.Event(), asyncio.Event()

    async def answer(request: bytes, context: Any) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:  # the caller is gone, and grpc.aio has cancelled this
            try:
                await reply.send(context, (("ahead", "1"),), request)
            except grpc.aio.InternalError:
                failed.set()
        return request

    server.handler = answer
    call = channel.unary_unary("/a/B")(b"a")
    await entered.wait()
    call.cancel()
    await asyncio.wait_for(failed.wait(), 30)
