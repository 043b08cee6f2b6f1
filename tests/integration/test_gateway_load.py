"""Load: what services report, and which endpoint a call is given for it; endpoints that fail are left out."""

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.gateway.ejection import Standing
from services.gateway.endpoint import State
from services.kit import orca
from services.kit.orca import Load
from tests.integration.test_gateway import first_then_forever, forever, outcome
from tests.integration.test_gateway_routing import backends, served_by
from tests.support import counting_service
from tests.support.backend import BIDI, SERVER_STREAM, UNARY, Backend, echo
from tests.support.gateway import Gateway, pool, running
from tests.support.reporting import IDLE, Reporting, with_report

BUSY = Load(slots=1, running=1, waiting=3, wait_s=7.0, call_s=2.0)


@contextlib.asynccontextmanager
async def counting(**settings: Any) -> AsyncIterator[tuple[grpc.aio.Channel, int]]:
    """A real service, with a real engine: a channel to it, and its port."""
    server = counting_service.build(counting_service.Settings(**settings))
    await server.start()
    await server.wait_ready()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel, server.port
    finally:
        await server.stop(0)


def reported(trailing: Any) -> Load:
    (data,) = [value for key, value in trailing if key == orca.LOAD_KEY]
    load = orca.decode(data)
    assert load is not None
    return load


async def test_a_service_reports_its_load_with_every_call_and_to_who_follows_it(tmp_path: Path) -> None:
    async with counting(slots=1, queue_limit=1) as (channel, _):
        follow = channel.unary_stream(orca.STREAM)(orca.request(0.1))
        assert orca.decode(await follow.read()) == Load(slots=1, running=0, waiting=0, wait_s=0, call_s=0)

        call = channel.unary_unary(UNARY)(counting_service.request(count=3))
        await call
        load = reported(await call.trailing_metadata())
        assert (load.slots, load.running, load.waiting) == (1, 0, 0)
        assert load.call_s > 0

        release = tmp_path / "release"
        held = channel.unary_stream(SERVER_STREAM)(counting_service.request(count=2, hold_at=2, release=str(release)))
        assert await held.read() == b"1"
        waits = channel.unary_unary(UNARY)(counting_service.request(count=1))
        async with asyncio.timeout(60):
            while load.waiting == 0:
                following = orca.decode(await follow.read())
                assert following is not None
                load = following
        assert (load.running, load.waiting) == (1, 1)
        assert load.wait_s > 0

        # A refusal reports it too.
        error = await outcome(channel.unary_unary(UNARY)(counting_service.request(count=1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        load = reported(error.trailing_metadata())
        assert (load.running, load.waiting) == (1, 1)

        release.touch()
        assert await held.read() == b"2"
        assert await held.read() is grpc.aio.EOF
        assert reported(await held.trailing_metadata()).slots == 1
        await waits
        follow.cancel()


async def test_others_find_the_report_where_orca_has_it() -> None:
    # gRPC's core keeps that trailer from us, so it is looked for in the bytes.
    seen = bytearray()
    async with counting(slots=1) as (_, port):

        async def passed_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answers, requests = await asyncio.open_connection("127.0.0.1", port)

            async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray) -> None:
                while data := await source.read(65536):
                    kept += data
                    target.write(data)
                target.close()

            await asyncio.gather(pump(reader, requests, bytearray()), pump(answers, writer, seen))

        server = await asyncio.start_server(passed_through, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, grpc.aio.insecure_channel(address) as channel:
            assert await channel.unary_unary(UNARY)(counting_service.request(count=1)) == b"1"
    assert orca.ORCA_KEY.encode() in seen


async def test_who_follows_the_load_does_not_keep_a_service_from_draining() -> None:
    server = counting_service.build(counting_service.Settings(slots=1))
    await server.start()
    await server.wait_ready()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        follow = channel.unary_stream(orca.STREAM)(orca.request(60))
        await follow.read()
        async with asyncio.timeout(60):
            await server.stop(grace_s=3600)


@contextlib.asynccontextmanager
async def reporting(*loads: Load) -> AsyncIterator[list[Any]]:
    started = [Reporting(load) for load in loads]
    for backend in started:
        await backend.start()
    try:
        yield started
    finally:
        for backend in started:
            await backend.stop()


async def heard(gateway: Gateway, *backends: Reporting) -> None:
    """Return when the gateway knows their loads as they are."""
    async with asyncio.timeout(60):
        while any(gateway.endpoint(b).load != b.load for b in backends):
            await served_by(gateway, "cuda")  # a round trip, in which the gateway gets on


@contextlib.asynccontextmanager
async def beside(*backends: Backend, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway with a pool of these, which have no slow start, and another pool for round trips."""
    other = await Backend().start()
    pools = (pool("ocr-cpu", *backends), pool("aside", other, hardware="cuda"))
    try:
        async with running(*pools, **{"slow_start_s": 0, **settings}) as gateway:
            yield gateway
    finally:
        await other.stop()


async def test_calls_go_where_the_wait_is_least_whoever_made_it() -> None:
    async with reporting(BUSY, IDLE) as (busy, idle), beside(busy, idle) as gateway:
        await heard(gateway, busy, idle)
        for _ in range(4):
            await served_by(gateway, "cpu!")
        assert (busy.call_count, idle.call_count) == (0, 4)
        # It changes without a call of ours.
        busy.say(IDLE)
        idle.say(BUSY)
        await heard(gateway, busy, idle)
        for _ in range(4):
            await served_by(gateway, "cpu!")
        assert (busy.call_count, idle.call_count) == (4, 4)


async def test_what_we_sent_since_the_last_report_counts() -> None:
    one_slot = Load(slots=1, running=0, waiting=0, wait_s=0.0, call_s=5.0)
    async with reporting(IDLE, one_slot) as (large, small), beside(large, small) as gateway:
        await heard(gateway, large, small)
        large.behaviour = small.behaviour = forever
        calls = [gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "cpu!"),)) for _ in range(9)]
        async with asyncio.timeout(60):
            while large.call_count + small.call_count < 9:
                await served_by(gateway, "cuda")
        assert (large.call_count, small.call_count) == (8, 1)
        for call in calls:
            call.cancel()


async def test_trailers_are_heard_and_kept_from_the_caller() -> None:
    async with backends(2) as (first, second), beside(first, second) as gateway:
        for backend in (first, second):
            backend.behaviour = functools.partial(with_report, BUSY)
        for kind in (UNARY, SERVER_STREAM):
            if kind == UNARY:
                call: Any = gateway.channel.unary_unary(kind)(b"a", metadata=(("inkwell-hardware", "cpu!"),))
                await call
            else:
                call = gateway.channel.unary_stream(kind)(b"a", metadata=(("inkwell-hardware", "cpu!"),))
                assert [m async for m in call] == [b"a"]
            trailing = dict(await call.trailing_metadata())
            assert trailing["x-kept"] == "yes"
            assert orca.LOAD_KEY not in trailing
        await gateway.idle()
        assert [gateway.endpoint(b).load for b in (first, second)] == [BUSY, BUSY]
        assert [gateway.endpoint(b).in_flight_then for b in (first, second)] == [0, 0]


async def test_an_endpoint_that_no_longer_reports_counts_as_saturated_until_it_does() -> None:
    async with reporting(IDLE, BUSY) as (silent, busy), beside(silent, busy, load_stale_s=3600.0) as gateway:
        await heard(gateway, silent, busy)
        gateway.endpoint(silent).heard_at -= 3601
        await served_by(gateway, "cpu!")
        assert (silent.call_count, busy.call_count) == (0, 1)

        silent.say(Load(slots=9, running=0, waiting=0, wait_s=0.0, call_s=1.0))
        await heard(gateway, silent)
        await served_by(gateway, "cpu!")
        assert silent.call_count == 1


async def test_a_newcomer_is_not_given_everything_at_once() -> None:
    async with reporting(IDLE, IDLE) as (warm, cold), beside(warm, cold, slow_start_s=3600.0) as gateway:
        await heard(gateway, warm, cold)
        gateway.endpoint(warm).ready_at = -math.inf  # it has been there for long
        warm.behaviour = cold.behaviour = forever
        calls = [gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "cpu!"),)) for _ in range(12)]
        async with asyncio.timeout(60):
            while warm.call_count + cold.call_count < 12:
                await served_by(gateway, "cuda")
        assert (warm.call_count, cold.call_count) == (11, 1)
        for call in calls:
            call.cancel()


async def refuse(code: grpc.StatusCode, requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
    await anext(aiter(requests))
    await context.abort(code, "broken")
    yield b""


def ejections(gateway: Gateway, reason: str) -> float:
    value = gateway.server.metrics.registry.get_sample_value
    return value("inkwell_gateway_ejections_total", {"pool": "ocr-cpu", "reason": reason}) or 0


async def until_standing(gateway: Gateway, backend: Backend, standing: Standing) -> None:
    async with asyncio.timeout(60):
        await gateway.until(lambda: gateway.endpoint(backend).record.standing is standing)


async def test_an_endpoint_that_fails_its_calls_is_left_out_tried_and_brought_back() -> None:
    settings: dict[str, Any] = {"eject_after": 3, "eject_s": 0.1, "slow_start_s": 0}
    async with backends(2) as (bad, good), running(pool("ocr-cpu", bad, good), **settings) as gateway:
        bad.behaviour = functools.partial(refuse, grpc.StatusCode.INTERNAL)
        codes = []
        while gateway.endpoint(bad).record.standing is Standing.IN:
            try:
                await served_by(gateway)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
        # Callers met it as often as it takes, and no more.
        assert codes == [grpc.StatusCode.INTERNAL] * 3
        assert gateway.endpoint(bad).last_error == "left out for 0.1 s (in a row); the last was INTERNAL: broken"
        value = gateway.server.metrics.registry.get_sample_value
        assert value("inkwell_gateway_ejected", {"pool": "ocr-cpu"}) == 1
        assert ejections(gateway, "in a row") == 1

        # Its health is asked for before it is given anything.
        await bad.set_ready(False)
        await gateway.until_state(bad, State.NOT_READY)
        for _ in range(4):
            await served_by(gateway)
        await bad.set_ready(True)
        await gateway.until_state(bad, State.READY)
        await until_standing(gateway, bad, Standing.ON_TRIAL)

        # One call shows that nothing is better.
        failed = 0
        while gateway.endpoint(bad).record.standing is Standing.ON_TRIAL:
            try:
                await served_by(gateway)
            except grpc.aio.AioRpcError:
                failed += 1
        assert (failed, ejections(gateway, "trial")) == (1, 1)

        bad.behaviour = echo
        await until_standing(gateway, bad, Standing.ON_TRIAL)
        before = bad.call_count
        while gateway.endpoint(bad).record.standing is Standing.ON_TRIAL:
            await served_by(gateway)
        assert gateway.endpoint(bad).record.standing is Standing.IN
        assert bad.call_count == before + 2
        assert value("inkwell_gateway_ejected", {"pool": "ocr-cpu"}) == 0


async def test_an_endpoint_that_hangs_is_left_out_by_the_deadlines_it_lets_pass() -> None:
    async with backends(2) as (hangs, good), running(pool("ocr-cpu", hangs, good), eject_after=2) as gateway:
        hangs.behaviour = forever
        while gateway.endpoint(hangs).record.standing is Standing.IN:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await gateway.channel.unary_unary(UNARY)(b"a", timeout=0.3)
            await gateway.idle()
        assert ejections(gateway, "in a row") == 1
        for _ in range(6):
            await gateway.channel.unary_unary(UNARY)(b"a", timeout=60)


async def test_work_that_takes_longer_than_its_caller_waits_is_not_the_endpoints_fault() -> None:
    async with backends(2) as (slow, good), running(pool("ocr-cpu", slow, good), eject_after=1) as gateway:
        slow.behaviour = first_then_forever
        while slow.call_count < 1:
            call = gateway.channel.unary_stream(SERVER_STREAM)(b"a", timeout=2)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            await gateway.idle()
        assert gateway.endpoint(slow).record.standing is Standing.IN


@pytest.mark.parametrize("count", [1, 3])
async def test_a_call_that_fails_everywhere_puts_nobody_out(count: int) -> None:
    async with backends(count) as some, running(pool("ocr-cpu", *some), eject_after=2) as gateway:
        for backend in some:
            backend.behaviour = functools.partial(refuse, grpc.StatusCode.INTERNAL)
        for _ in range(12):
            assert (await outcome(gateway.channel.unary_unary(UNARY)(b"poison"))).code() is grpc.StatusCode.INTERNAL
        # The first to fail twice had nobody to stand out from; nor had any after it.
        standing = [gateway.endpoint(b).record.standing for b in some]
        assert standing == [Standing.IN] * count


async def test_a_call_in_both_directions_may_outlive_the_ejection_of_its_endpoint() -> None:
    async with backends(2) as two, running(pool("ocr-cpu", *two), eject_after=2, slow_start_s=0) as gateway:
        call = gateway.channel.stream_stream(BIDI)()
        await call.write(b"a")
        assert await call.read() == b"a"
        address = dict(await call.initial_metadata())["inkwell-endpoint"]
        serving = two[0] if two[0].address == address else two[1]
        endpoint = gateway.endpoint(serving)
        for _ in range(2):
            endpoint.record.failed(time.monotonic())
        endpoint._on_failure(endpoint)
        assert endpoint.record.standing is Standing.EJECTED
        await call.write(b"b")
        assert await call.read() == b"b"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
