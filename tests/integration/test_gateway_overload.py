"""More calls than a pool can serve: who goes in, who waits for how long, and what the refused are told."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from google.rpc import error_details_pb2

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.endpoint import State
from services.kit import errors, faults
from tests.integration.test_gateway import detail, outcome
from tests.integration.test_gateway_routing import backends, served_by
from tests.support.backend import BIDI, SERVER_STREAM, UNARY, Backend
from tests.support.gateway import Gateway, pool, running
from tests.support.reporting import IDLE, Reporting

GET_OPERATION = "/google.longrunning.Operations/GetOperation"


class Turnstile:
    """A behaviour that holds every call until the test lets it go; `order` has what they sent, in order of arrival."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self._held: list[asyncio.Future[None]] = []
        self._arrived = asyncio.Condition()

    async def __call__(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        request = await anext(aiter(requests))
        held = asyncio.get_running_loop().create_future()
        async with self._arrived:
            self.order.append(request)
            self._held.append(held)
            self._arrived.notify_all()
        await held
        yield request

    async def until(self, count: int) -> None:
        """Return when so many have arrived in all."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.order) >= count)

    def let_go(self) -> None:
        """Answer the one that arrived first of those that are held."""
        self._held.pop(0).set_result(None)


def value(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.server.metrics.registry.get_sample_value(name, labels) or 0


async def until_waiting(gateway: Gateway, count: int, name: str = "ocr-cpu") -> None:
    """Return when so many calls wait for a place in the pool."""
    stub = gateway_pb2_grpc.GatewayServiceStub(gateway.channel)
    while value(gateway, "inkwell_gateway_waiting", pool=name) != count:
        await stub.ListPools(gateway_pb2.ListPoolsRequest())  # a round trip, in which the gateway gets on


@contextlib.asynccontextmanager
async def full(backend: Backend, **settings: Any) -> AsyncIterator[tuple[Gateway, Turnstile, Any]]:
    """A gateway that gives its one endpoint one call at a time, and a call that is there."""
    backend.behaviour = turnstile = Turnstile()
    async with running(pool("ocr-cpu", backend), limit_initial=1, limit_least=1, limit_most=1, **settings) as gateway:
        first = gateway.channel.unary_unary(UNARY)(b"first")
        await turnstile.until(1)
        yield gateway, turnstile, first


async def test_calls_over_the_limit_wait_in_the_gateway_and_are_served_in_order() -> None:
    async with backends(1) as (only,), full(only) as (gateway, turnstile, first):
        calls = []
        for i in range(3):
            calls.append(gateway.channel.unary_unary(UNARY)(b"%d" % i))
            await until_waiting(gateway, i + 1)
        assert turnstile.order == [b"first"]
        assert value(gateway, "inkwell_gateway_limit", pool="ocr-cpu") == 1
        for served in range(4):
            turnstile.let_go()
            if served < 3:
                await turnstile.until(served + 2)
        assert await first == b"first"
        assert [await call for call in calls] == [b"0", b"1", b"2"]
        assert turnstile.order == [b"first", b"0", b"1", b"2"]
        await gateway.idle()
        assert value(gateway, "inkwell_gateway_wait_seconds_count", pool="ocr-cpu") == 3
        assert gateway.endpoint(only).in_flight == 0


async def test_urgent_calls_go_first() -> None:
    async with backends(1) as (only,), full(only) as (gateway, turnstile, _first):
        calls = []
        for i, priority in enumerate(("low", "normal", "high")):
            calls.append(
                gateway.channel.unary_unary(UNARY)(priority.encode(), metadata=(("inkwell-priority", priority),))
            )
            await until_waiting(gateway, i + 1)
        for served in range(4):
            turnstile.let_go()
            if served < 3:
                await turnstile.until(served + 2)
        await asyncio.gather(*calls)
        assert turnstile.order[1:] == [b"high", b"normal", b"low"]


async def test_a_full_queue_refuses_with_a_type_and_a_time_to_come_back() -> None:
    async with backends(1) as (only,), full(only, queue_limit=2) as (gateway, turnstile, _first):
        waiting = gateway.channel.unary_unary(UNARY)(b"a")
        await until_waiting(gateway, 1)
        # One caller may have as many places as there are left for others.
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"b"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info = detail(error, error_details_pb2.ErrorInfo())
        assert (info.reason, info.metadata["pool"]) == ("CALLER_QUEUE_FULL", "ocr-cpu")
        wait_ms = detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds()
        assert wait_ms == int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 100
        assert only.call_count == 1
        assert value(gateway, "inkwell_gateway_refused_total", pool="ocr-cpu", reason="CALLER_QUEUE_FULL") == 1
        turnstile.let_go()
        await turnstile.until(2)
        turnstile.let_go()
        assert await waiting == b"a"


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    async with backends(1) as (only,), full(only) as (gateway, turnstile, first):
        gone = gateway.channel.unary_unary(UNARY)(b"gone")
        await until_waiting(gateway, 1)
        stays = gateway.channel.unary_unary(UNARY)(b"stays")
        await until_waiting(gateway, 2)
        gone.cancel()
        await until_waiting(gateway, 1)
        turnstile.let_go()
        await turnstile.until(2)
        turnstile.let_go()
        assert [await first, await stays] == [b"first", b"stays"]
        await gateway.idle()
        assert only.call_count == 2
        assert gateway.endpoint(only).in_flight == 0
        turnstile_again = asyncio.create_task(turnstile.until(3))
        last = gateway.channel.unary_unary(UNARY)(b"last")  # the place is free again
        await turnstile_again
        turnstile.let_go()
        assert await last == b"last"


async def test_a_deadline_that_passes_while_waiting_is_told_as_such() -> None:
    async with backends(1) as (only,), full(only, deadline_margin_ms=10_000) as (gateway, _turnstile, _first):
        # With the margin there are ten seconds to say so, and one to wait.
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=11))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "DEADLINE_TOO_SHORT"
        assert "for a place in pool ocr-cpu" in (error.details() or "")
        assert only.call_count == 1
        assert value(gateway, "inkwell_gateway_waiting", pool="ocr-cpu") == 0


async def test_another_pool_of_the_same_hardware_with_a_place_is_used_before_waiting() -> None:
    async with backends(2) as (first, second):
        turnstiles = [Turnstile(), Turnstile()]
        first.behaviour, second.behaviour = turnstiles
        async with running(
            pool("one", first), pool("two", second), limit_initial=1, limit_least=1, limit_most=1
        ) as gateway:
            calls = [gateway.channel.unary_unary(UNARY)(b"%d" % i) for i in range(2)]
            for turnstile in turnstiles:
                await turnstile.until(1)
                turnstile.let_go()
            assert [await call for call in calls] == [b"0", b"1"]


async def test_calls_about_operations_and_the_fleet_are_answered_in_the_middle_of_it() -> None:
    async with backends(1) as (only,), full(only, queue_limit=1) as (gateway, _turnstile, _first):
        waiting = gateway.channel.unary_unary(UNARY)(b"a")
        await until_waiting(gateway, 1)
        stub = gateway_pb2_grpc.GatewayServiceStub(gateway.channel)
        assert (await stub.ListPools(gateway_pb2.ListPoolsRequest())).pools[0].endpoints[0].in_flight_count == 1
        # The backend has no such method: that it says so means that it was asked.
        error = await outcome(gateway.channel.unary_unary(GET_OPERATION)(b"\n\x10operations/ocr/1"))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        waiting.cancel()


async def test_streams_of_requests_are_bounded_by_number() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only), stream_limit=2) as gateway:
        streams = []
        for _ in range(2):
            call = gateway.channel.stream_stream(BIDI)()
            await call.write(b"a")
            assert await call.read() == b"a"
            streams.append(call)
        third = gateway.channel.stream_stream(BIDI)()
        error = await outcome(third.read())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "TOO_MANY_STREAMS"
        assert await served_by(gateway) == "ocr-cpu"
        for call in streams:
            call.cancel()


async def test_one_caller_may_have_so_many_calls() -> None:
    async with backends(1) as (only,), full(only, caller_limit=2) as (gateway, turnstile, first):
        second = gateway.channel.unary_unary(UNARY)(b"second")
        await until_waiting(gateway, 1)
        error = await outcome(gateway.channel.unary_stream(SERVER_STREAM)(b"third"))
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "CALLER_LIMIT"
        assert value(gateway, "inkwell_gateway_refused_total", pool="none", reason="CALLER_LIMIT") == 1
        turnstile.let_go()
        await turnstile.until(2)
        turnstile.let_go()
        await asyncio.gather(first, second)
        await gateway.idle()
        turnstile_again = asyncio.create_task(turnstile.until(3))
        third = gateway.channel.unary_unary(UNARY)(b"third")
        await turnstile_again
        turnstile.let_go()
        assert await third == b"third"


async def test_a_pool_that_is_in_trouble_is_not_buried_under_retries() -> None:
    async with (
        backends(2) as two,
        running(pool("ocr-cpu", *two), retry_reserve=3, retry_ratio=0.0, retry_refill_per_s=0.0) as gateway,
    ):

        async def fail(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
            await anext(aiter(requests))
            fault = faults.unavailable("ENGINE_LOST", "engine lost", retry_after_ms=1)
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                "engine lost",
                (("grpc-status-details-bin", errors.to_status(fault).SerializeToString()),),
            )
            yield b""

        for backend in two:
            backend.behaviour = fail
        for _ in range(10):
            error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "engine lost")
        assert two[0].call_count + two[1].call_count == 10 + 3
        # The first call tries two endpoints and one of them again; three retries are all there are.
        assert value(gateway, "inkwell_gateway_retries_over_budget_total", pool="ocr-cpu") == 9
        assert value(gateway, "inkwell_gateway_retry_budget", pool="ocr-cpu") == 0


async def test_an_endpoint_that_is_full_itself_is_given_fewer_at_a_time() -> None:
    async def refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await anext(aiter(requests))
        await errors.abort(context, faults.overloaded("QUEUE_FULL", "the queue is full", retry_after_ms=70))
        yield b""

    async with backends(1) as (only,), running(pool("ocr-cpu", only), limit_initial=100) as gateway:
        only.behaviour = refuse
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "70"
        await gateway.idle()
        assert value(gateway, "inkwell_gateway_limit", pool="ocr-cpu") == 90
        assert only.call_count == 1


async def test_an_endpoint_that_says_how_much_it_works_on_is_given_little_more_however_much_was_guessed() -> None:
    turnstile = Turnstile()
    only = await Reporting(dataclasses.replace(IDLE, slots=2), behaviour=turnstile).start()
    try:
        async with running(pool("ocr-cpu", only), limit_initial=64) as gateway:
            await gateway.until(lambda: value(gateway, "inkwell_gateway_limit", pool="ocr-cpu") == 3)
            calls = [gateway.channel.unary_unary(UNARY)(b"%d" % i) for i in range(5)]
            await turnstile.until(3)
            await until_waiting(gateway, 2)
            assert only.call_count == 3
            only.say(dataclasses.replace(IDLE, slots=4))  # it has loaded another model
            await turnstile.until(5)
            for _ in calls:
                turnstile.let_go()
            await asyncio.gather(*calls)
    finally:
        await only.stop()


async def test_calls_for_a_pool_at_zero_wait_while_it_wakes() -> None:
    found: list[str] = []

    async def resolver(_host: str) -> list[str]:
        return list(found)

    async with backends(1) as (only,):
        dns = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [f"dns:///ocr:{only.port}"]}
        async with running(
            dns, wait=False, resolver=resolver, resolve_interval_s=0.01, queue_limit=8, wake_wait_s=30.0
        ) as gateway:
            unary = [gateway.channel.unary_unary(UNARY)(b"%d" % i) for i in range(3)]
            await until_waiting(gateway, 3)
            bidi = gateway.channel.stream_stream(BIDI)()
            await bidi.write(b"stream")
            await until_waiting(gateway, 4)
            error = await outcome(gateway.channel.unary_unary(UNARY)(b"one too many"))
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "CALLER_QUEUE_FULL"
            found.append("127.0.0.1")
            assert [await call for call in unary] == [b"0", b"1", b"2"]
            assert await bidi.read() == b"stream"
            bidi.cancel()
            # Its last endpoint goes: a call waits again.
            found.clear()
            await gateway.until(lambda: not gateway.fleet.pools[0].endpoints)
            again = gateway.channel.unary_unary(UNARY)(b"again")
            await until_waiting(gateway, 1)
            found.append("127.0.0.1")
            assert await again == b"again"


async def test_waiting_for_a_pool_to_wake_is_bounded() -> None:
    async def nothing(_host: str) -> list[str]:
        return []

    dns = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": ["dns:///ocr:1"]}
    async with running(dns, wait=False, resolver=nothing, wake_wait_s=0.1) as gateway:
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
        assert value(gateway, "inkwell_gateway_refused_total", pool="ocr-cpu", reason="NO_READY_ENDPOINT") == 1
    async with running(dns, wait=False, resolver=nothing, wake_wait_s=0.0) as gateway:
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
        assert value(gateway, "inkwell_gateway_wait_seconds_count", pool="ocr-cpu") == 0


async def test_a_call_that_waits_goes_elsewhere_when_its_pool_is_lost() -> None:
    async with backends(2) as (cuda, cpu):
        cuda.behaviour = turnstile = Turnstile()
        async with running(
            pool("on-cuda", cuda, hardware="cuda"),
            pool("on-cpu", cpu),
            limit_initial=1,
            limit_least=1,
            limit_most=1,
        ) as gateway:
            first = gateway.channel.unary_unary(UNARY)(b"first")
            await turnstile.until(1)
            waits = gateway.channel.unary_unary(UNARY)(b"waits")
            await until_waiting(gateway, 1, "on-cuda")
            await cuda.set_ready(False)
            assert await waits == b"waits"
            assert dict(await waits.initial_metadata())["inkwell-pool"] == "on-cpu"
            turnstile.let_go()
            assert await first == b"first"


async def test_a_call_that_waits_is_kept_while_its_only_endpoint_restarts() -> None:
    async with backends(1) as (only,), full(only) as (gateway, turnstile, first):
        waits = gateway.channel.unary_unary(UNARY)(b"waits")
        await until_waiting(gateway, 1)
        await only.set_ready(False)
        await gateway.until_state(only, State.NOT_READY)
        turnstile.let_go()
        assert await first == b"first"
        await until_waiting(gateway, 1)
        assert only.call_count == 1
        await only.set_ready(True)
        await turnstile.until(2)
        turnstile.let_go()
        assert await waits == b"waits"


async def test_an_unknown_priority_is_refused_with_what_is_known() -> None:
    async with backends(1) as (only,), running(pool("ocr-cpu", only)) as gateway:
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-priority", "urgent"),)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "accepted: low, normal, high" in (error.details() or "")
        assert only.call_count == 0


async def test_what_is_offered_beyond_capacity_is_refused_at_the_door_and_comes_back() -> None:
    # An endpoint of two workers, each call 20 ms of theirs, and forty callers who call again when they are told to.
    workers = asyncio.Semaphore(2)

    async def work(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        request = await anext(aiter(requests))
        async with workers:
            await asyncio.sleep(0.02)
        yield request

    async with backends(1) as (only,):
        only.behaviour = work
        async with running(pool("ocr-cpu", only), limit_initial=4, limit_least=2, queue_limit=8) as gateway:
            done = 0
            reasons: set[str] = set()

            async def caller() -> None:
                nonlocal done
                while done < 60:
                    try:
                        await gateway.channel.unary_unary(UNARY)(b"a", timeout=60)
                        done += 1
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017 - nothing else is
                        reasons.add(detail(error, error_details_pb2.ErrorInfo()).reason)
                        wait = detail(error, error_details_pb2.RetryInfo()).retry_delay
                        await asyncio.sleep(wait.ToMilliseconds() / 1000)

            await asyncio.gather(*(caller() for _ in range(40)))
            assert reasons <= {"QUEUE_FULL", "CALLER_QUEUE_FULL", "WAIT_TOO_LONG"}
            assert reasons
            await gateway.idle()
            # Whoever was refused never reached the endpoint.
            assert only.call_count == done
            assert gateway.endpoint(only).in_flight == 0
