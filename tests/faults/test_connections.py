"""Connections that break, stall, or lie, between callers and the gateway and between the gateway and its endpoints.

Whatever happens to them, a call ends by its deadline with the right status, nothing of it stays behind, and the pool
recovers without a restart.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from services.gateway.endpoint import State
from tests.faults.test_gateway import ask, call_to_end
from tests.integration.test_gateway import detail, outcome
from tests.integration.test_gateway_routing import backends, served_by
from tests.support.backend import BIDI, SERVER_STREAM, UNARY, Backend, Behaviour, echo
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.gateway import Gateway, pool, running

KINDS = ["unary", "server stream", "bidi"]
GONE = grpc.StatusCode.UNAVAILABLE
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Dead connections are found out within half a second, not the 10 s that users may set at the least.
QUICK = {"keepalive_time_s": 0.25, "keepalive_timeout_s": 0.25}

Fault = Callable[[FaultProxy], None]
BREAKS = {"cut": FaultProxy.cut, "reset": FaultProxy.reset}
STALLS: dict[str, Fault] = {
    "held": FaultProxy.hold,
    "half-open": lambda proxy: proxy.half_open("server"),
    "dripping": lambda proxy: proxy.drip(1, 0.2),
}


def held_once(backend: Backend) -> Behaviour:
    """The first call is never answered; those after it are."""

    async def hold(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        backend.behaviour = echo
        await asyncio.Event().wait()
        yield b""

    return hold


async def held(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


async def first_then_held(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    yield b"step 1"
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def behind_proxy(**settings: Any) -> AsyncIterator[tuple[Gateway, FaultProxy, Backend]]:
    """caller → gateway → proxy → one endpoint."""
    async with (
        backends(1) as (backend,),
        fault_proxy(backend.address) as proxy,
        running(pool("ocr-cpu", proxy), **settings) as gateway,
    ):
        yield gateway, proxy, backend


async def assert_nothing_is_left(gateway: Gateway) -> None:
    async with asyncio.timeout(60):
        await gateway.idle()
    assert all(endpoint.in_flight == 0 for pool in gateway.fleet.pools for endpoint in pool.endpoints)


async def assert_recovers(gateway: Gateway, proxy: FaultProxy, backend: Backend) -> None:
    """Nobody restarts anything; a caller that comes too early is told so, and comes again."""
    await proxy.heal()
    backend.behaviour = echo
    async with asyncio.timeout(60):
        while True:
            await gateway.until_state(proxy, State.READY)
            try:
                assert await gateway.channel.unary_unary(UNARY)(b"after", timeout=60) == b"after"
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not GONE:
                    raise


# --- between the gateway and an endpoint ---


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize("kind", KINDS)
async def test_an_endpoint_lost_before_it_answered_is_asked_again_when_it_is_back(kind: str, fault: str) -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        backend.behaviour = held_once(backend)
        answer = asyncio.create_task(ask(gateway, kind))
        await backend.entered.wait()
        BREAKS[fault](proxy)
        assert b"".join(await answer) == b"ab"
        assert backend.call_count == 2
        await assert_nothing_is_left(gateway)


@pytest.mark.parametrize("fault", BREAKS)
async def test_an_endpoint_lost_in_the_middle_of_its_answer_ends_the_call_and_no_other(fault: str) -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        backend.behaviour = first_then_held
        call = gateway.channel.unary_stream(SERVER_STREAM)(b"a", timeout=60)
        assert await call.read() == b"step 1"
        BREAKS[fault](proxy)
        assert (await outcome(call_to_end(call))).code() is GONE
        assert backend.call_count == 1
        await assert_nothing_is_left(gateway)
        await assert_recovers(gateway, proxy, backend)


async def test_an_answer_cut_in_the_middle_of_a_message_is_fetched_anew() -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        large = bytes(range(256)) * 8192
        proxy.cut_in(len(large) // 2)
        assert await gateway.channel.unary_unary(UNARY)(large, timeout=60) == large
        assert backend.call_count == 2
        await assert_nothing_is_left(gateway)


@pytest.mark.parametrize("fault", STALLS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_that_stalls_costs_a_call_no_more_than_its_deadline(kind: str, fault: str) -> None:
    async with behind_proxy(unchecked=QUICK | {"retry_wait_s": 0}) as (gateway, proxy, backend):
        backend.behaviour = held
        call = await backend.reached(functools.partial(start, gateway.channel, kind), 1.0)
        STALLS[fault](proxy)
        # A probe that is not answered ends it earlier.
        assert (await outcome(call_to_end(call) if kind != "unary" else call)).code() in (LATE, GONE)
        await assert_nothing_is_left(gateway)
        await assert_recovers(gateway, proxy, backend)


def start(channel: grpc.aio.Channel, kind: str, timeout: float) -> Any:
    if kind == "unary":
        return channel.unary_unary(UNARY)(b"a", timeout=timeout)
    if kind == "server stream":
        return channel.unary_stream(SERVER_STREAM)(b"a", timeout=timeout)

    async def one() -> AsyncIterator[bytes]:
        yield b"a"

    return channel.stream_stream(BIDI)(one(), timeout=timeout)


@pytest.mark.parametrize("fault", ["held", "half-open"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_that_is_silent_for_too_long_is_given_up_and_its_calls_are_done_elsewhere(
    kind: str, fault: str
) -> None:
    async with (
        backends(2) as (far, near),
        fault_proxy(far.address) as proxy,
        running(pool("ocr-cpu", proxy, near), unchecked=QUICK) as gateway,
    ):
        await near.set_ready(False)
        await gateway.until_state(near, State.NOT_READY)
        far.behaviour = held
        answer = asyncio.create_task(ask(gateway, kind))  # without a deadline
        await far.entered.wait()
        await near.set_ready(True)
        await gateway.until_state(near, State.READY)
        STALLS[fault](proxy)
        async with asyncio.timeout(60):
            assert b"".join(await answer) == b"ab"
            await gateway.until(lambda: gateway.endpoint(proxy).state is not State.READY)
        assert await served_by(gateway) == "ocr-cpu"
        await assert_nothing_is_left(gateway)
        await assert_recovers(gateway, proxy, far)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_connection_is_only_slow(kind: str) -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        proxy.delay_s = 0.05
        assert b"".join(await ask(gateway, kind)) == b"ab"
        proxy.delay_s = 0.0
        proxy.drip(7, 0.0)
        assert b"".join(await ask(gateway, kind)) == b"ab"
        assert (proxy.accepted, backend.call_count) == (1, 2)


async def test_an_endpoint_that_refuses_connections_is_said_to_and_comes_back_by_itself() -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        await proxy.refuse()
        proxy.reset()
        await gateway.until_state(proxy, State.UNREACHABLE)
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=60))
        assert error.code() is GONE
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
        assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() > 0
        await assert_recovers(gateway, proxy, backend)


async def test_an_endpoint_that_takes_connections_and_says_nothing_is_given_no_calls() -> None:
    async with backends(1) as (backend,), fault_proxy(backend.address) as proxy:
        proxy.hold()
        async with running(pool("ocr-cpu", proxy), wait=False, connect_timeout_s=0.3) as gateway:
            async with asyncio.timeout(60):
                await gateway.until(
                    lambda: (
                        bool(gateway.fleet.pools[0].endpoints) and gateway.endpoint(proxy).state is State.UNREACHABLE
                    )
                )
            error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=60))
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
            await assert_recovers(gateway, proxy, backend)


async def test_connections_that_break_all_the_time_lose_no_call_that_has_a_deadline() -> None:
    """Twenty breaks under eight callers; every call is an idempotent read with time left."""
    async with (
        backends(2) as (far, near),
        fault_proxy(far.address) as proxy,
        running(pool("ocr-cpu", proxy, near)) as gateway,
    ):
        breaking = asyncio.Event()

        async def caller(number: int) -> int:
            done = 0
            while not breaking.is_set():
                message = b"%d %d" % (number, done)
                assert await gateway.channel.unary_unary(UNARY)(message, timeout=60) == message
                done += 1
            return done

        callers = [asyncio.create_task(caller(n)) for n in range(8)]
        for number in range(20):
            reached = far.call_count + 5
            while far.call_count < reached:
                far.entered.clear()
                await far.entered.wait()
            (proxy.cut, proxy.reset)[number % 2]()
        breaking.set()
        assert sum(await asyncio.gather(*callers)) >= 100
        await assert_nothing_is_left(gateway)


# --- between a caller and the gateway ---


@contextlib.asynccontextmanager
async def caller_behind_proxy(
    **settings: Any,
) -> AsyncIterator[tuple[Gateway, grpc.aio.Channel, FaultProxy, Backend]]:
    """The channel's calls go through the proxy → gateway → one endpoint."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    options += [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 100)]
    async with (
        backends(1) as (backend,),
        running(pool("ocr-cpu", backend), **settings) as gateway,
        fault_proxy(f"127.0.0.1:{gateway.server.port}") as proxy,
        grpc.aio.insecure_channel(proxy.address, options=options) as channel,
    ):
        yield gateway, channel, proxy, backend


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_caller_that_is_cut_off_leaves_nothing_behind(kind: str, fault: str) -> None:
    async with caller_behind_proxy() as (gateway, channel, proxy, backend):
        backend.behaviour = held
        call = start(channel, kind, timeout=60)
        await backend.entered.wait()
        BREAKS[fault](proxy)
        assert (await outcome(call_to_end(call) if kind != "unary" else call)).code() is GONE
        await backend.cancelled.wait()  # long before the deadline
        await assert_nothing_is_left(gateway)
        backend.behaviour = echo
        assert await channel.unary_unary(UNARY)(b"after", wait_for_ready=True, timeout=60) == b"after"


@pytest.mark.parametrize("kind", KINDS)
async def test_the_call_of_a_caller_that_vanished_ends_at_its_deadline(kind: str) -> None:
    async with caller_behind_proxy() as (gateway, channel, proxy, backend):
        backend.behaviour = held
        call = await backend.reached(functools.partial(start, channel, kind), 1.0)
        proxy.half_open("caller")  # the gateway still believes in it
        assert (await outcome(call_to_end(call) if kind != "unary" else call)).code() in (GONE, LATE)
        await backend.cancelled.wait()
        await assert_nothing_is_left(gateway)


@pytest.mark.parametrize("fault", STALLS)
async def test_a_caller_whose_connection_stalls_has_its_status_by_the_deadline(fault: str) -> None:
    async with caller_behind_proxy() as (gateway, channel, proxy, backend):
        assert await channel.unary_unary(UNARY)(b"before", timeout=60) == b"before"
        STALLS[fault](proxy)
        call = channel.unary_unary(UNARY)(b"a" * 10_000, timeout=0.7)
        assert (await outcome(call)).code() is LATE
        await assert_nothing_is_left(gateway)
        await proxy.heal()
        while True:
            try:
                assert await channel.unary_unary(UNARY)(b"after", wait_for_ready=True, timeout=60) == b"after"
                return
            except grpc.aio.AioRpcError as error:
                assert error.code() is GONE  # noqa: PT017 - of the connection that was healed by resetting it


async def test_a_caller_that_stops_reading_holds_up_its_endpoint_and_not_the_gateways_memory() -> None:
    produced = 0

    async def produce(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        nonlocal produced
        for _ in range(2000):
            produced += 1
            yield bytes(65536)

    async with caller_behind_proxy() as (gateway, channel, proxy, backend):
        backend.behaviour = produce
        call = await backend.reached(functools.partial(start, channel, "server stream"), 1.5)
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert await call.read() == bytes(65536)
        proxy.hold()
        assert (await outcome(call_to_end(call))).code() is LATE
        await assert_nothing_is_left(gateway)
        # 128 MiB were there to be sent; buffers of the three connections take a few.
        assert produced < 500


async def test_connections_that_never_finish_their_first_words_keep_nobody_out() -> None:
    async with backends(1) as (backend,), running(pool("ocr-cpu", backend)) as gateway:
        idle = [await asyncio.open_connection("127.0.0.1", gateway.server.port) for _ in range(200)]
        try:
            for number, (_, writer) in enumerate(idle):
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: number % 24])
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{gateway.server.port}", options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                assert await channel.unary_unary(UNARY)(b"a", timeout=60) == b"a"
        finally:
            for _, writer in idle:
                writer.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: inkwell\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # the beginning of TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        bytes(100_000),
    ],
    ids=["HTTP/1.1", "TLS", "broken frames", "zeros"],
)
async def test_what_is_not_grpc_is_hung_up_on(garbage: bytes) -> None:
    async with backends(1) as (backend,), running(pool("ocr-cpu", backend)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
        async with asyncio.timeout(60):
            with contextlib.suppress(OSError):
                writer.write(garbage)
                while await reader.read(65536):
                    pass
        writer.close()
        assert await gateway.channel.unary_unary(UNARY)(b"a", timeout=60) == b"a"
