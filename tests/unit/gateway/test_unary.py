"""The gateway's own unary call behaves as that of grpc.aio, whose private layer it stands on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest

from services.gateway.unary import Unary
from tests.support.backend import UNARY, Backend


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    backend = await Backend().start()
    yield backend
    await backend.stop()


@pytest.fixture
async def channel(backend: Backend) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(backend.address) as channel:
        yield channel


async def hold(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("message", [b"", b"\0" * 300_000])
async def test_an_answer_comes_with_the_metadata_around_it(
    backend: Backend, channel: grpc.aio.Channel, message: bytes
) -> None:
    async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await context.send_initial_metadata((("ahead", "1"), ("ahead", "2")))
        context.set_trailing_metadata((("after-bin", b"\xff\0"),))
        async for request in requests:
            yield request

    backend.behaviour = answer
    call = Unary(channel.unary_unary(UNARY), message, 30, (("said", "x"), ("raw-bin", b"\xff")))
    assert await call == message
    assert tuple(await call.initial_metadata()) == (("ahead", "1"), ("ahead", "2"))
    assert tuple(await call.trailing_metadata()) == (("after-bin", b"\xff\0"),)
    assert backend.metadata["said"] == "x"
    assert backend.metadata["raw-bin"] == b"\xff"
    assert backend.time_left is not None
    assert 20 < backend.time_left < 31
    assert call.done()
    assert not call.cancel()


async def test_no_timeout_is_no_deadline(backend: Backend, channel: grpc.aio.Channel) -> None:
    assert await Unary(channel.unary_unary(UNARY), b"a", None, ()) == b"a"
    assert backend.time_left is None or backend.time_left > 1e6


async def test_an_error_is_the_one_that_grpc_raises(backend: Backend, channel: grpc.aio.Channel) -> None:
    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await context.send_initial_metadata((("ahead", "1"),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such line", (("grpc-status-details-bin", b"\1\2"),))
        yield b""

    backend.behaviour = refuse
    with pytest.raises(grpc.aio.AioRpcError) as usual:
        await channel.unary_unary(UNARY)(b"a")
    with pytest.raises(grpc.aio.AioRpcError) as ours:
        await Unary(channel.unary_unary(UNARY), b"a", 30, ())
    for part in ("code", "details", "initial_metadata", "trailing_metadata"):
        assert getattr(ours.value, part)() == getattr(usual.value, part)()


async def test_a_deadline_that_passes_ends_the_call_here_and_there(backend: Backend, channel: grpc.aio.Channel) -> None:
    backend.behaviour = hold
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Unary(channel.unary_unary(UNARY), b"a", 0.2, ())
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_nobody_there_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await Unary(channel.unary_unary(UNARY), b"a", 30, ())
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not error.value.trailing_metadata()


async def test_cancelling_who_waits_and_then_the_call_reaches_the_endpoint(
    backend: Backend, channel: grpc.aio.Channel
) -> None:
    backend.behaviour = hold
    call = Unary(channel.unary_unary(UNARY), b"a", None, ())
    waiting = asyncio.ensure_future(call)
    await backend.entered.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert call.cancel()
    await backend.cancelled.wait()


async def test_closing_the_channel_ends_the_call(backend: Backend, channel: grpc.aio.Channel) -> None:
    backend.behaviour = hold
    waiting = asyncio.ensure_future(Unary(channel.unary_unary(UNARY), b"a", None, ()))
    await backend.entered.wait()
    await channel.close()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await waiting
    await backend.cancelled.wait()
