"""Endpoints that fail behind the gateway: what is tried again, where, and what never is."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest

from services.gateway import config
from services.gateway.__main__ import assemble, make_fleet
from services.gateway.endpoint import State
from services.gateway.settings import Settings
from services.kit import errors, faults
from tests.integration.test_gateway import outcome
from tests.integration.test_gateway_routing import backends, served_by
from tests.support.backend import BIDI, SERVER_STREAM, UNARY, Backend, echo
from tests.support.backend_process import backend_process
from tests.support.gateway import Gateway, pool, running

GONE = grpc.StatusCode.UNAVAILABLE


def failing(
    code: grpc.StatusCode = GONE, *trailers: tuple[str, str | bytes], times: int = 1_000_000, header: bool = False
) -> Any:
    """A behaviour that takes one request and fails, the first `times` calls; then it is an echo."""
    left = times

    async def fail(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        nonlocal left
        left -= 1
        if left < 0:
            async for request in requests:
                yield request
            return
        await anext(aiter(requests))
        if header:
            await context.send_initial_metadata(())
        await context.abort(code, "engine lost", trailers)

    return fail


def retry_info(milliseconds: int) -> tuple[str, bytes]:
    fault = faults.unavailable("ENGINE_LOST", "engine lost", retry_after_ms=milliseconds)
    return ("grpc-status-details-bin", errors.to_status(fault).SerializeToString())


async def ask(gateway: Gateway, kind: str) -> list[bytes]:
    """Call with the messages a, b (or ab, of a unary request) and give back the answers."""
    if kind == "unary":
        return [await gateway.channel.unary_unary(UNARY)(b"ab")]
    if kind == "server stream":
        return [m async for m in gateway.channel.unary_stream(SERVER_STREAM)(b"ab")]
    call = gateway.channel.stream_stream(BIDI)()
    for message in (b"a", b"b"):
        await call.write(message)
    answers = [await call.read(), await call.read()]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return answers


def retries(gateway: Gateway, reason: str) -> float:
    value = gateway.server.metrics.registry.get_sample_value
    return value("inkwell_gateway_retries_total", {"pool": "ocr-cpu", "reason": reason}) or 0


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("kind", ["unary", "server stream", "bidi"])
async def test_what_failed_before_it_was_answered_is_done_elsewhere(kind: str, header: bool) -> None:
    async with backends(2) as (bad, good), running(pool("ocr-cpu", bad, good)) as gateway:
        bad.behaviour = failing(GONE, retry_info(60_000), header=header)
        for _ in range(4):
            assert b"".join(await ask(gateway, kind)) == b"ab"
        await gateway.idle()
        assert good.call_count == 4
        assert bad.call_count == retries(gateway, "elsewhere") > 0


async def test_a_less_preferred_pool_takes_over() -> None:
    async with (
        backends(2) as (cuda, cpu),
        running(pool("on-cuda", cuda, hardware="cuda"), pool("on-cpu", cpu)) as gateway,
    ):
        cuda.behaviour = failing()
        assert await served_by(gateway) == "on-cpu"
        assert cuda.call_count == 1
        error = await outcome(
            gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "cuda!"),), timeout=0.3)
        )
        assert error.code() in (GONE, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert cpu.call_count == 1


async def test_nothing_is_repeated_once_the_answer_began() -> None:
    async def answer_and_fail(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        yield b"first"
        await context.abort(GONE, "engine lost", (retry_info(1),))

    async with backends(2) as two, running(pool("ocr-cpu", *two)) as gateway:
        for backend in two:
            backend.behaviour = answer_and_fail
        call = gateway.channel.unary_stream(SERVER_STREAM)(b"a")
        assert await call.read() == b"first"
        error = await outcome(call_to_end(call))
        assert (error.code(), error.details()) == (GONE, "engine lost")
        assert two[0].call_count + two[1].call_count == 1


async def call_to_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c not in (GONE, grpc.StatusCode.OK)])
async def test_only_unavailable_is_tried_again(code: grpc.StatusCode) -> None:
    async with backends(2) as two, running(pool("ocr-cpu", *two)) as gateway:
        for backend in two:
            backend.behaviour = failing(code)
        assert (await outcome(gateway.channel.unary_unary(UNARY)(b"a"))).code() is code
        assert two[0].call_count + two[1].call_count == 1


@pytest.mark.parametrize("pushback", ["-1", "no"])
async def test_an_endpoint_may_forbid_the_retry(pushback: str) -> None:
    async with backends(2) as two, running(pool("ocr-cpu", *two)) as gateway:
        for backend in two:
            backend.behaviour = failing(GONE, ("grpc-retry-pushback-ms", pushback))
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        assert error.code() is GONE
        # The caller is forbidden too (gRPC itself makes a negative number of what is none).
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) < 0
        assert two[0].call_count + two[1].call_count == 1


@pytest.mark.parametrize("trailer", [retry_info(1), ("grpc-retry-pushback-ms", "1"), None])
async def test_the_only_endpoint_is_asked_again_after_the_wait_it_wished(trailer: Any) -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        only.behaviour = failing(GONE, *([trailer] if trailer else []), times=2)
        assert await ask(gateway, "unary") == [b"ab"]
        await gateway.idle()
        assert (only.call_count, retries(gateway, "waited")) == (3, 2)


async def test_a_wait_that_the_deadline_does_not_allow_is_not_begun() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        only.behaviour = failing(GONE, retry_info(20_000))
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=10))
        assert (error.code(), error.details()) == (GONE, "engine lost")
        assert dict(error.trailing_metadata())["grpc-status-details-bin"] == retry_info(20_000)[1]
        assert only.call_count == 1


async def test_attempts_are_bounded() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only), max_attempts=3) as gateway:
        only.behaviour = failing(GONE, retry_info(1))
        assert (await outcome(gateway.channel.unary_unary(UNARY)(b"a"))).code() is GONE
        assert only.call_count == 3


async def test_the_callers_own_retry_policy_still_works() -> None:
    policy = {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    async with backends(1) as (only,), running(pool("ocr-cpu", only), max_attempts=1) as gateway:
        only.behaviour = failing(GONE, retry_info(1), times=2)
        options = [("grpc.service_config", json.dumps(policy)), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.port}", options=options) as channel:
            assert await channel.unary_unary(UNARY)(b"a") == b"a"
        assert only.call_count == 3


async def test_a_call_waits_for_a_service_that_restarts_its_engine() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        only.behaviour = failing(GONE, retry_info(1), times=1)
        entered_again = asyncio.Event()

        async def lose_engine(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
            await only.set_ready(False)
            await gateway.until_state(only, State.NOT_READY)
            only.behaviour = echo
            entered_again.set()
            await context.abort(GONE, "engine lost", (retry_info(1),))
            yield b""

        only.behaviour = lose_engine
        call = gateway.channel.unary_unary(UNARY)(b"a", timeout=60)
        await entered_again.wait()
        # New calls are refused at the door meanwhile; the one that was inside is kept.
        assert (await outcome(gateway.channel.unary_unary(UNARY)(b"b"))).code() is GONE
        await only.set_ready(True)
        assert await call == b"a"


@pytest.mark.parametrize("kind", ["unary", "server stream", "bidi"])
async def test_a_process_killed_in_the_middle_of_a_call_costs_nothing(kind: str) -> None:
    async with backend_process() as doomed, backends(1) as (good,):
        both = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [doomed.address, good.address]}
        async with running(both) as gateway:
            at_doomed = next(e for e in gateway.fleet.pools[0].endpoints if e.address == doomed.address)
            await good.set_ready(False)
            await gateway.until_state(good, State.NOT_READY)
            answers = asyncio.create_task(ask(gateway, kind))
            await doomed.entered()
            await good.set_ready(True)
            await gateway.until_state(good, State.READY)
            doomed.kill()
            assert b"".join(await answers) == b"ab"
            await gateway.until(lambda: at_doomed.state is State.UNREACHABLE)
            assert await served_by(gateway) == "ocr-cpu"
            await gateway.idle()
            assert (at_doomed.calls, at_doomed.unavailable, at_doomed.in_flight) == (1, 1, 0)


async def test_a_stream_cut_in_its_middle_ends_with_unavailable_and_the_next_call_goes_elsewhere() -> None:
    async def one_message(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        yield b"step 1"
        await asyncio.Event().wait()

    async with backends(2) as two, running(pool("ocr-cpu", *two)) as gateway:
        for backend in two:
            backend.behaviour = one_message
        call = gateway.channel.unary_stream(SERVER_STREAM)(b"a")
        assert await call.read() == b"step 1"
        address = dict(await call.initial_metadata())["inkwell-endpoint"]
        serving, other = two if two[0].address == address else (two[1], two[0])
        await serving.stop()
        assert (await outcome(call_to_end(call))).code() is GONE
        assert other.call_count == 0
        following = gateway.channel.unary_stream(SERVER_STREAM)(b"a")
        assert await following.read() == b"step 1"
        assert dict(await following.initial_metadata())["inkwell-endpoint"] == other.address
        following.cancel()


async def test_an_endpoint_that_left_comes_back_by_itself() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        assert await served_by(gateway) == "ocr-cpu"
        await only.stop()
        await gateway.until_state(only, State.UNREACHABLE)
        assert (await outcome(gateway.channel.unary_unary(UNARY)(b"a"))).code() is GONE
        await only.restart()
        await gateway.until_state(only, State.READY)
        assert await served_by(gateway) == "ocr-cpu"


async def test_a_stream_longer_than_what_is_kept_is_not_repeated() -> None:
    async def fail_at_end(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        async for _ in requests:
            pass
        await context.abort(GONE, "engine lost")
        yield b""

    async with backends(2) as two, running(pool("ocr-cpu", *two), replay_bytes=1000) as gateway:
        for backend in two:
            backend.behaviour = fail_at_end
        call = gateway.channel.stream_stream(BIDI)()
        for _ in range(5):
            await call.write(b"x" * 500)
        await call.done_writing()
        assert (await outcome(call_to_end(call))).details() == "engine lost"
        assert two[0].call_count + two[1].call_count == 1


async def test_an_endpoint_without_health_service_is_given_no_calls() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        mute = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [f"127.0.0.1:{port}"]}
        async with running(mute, wait=False) as gateway:
            endpoint = gateway.fleet.pools[0].endpoints
            await gateway.until(lambda: bool(endpoint) and endpoint[0].state is State.NOT_READY)
            assert "no grpc.health.v1 service" in endpoint[0].last_error
    finally:
        await server.stop(None)


async def test_a_caller_that_gives_up_while_a_retry_waits_leaves_nothing_behind() -> None:
    failed = asyncio.Event()

    async def fail(_requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        failed.set()
        await context.abort(GONE, "engine lost", (retry_info(20_000),))
        yield b""

    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        only.behaviour = fail
        call = gateway.channel.unary_unary(UNARY)(b"a")
        await failed.wait()
        call.cancel()
        await gateway.idle()
        assert gateway.endpoint(only).in_flight == 0
        assert only.call_count == 1


async def test_stopping_ends_every_task_and_connection() -> None:
    async with backends(1) as (up,):
        before = asyncio.all_tasks()
        text = json.dumps({"pools": [pool("a", up), pool("b", Backend(), service="diffusion")]}).replace(":0", ":1")
        settings = Settings(port=0, resolve_interval_s=0.01)
        fleet = make_fleet(settings, config.parse(text))
        server = assemble(settings, fleet)
        await server.start()
        while not (fleet.ready("ocr") and fleet.pools[1].count(State.UNREACHABLE)):
            await fleet.wait_change()
        await server.stop(0)
        gc.collect()
        ours = {t for t in asyncio.all_tasks() - before if t.get_name().startswith(("watch", "resolve", "drain"))}
        assert ours == set()
        assert all(not p.endpoints for p in fleet.pools)
