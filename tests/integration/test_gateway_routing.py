"""Where calls go: hardware preference, load, readiness, discovery; and what the gateway says of its fleet."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.endpoint import State
from tests.integration.test_gateway import detail, forever, outcome
from tests.support.backend import BIDI, DIFFUSION_STREAM, UNARY, Backend
from tests.support.gateway import Gateway, pool, running


@contextlib.asynccontextmanager
async def backends(count: int) -> AsyncIterator[list[Backend]]:
    started = [await Backend().start() for _ in range(count)]
    try:
        yield started
    finally:
        for backend in started:
            await backend.stop()


async def served_by(gateway: Gateway, wanted: str | None = None) -> str:
    call = gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", wanted),) if wanted else None)
    await call
    return str(dict(await call.initial_metadata())["inkwell-pool"])


async def test_calls_go_where_the_preference_says() -> None:
    async with (
        backends(2) as (cuda, cpu),
        running(
            pool("on-cpu", cpu, hardware="cpu"),
            pool("on-cuda", cuda, hardware="cuda"),
            defaults={"ocr": ["cuda", "cpu"]},
        ) as gateway,
    ):
        assert await served_by(gateway) == "on-cuda"
        assert await served_by(gateway, "cpu") == "on-cpu"
        assert await served_by(gateway, "cuda!") == "on-cuda"
        assert await served_by(gateway, "rocm, cpu") == "on-cpu"
        assert await served_by(gateway, "rocm") == "on-cuda"  # labels not listed come last, in the default order

        await cuda.set_ready(False)
        await gateway.until_state(cuda, State.NOT_READY)
        assert await served_by(gateway) == "on-cpu"
        assert await served_by(gateway, "cuda") == "on-cpu"
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "cuda!"),)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "on-cuda (1 not_ready)" in (error.details() or "")
        assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() == 1000

        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "rocm!"),)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "here are: cpu, cuda" in (error.details() or "")

        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "gpu"),)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        violation = detail(error, error_details_pb2.BadRequest()).field_violations[0]
        assert violation.field == "metadata.inkwell-hardware"
        assert "accepted: a list of cuda, rocm" in violation.description


async def test_services_keep_to_their_own_pools() -> None:
    async with (
        backends(2) as (reads, paints),
        running(pool("reads", reads), pool("paints", paints, service="diffusion")) as gateway,
    ):
        assert await served_by(gateway) == "reads"
        assert [m async for m in gateway.channel.unary_stream(DIFFUSION_STREAM)(b"x")] == [b"x"]
        assert (reads.call_count, paints.call_count) == (1, 1)


async def test_a_service_without_a_pool_is_refused_by_name() -> None:
    async with backends(1) as (only,), running(pool("reads", only)) as gateway:
        error = await outcome(gateway.channel.unary_stream(DIFFUSION_STREAM)(b"x"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "there is no pool 'diffusion'; here are: ocr" in (error.details() or "")


async def test_the_least_loaded_endpoint_is_given_the_call() -> None:
    async with backends(2) as (first, second), running(pool("ocr-cpu", first, second)) as gateway:
        held = []
        for _ in range(2):
            call = gateway.channel.stream_stream(BIDI)()
            await call.write(b"a")
            assert await call.read() == b"a"
            held.append(call)
        # One each; now the one that is left with none gets all short calls.
        assert (first.call_count, second.call_count) == (1, 1)
        released = dict(await held[0].initial_metadata())["inkwell-endpoint"]
        idle, busy = (first, second) if released == first.address else (second, first)
        await held[0].done_writing()
        assert await held[0].read() is grpc.aio.EOF
        while gateway.endpoint(idle).in_flight:  # its caller has its end a little before
            await listed(gateway)
        for _ in range(6):
            await served_by(gateway)
        assert (idle.call_count, busy.call_count) == (7, 1)
        held[1].cancel()


async def test_idle_endpoints_take_turns() -> None:
    async with backends(3) as three, running(pool("ocr-cpu", *three)) as gateway:
        for _ in range(9):
            await served_by(gateway)
        assert [backend.call_count for backend in three] == [3, 3, 3]


async def listed(gateway: Gateway, **filters: str) -> list[gateway_pb2.Pool]:
    stub = gateway_pb2_grpc.GatewayServiceStub(gateway.channel)
    return list((await stub.ListPools(gateway_pb2.ListPoolsRequest(**filters))).pools)


async def test_list_pools_shows_the_fleet_as_it_is() -> None:
    async with (
        backends(2) as (reads, paints),
        running(
            pool("reads", reads, hardware="cuda"), pool("paints", paints, service="diffusion", hardware="cpu")
        ) as gateway,
    ):
        reads.behaviour = forever
        call = gateway.channel.unary_unary(UNARY)(b"a")
        await reads.entered.wait()
        await paints.stop()
        await gateway.until_state(paints, State.UNREACHABLE)

        found = {p.name: p for p in await listed(gateway)}
        assert list(found) == ["reads", "paints"]
        assert (found["reads"].service, found["reads"].hardware) == ("ocr", "cuda")
        assert list(found["reads"].targets) == [reads.address]
        endpoint = found["reads"].endpoints[0]
        assert (endpoint.address, endpoint.state) == (reads.address, gateway_pb2.ENDPOINT_STATE_READY)
        assert (endpoint.in_flight_count, endpoint.call_count, endpoint.last_error) == (1, 1, "")
        gone = found["paints"].endpoints[0]
        assert gone.state == gateway_pb2.ENDPOINT_STATE_UNREACHABLE
        assert "UNAVAILABLE" in gone.last_error
        call.cancel()

        assert [p.name for p in await listed(gateway, service="ocr")] == ["reads"]
        assert [p.name for p in await listed(gateway, hardware="cpu")] == ["paints"]
        assert await listed(gateway, service="ocr", hardware="cpu") == []


@pytest.mark.parametrize(("field", "value"), [("service", "ocrr"), ("hardware", "gpu")])
async def test_list_pools_refuses_what_it_cannot_know(field: str, value: str) -> None:
    async with backends(1) as (only,), running(pool("reads", only)) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await listed(gateway, **{field: value})
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert value in (refused.value.details() or "")


async def test_health_follows_the_fleet() -> None:
    async with (
        backends(2) as (reads, paints),
        running(pool("reads", reads), pool("paints", paints, service="diffusion")) as gateway,
    ):
        health = health_pb2_grpc.HealthStub(gateway.channel)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

        def watch(service: str) -> Any:
            return aiter(health.Watch(health_pb2.HealthCheckRequest(service=service)))

        async def until(watched: Any, status: int) -> None:
            while (await anext(watched)).status != status:
                pass

        whole, ocr, diffusion, alive = (
            watch(name)
            for name in ("readiness", "inkwell.ocr.v1.OcrService", "inkwell.diffusion.v1.DiffusionService", "liveness")
        )
        for watched in (whole, ocr, diffusion):
            await until(watched, serving)
        await paints.set_ready(False)
        await until(diffusion, not_serving)
        await reads.stop()
        await until(ocr, not_serving)
        await until(whole, not_serving)
        assert (await anext(alive)).status == serving
        check = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert check.status == not_serving
        await paints.set_ready(True)
        await until(whole, serving)


async def test_a_gateway_without_a_ready_endpoint_starts_and_says_so() -> None:
    nowhere = {"name": "reads", "service": "ocr", "hardware": "cpu", "targets": ["127.0.0.1:1"]}
    async with running(nowhere, wait=False) as gateway:
        await gateway.until(lambda: gateway.fleet.pools[0].count(State.UNREACHABLE) == 1)
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
        health = health_pb2_grpc.HealthStub(gateway.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="readiness"))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


class Names:
    """A name server of one name; each address is one that the loopback network answers for."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.fails = False
        self.asked = asyncio.Event()

    async def __call__(self, host: str) -> list[str]:
        self.asked.set()
        assert host == "ocr.internal"
        if self.fails:
            raise OSError("name server is away")
        return self.addresses


async def test_names_are_resolved_again_and_leaving_endpoints_drained() -> None:
    names = Names("127.0.0.1")
    async with backends(1) as (first,):
        second = Backend()
        second.port = first.port
        await second.start(host="127.0.0.2")
        target = {
            "name": "reads", "service": "ocr", "hardware": "cpu", "targets": [f"dns:///ocr.internal:{first.port}"]
        }  # fmt: skip
        try:
            async with running(target, resolver=names, resolve_interval_s=0.05) as gateway:
                assert await served_by(gateway) == "reads"
                held = gateway.channel.stream_stream(BIDI)()
                await held.write(b"a")
                assert await held.read() == b"a"

                names.addresses = ["127.0.0.2"]
                reads = gateway.fleet.pools[0]
                await gateway.until(
                    lambda: (
                        [(e.address, e.state) for e in reads.endpoints] == [(f"127.0.0.2:{first.port}", State.READY)]
                    )
                )
                await served_by(gateway)
                assert second.call_count == 1
                # The call that is under way at the address that left goes on to its end.
                await held.write(b"b")
                assert await held.read() == b"b"
                await held.done_writing()
                assert await held.read() is grpc.aio.EOF
                assert await held.code() is grpc.StatusCode.OK

                # A name server that fails does not empty the pool.
                names.fails = True
                for _ in range(3):
                    names.asked.clear()
                    await names.asked.wait()
                await served_by(gateway)
                assert second.call_count == 2
        finally:
            await second.stop()


async def test_metrics_count_calls_by_pool_and_nothing_that_callers_make_up() -> None:
    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no")
        yield b""

    async with backends(1) as (only,), running(pool("reads", only)) as gateway:
        value = gateway.server.metrics.registry.get_sample_value
        method = UNARY[1:]
        await served_by(gateway)
        only.behaviour = refuse
        await outcome(gateway.channel.unary_unary(UNARY)(b"a"))
        await outcome(gateway.channel.unary_unary(UNARY)(b"a", metadata=(("inkwell-hardware", "gpu"),)))
        for i in range(3):
            await outcome(gateway.channel.unary_unary(f"/inkwell.ocr.v1.OcrService/Made{i}")(b"a"))
            await outcome(gateway.channel.unary_unary(f"/made.up{i}/Method")(b"a"))

        await gateway.idle()

        def calls(pool: str, method: str, code: str) -> float | None:
            return value("inkwell_gateway_requests_total", {"pool": pool, "method": method, "code": code})

        assert calls("reads", method, "OK") == 1
        assert calls("reads", method, "NOT_FOUND") == 1
        assert calls("none", method, "INVALID_ARGUMENT") == 1
        assert calls("reads", "inkwell.ocr.v1.OcrService/other", "UNIMPLEMENTED") == 3
        assert value("inkwell_gateway_endpoints", {"pool": "reads", "state": "ready"}) == 1
        assert value("inkwell_gateway_in_flight", {"pool": "reads"}) == 0
        labels = [s.labels.get("method", "") for m in gateway.server.metrics.registry.collect() for s in m.samples]
        assert not [label for label in labels if "ade" in label]
