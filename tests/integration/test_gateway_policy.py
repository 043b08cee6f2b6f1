"""Where calls go by what endpoints report, by the routes of the file, and by what an endpoint has refused."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from google.rpc import error_details_pb2

from inkwell.compiler.v1 import compiler_pb2
from inkwell.endpoint.v1 import endpoint_pb2
from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2
from services.gateway import config
from services.gateway.endpoint import State
from services.kit import errors, faults
from tests.integration.test_gateway import detail, outcome
from tests.support.backend import BIDI, UNARY, Backend
from tests.support.gateway import Gateway, pool, running
from tests.support.reporting_backend import ReportingBackend, report

COMPILE = "/inkwell.compiler.v1.CompilerService/Compile"


@contextlib.asynccontextmanager
async def reporting(*said: endpoint_pb2.Report) -> AsyncIterator[list[ReportingBackend]]:
    started = [ReportingBackend(each) for each in said]
    for backend in started:
        await backend.start()
    try:
        yield started
    finally:
        for backend in started:
            await backend.stop()


async def until_reported(gateway: Gateway, *backends: Backend) -> None:
    await gateway.until(lambda: all(gateway.endpoint(backend).report is not None for backend in backends))


async def route(gateway: Gateway, *pools: dict[str, Any], routes: list[dict[str, Any]]) -> None:
    """Use these routes from now on."""
    await gateway.fleet.apply(config.parse(json.dumps({"pools": pools, "routes": routes})))


def naming(model: str) -> bytes:
    return ocr_pb2.RecognizeRequest(model=model).SerializeToString()


async def served_by(gateway: Gateway, model: str = "", hardware: str | None = None) -> str:
    metadata = (("inkwell-hardware", hardware),) if hardware else None
    call = gateway.channel.unary_unary(UNARY)(naming(model), metadata=metadata)
    await call
    return str(dict(await call.initial_metadata())["inkwell-pool"])


def too_large_for(model: str) -> Any:
    """A behaviour: as a service with too little memory for that model."""

    async def behave(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        async for request in requests:
            if ocr_pb2.RecognizeRequest.FromString(request).model == model:
                await errors.abort(context, faults.too_large("model", "MODEL_TOO_LARGE", "9 GiB are more than 8"))
            yield request

    return behave


async def test_a_pool_has_only_the_endpoints_that_it_selects() -> None:
    async with reporting(report("cuda", gib=80), report("cuda", gib=16)) as (large, small):
        both = {"service": "ocr", "hardware": "cuda", "targets": [large.address, small.address]}
        big = {"name": "big", **both, "select": {"memory_gib": 40}}
        rest = {"name": "rest", **both, "select": {"memory_gib": 8, "compute_capability": "8.0"}}
        async with running(big, rest, wait=False) as gateway:

            def states() -> list[list[State]]:
                return [[e.state for e in p.endpoints] for p in gateway.fleet.pools]

            await gateway.until(lambda: states() == [[State.READY, State.NOT_SELECTED], [State.NOT_SELECTED] * 2])
            assert await served_by(gateway) == "big"
            unfit = gateway.fleet.pools[0].endpoints[1]
            assert unfit.last_error == "it has 16.0 GiB of memory, and 40 are needed"
            # What it reports changes, and with it its place.
            small.says(report("cuda", gib=16, capability="8.9"))
            await gateway.until(lambda: states()[1] == [State.NOT_SELECTED, State.READY])
            await large.set_ready(False)
            await gateway.until(lambda: states()[0][0] is State.NOT_READY)
            assert await served_by(gateway) == "rest"


async def test_a_machine_that_fell_back_to_its_cpu_is_not_given_calls_for_cuda() -> None:
    async with (
        reporting(report("cpu"), report("cpu")) as (broken, cpu),
        running(pool("on-cuda", broken, hardware="cuda"), pool("on-cpu", cpu), wait=False) as gateway,
    ):
        await gateway.until_state(broken, State.NOT_SELECTED)
        await gateway.until_state(cpu, State.READY)
        assert await served_by(gateway, hardware="cuda") == "on-cpu"
        call = gateway.channel.unary_unary(UNARY)(b"", metadata=(("inkwell-hardware", "cuda!"),))
        error = await outcome(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "on-cuda (1 not_selected)" in (error.details() or "")
        stub = gateway_pb2_grpc.GatewayServiceStub(gateway.channel)
        listed = (await stub.ListPools(gateway_pb2.ListPoolsRequest(hardware="cuda"))).pools[0].endpoints[0]
        assert listed.state == gateway_pb2.ENDPOINT_STATE_NOT_SELECTED
        assert listed.last_error == "it reports hardware cpu, and this pool is for cuda"


async def test_a_call_that_names_a_model_goes_where_it_is_known() -> None:
    async with (
        reporting(report(models=("small",)), report("xpu", models=("small", "large"))) as (first, second),
        running(pool("first", first, hardware="cpu"), pool("second", second, hardware="xpu")) as gateway,
    ):
        await until_reported(gateway, first, second)
        assert await served_by(gateway, "small") == "first"
        assert await served_by(gateway, "large") == "second"
        # Nobody knows it: the service is the one to say so.
        assert await served_by(gateway, "unheard-of") == "first"
        first.says(report(models=("small", "large")))
        await gateway.until(lambda: len(gateway.endpoint(first).report.models) == 2)  # type: ignore[union-attr]
        assert await served_by(gateway, "large") == "first"


async def test_a_model_that_is_too_large_for_one_pool_is_served_by_another_without_the_caller_knowing() -> None:
    async with (
        reporting(report("cuda", models=("large",)), report("cpu", models=("large",))) as (gpu, cpu),
        running(pool("gpu", gpu, hardware="cuda"), pool("cpu", cpu)) as gateway,
    ):
        await until_reported(gateway, gpu, cpu)
        gpu.behaviour = too_large_for("large")
        assert await served_by(gateway, "large") == "cpu"
        assert (gpu.call_count, cpu.call_count) == (1, 1)
        # Once is enough to know; and it says nothing of other models.
        assert await served_by(gateway, "large") == "cpu"
        assert await served_by(gateway, "small") == "gpu"
        assert (gpu.call_count, cpu.call_count) == (2, 2)
        value = gateway.server.metrics.registry.get_sample_value
        assert value("inkwell_gateway_retries_total", {"pool": "gpu", "reason": "cannot"}) == 1
        # A new report may mean another machine, or more memory for models: it is asked again.
        gpu.behaviour = too_large_for("other")
        gpu.says(report("cuda", gib=80, models=("large",)))
        await gateway.until(lambda: not gateway.endpoint(gpu).too_large)
        assert await served_by(gateway, "large") == "gpu"


async def test_a_model_that_is_too_large_for_all_is_refused_with_the_service_s_own_words() -> None:
    async with (
        reporting(report("cuda"), report("cpu")) as (gpu, cpu),
        running(pool("gpu", gpu, hardware="cuda"), pool("cpu", cpu)) as gateway,
    ):
        gpu.behaviour = cpu.behaviour = too_large_for("large")
        for _ in range(2):
            error = await outcome(gateway.channel.unary_unary(UNARY)(naming("large")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "MODEL_TOO_LARGE"


async def test_needs_of_a_route_are_met_or_the_call_is_refused_with_what_is_lacking() -> None:
    async with reporting(report("cuda", gib=16), report("cuda", gib=80)) as (small, large):
        pools = pool("small", small, hardware="cuda"), pool("large", large, hardware="cuda")
        async with running(*pools) as gateway:
            await until_reported(gateway, small, large)
            needs = {"service": "ocr", "models": ["large-*"], "needs": {"memory_gib": 40}}
            await route(gateway, *pools, routes=[needs])
            assert {await served_by(gateway) for _ in range(4)} == {"small", "large"}
            assert {await served_by(gateway, "large-1") for _ in range(4)} == {"large"}

            await large.set_ready(False)
            await gateway.until_state(large, State.NOT_READY)
            error = await outcome(gateway.channel.unary_unary(UNARY)(naming("large-1")))
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # it may come back

            large.says(report("cuda", gib=20))
            await gateway.until(lambda: gateway.endpoint(large).report.hardware.memory_bytes < 40 << 30)  # type: ignore[union-attr]
            error = await outcome(gateway.channel.unary_unary(UNARY)(naming("large-1")))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "REQUIREMENTS_NOT_MET"
            assert f"{small.address}: it has 16.0 GiB of memory, and 40 are needed" in (error.details() or "")


async def test_a_stream_of_requests_is_routed_by_the_model_in_its_first() -> None:
    async with reporting(report(), report("xpu")) as (cpu, xpu):
        pools = pool("cpu", cpu), pool("xpu", xpu, hardware="xpu")
        async with running(*pools) as gateway:
            await route(gateway, *pools, routes=[{"service": "ocr", "models": ["large"], "only": ["xpu"]}])
            for model, served in (("large", xpu), ("small", cpu)):
                call = gateway.channel.stream_stream(BIDI)()
                sent = [ocr_pb2.BatchRecognizeRequest(id=str(i), model=model).SerializeToString() for i in range(3)]
                for message in sent:
                    await call.write(message)
                await call.done_writing()
                assert [message async for message in call] == sent
                assert dict(await call.initial_metadata())["inkwell-endpoint"] == served.address
            # A caller that says nothing at all still gets its end.
            call = gateway.channel.stream_stream(BIDI)()
            await call.done_writing()
            assert [message async for message in call] == []


async def test_a_canary_gets_its_share_and_its_calls_go_on_without_it() -> None:
    async with reporting(report(), report()) as (stable, canary):
        pools = pool("stable", stable), pool("canary", canary)
        async with running(*pools) as gateway:
            await route(gateway, *pools, routes=[{"service": "ocr", "weights": {"stable": 9, "canary": 1}}])
            for _ in range(50):
                await served_by(gateway)
            assert (stable.call_count, canary.call_count) == (45, 5)
            await canary.stop()
            for _ in range(20):
                assert await served_by(gateway) == "stable"


async def test_compiling_for_tensorrt_finds_the_machine_that_can() -> None:
    def compiling(target: compiler_pb2.Target.ValueType) -> bytes:
        return compiler_pb2.CompileRequest(model="m", target=target).SerializeToString()

    async with reporting(
        report("cpu"), report("cuda", runtimes=("torch",)), report("cuda", runtimes=("torch", "tensorrt"))
    ) as (cpu, without, with_it):
        seen: list[Backend] = []
        for backend in (cpu, without, with_it):
            _compiles(backend, seen)
        async with running(
            pool("cpu", cpu, service="compiler"),
            pool("without", without, service="compiler", hardware="cuda"),
            pool("with", with_it, service="compiler", hardware="cuda"),
        ) as gateway:
            await until_reported(gateway, cpu, without, with_it)
            call = gateway.channel.unary_unary(COMPILE)
            await call(compiling(compiler_pb2.TARGET_ONNX))
            for _ in range(3):
                await call(compiling(compiler_pb2.TARGET_TENSORRT), metadata=(("inkwell-hardware", "cpu"),))
            assert seen == [cpu, with_it, with_it, with_it]
            error = await outcome(
                call(compiling(compiler_pb2.TARGET_TENSORRT), metadata=(("inkwell-hardware", "cpu!"),))
            )
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            with_it.says(report("cuda", runtimes=("torch",)))
            await gateway.until(lambda: "tensorrt" not in gateway.endpoint(with_it).report.runtimes)  # type: ignore[union-attr]
            error = await outcome(call(compiling(compiler_pb2.TARGET_TENSORRT)))
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "REQUIREMENTS_NOT_MET"


def _compiles(backend: ReportingBackend, seen: list[Backend]) -> None:
    """Have the backend answer Compile too, and note who did."""
    answer = backend.service

    async def compile_(request: bytes, _context: Any) -> bytes:
        seen.append(backend)
        return b""

    def service(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return grpc.unary_unary_rpc_method_handler(compile_) if details.method == COMPILE else answer(details)

    setattr(backend, "service", service)  # noqa: B010 - mypy takes it for the method


async def test_list_pools_shows_what_endpoints_report() -> None:
    said = report("cuda", device="NVIDIA L4", gib=22, capability="8.9", runtimes=("torch", "triton"), loaded=("a",))
    async with reporting(said) as (only,), running(pool("reads", only, hardware="cuda")) as gateway:
        await until_reported(gateway, only)
        stub = gateway_pb2_grpc.GatewayServiceStub(gateway.channel)
        shown = (await stub.ListPools(gateway_pb2.ListPoolsRequest())).pools[0].endpoints[0]
        assert (shown.device, shown.memory_bytes, shown.compute_capability) == ("NVIDIA L4", 22 << 30, "8.9")
        assert (list(shown.runtimes), list(shown.loaded_models)) == (["torch", "triton"], ["a@v1"])
        assert shown.version


async def test_an_older_service_without_reports_is_what_its_pool_says() -> None:
    older = await Backend().start()
    try:
        async with running(pool("on-cuda", older, hardware="cuda")) as gateway:
            async with asyncio.timeout(60):
                assert await served_by(gateway, "any", "cuda!") == "on-cuda"
            assert gateway.endpoint(older).report is None
    finally:
        await older.stop()
