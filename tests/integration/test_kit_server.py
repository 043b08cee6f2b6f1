"""A server of the kit as its callers and its operators see it, for all four kinds of methods."""

import asyncio
import contextlib
import gc
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from inkwell import channel as sdk
from services.kit import faults
from services.kit.call import priority_of
from services.kit.metrics import Metrics, MetricsPage
from services.kit.server import ServiceServer
from services.kit.settings import ServiceSettings
from tests.faults.test_mutated import HTTP2, PATH, hear

Text = wrappers_pb2.StringValue
LIMIT = 4096


@dataclass
class Behaviour:
    """What the handlers do with a word, and what they saw."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def act(self, word: str, context: grpc.aio.ServicerContext) -> str:
        match word:
            case "fault":
                raise faults.overloaded("QUEUE_FULL", "3 calls wait and the limit is 3", retry_after_ms=250)
            case "defect":
                raise ZeroDivisionError("secret detail")
            case "flood":
                return "x" * 100_000
            case "priority":
                return priority_of(context).name
            case "hold":
                self.entered.set()
                try:
                    await self.release.wait()
                finally:
                    self.left.set()
        return word.upper()


def handlers(b: Behaviour) -> grpc.GenericRpcHandler:
    async def one(request: Any, context: Any) -> Any:
        return Text(value=await b.act(request.value, context))

    async def many(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(1000 if request.value == "flood" else 2):
            yield Text(value=await b.act(request.value, context))

    async def sum_up(requests: Any, context: Any) -> Any:
        return Text(value=" ".join([await b.act(r.value, context) async for r in requests]))

    async def each(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield Text(value=await b.act(request.value, context))

    coding = {"request_deserializer": Text.FromString, "response_serializer": Text.SerializeToString}
    return grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            "One": grpc.unary_unary_rpc_method_handler(one, **coding),
            "Many": grpc.unary_stream_rpc_method_handler(many, **coding),
            "Sum": grpc.stream_unary_rpc_method_handler(sum_up, **coding),
            "Each": grpc.stream_stream_rpc_method_handler(each, **coding),
        },
    )


@dataclass
class Running:
    server: ServiceServer
    channel: grpc.aio.Channel
    behaviour: Behaviour

    async def call(self, kind: str, word: str, **options: Any) -> str:
        path = f"/test.Echo/{kind}"
        coding = {"request_serializer": Text.SerializeToString, "response_deserializer": Text.FromString}
        request = Text(value=word)
        match kind:
            case "One":
                return str((await self.channel.unary_unary(path, **coding)(request, **options)).value)
            case "Many":
                return " ".join([m.value async for m in self.channel.unary_stream(path, **coding)(request, **options)])
            case "Sum":
                return str((await self.channel.stream_unary(path, **coding)(iter([request]), **options)).value)
            case _:
                stream = self.channel.stream_stream(path, **coding)(iter([request]), **options)
                return " ".join([m.value async for m in stream])


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    behaviour = Behaviour()

    def register(server: grpc.aio.Server) -> list[str]:
        server.add_generic_rpc_handlers((handlers(behaviour),))
        return ["test.Echo"]

    settings = ServiceSettings(max_message_bytes=LIMIT)
    server = ServiceServer("test", settings, metrics=Metrics("test"), host=None, register=register)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Running(server, channel, behaviour)
    await server.stop(0)


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = rpc_status.from_call(error)
    assert status is not None, "the error carries no google.rpc.Status"
    found: dict[str, Any] = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        packed.Unpack(message)
        found[name] = message
    return found


KINDS = ["One", "Many", "Sum", "Each"]


@pytest.mark.parametrize("kind", KINDS)
async def test_answers(running: Running, kind: str) -> None:
    assert await running.call(kind, "word") in ("WORD", "WORD WORD")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_becomes_a_status_with_details(running: Running, kind: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await running.call(kind, "fault")
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(failed.value)
    assert found["ErrorInfo"].reason == "QUEUE_FULL"
    assert found["ErrorInfo"].domain == "inkwell.dev"
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 250
    assert dict(failed.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_defect_is_internal_and_tells_nothing(running: Running, kind: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await running.call(kind, "defect", metadata=(("x-request-id", "abc-1"),))
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(failed.value.details())
    assert "abc-1" in str(failed.value.details())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_over_the_limit_names_the_limit(running: Running, kind: str) -> None:
    for size in (LIMIT + 1, 3 * LIMIT):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.call(kind, "x" * size)
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(LIMIT) in str(failed.value.details())
        assert details(failed.value)["ErrorInfo"].reason == "MESSAGE_TOO_LARGE"
    # Far beyond, gRPC refuses by itself before the message is in memory.
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await running.call(kind, "x" * (10 * LIMIT))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await running.call(kind, "word")


async def test_a_message_that_does_not_parse_is_the_callers_mistake(running: Running) -> None:
    call = running.channel.unary_unary("/test.Echo/One")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call(b"\xff\xff\xff")
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(failed.value)["BadRequest"].field_violations[0].field == "message"


async def test_priority_is_read_from_metadata(running: Running) -> None:
    assert await running.call("One", "priority") == "NORMAL"
    assert await running.call("One", "priority", metadata=(("inkwell-priority", "high"),)) == "HIGH"
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await running.call("One", "priority", metadata=(("inkwell-priority", "urgent"),))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "low, normal, high" in str(failed.value.details())


async def test_health_liveness_and_watch(running: Running) -> None:
    stub = health_pb2_grpc.HealthStub(running.channel)
    status = health_pb2.HealthCheckResponse
    assert (await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == status.SERVING
    assert (await stub.Check(health_pb2.HealthCheckRequest(service="readiness"))).status == status.NOT_SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == status.NOT_SERVING
    running.server.health.set("readiness", True)
    assert (await watch.read()).status == status.SERVING
    watch.cancel()


async def test_reflection_lists_the_services(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([ask]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"test.Echo", "grpc.health.v1.Health"} <= names


def metric(page: str, name: str, *labels: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith(name) and all(part in line for part in labels)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def test_calls_are_counted_by_how_they_ended(running: Running) -> None:
    await running.call("One", "word")
    with contextlib.suppress(grpc.aio.AioRpcError):
        await running.call("Many", "fault")
    with contextlib.suppress(grpc.aio.AioRpcError):
        await running.call("One", "x" * (LIMIT + 1))
    page_server = MetricsPage(running.server.metrics.registry, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{page_server.port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    await asyncio.to_thread(page_server.close)
    assert metric(page, "inkwell_requests_total{", 'method="/test.Echo/One"', 'code="OK"') == 1
    assert metric(page, "inkwell_requests_total{", 'method="/test.Echo/Many"', 'code="RESOURCE_EXHAUSTED"') == 1
    assert metric(page, "inkwell_requests_total{", 'method="/test.Echo/One"', 'code="RESOURCE_EXHAUSTED"') == 1
    assert metric(page, "inkwell_requests_in_flight") == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_caller_that_leaves_ends_its_handler(running: Running, kind: str) -> None:
    call = asyncio.create_task(running.call(kind, "hold"))
    await running.behaviour.entered.wait()
    call.cancel()
    await running.behaviour.left.wait()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def test_callers_that_leave_in_the_middle_of_a_write_do_no_harm(running: Running) -> None:
    coding = {"request_serializer": Text.SerializeToString, "response_deserializer": Text.FromString}
    for _ in range(30):
        call = running.channel.unary_stream("/test.Echo/Many", **coding)(Text(value="flood"))
        assert (await call.read()).value
        call.cancel()
    await running.server._boundary.wait_idle()
    gc.collect()
    assert await running.call("One", "word") == "WORD"


@pytest.mark.parametrize("kind", KINDS)
async def test_draining_finishes_what_is_admitted_and_refuses_the_rest(running: Running, kind: str) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service="liveness"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    held = asyncio.create_task(running.call(kind, "hold"))
    await running.behaviour.entered.wait()
    stopping = asyncio.create_task(running.server.stop(30))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await until(lambda: running.server._boundary.draining)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.call("One", "word")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(refused.value)["ErrorInfo"].reason == "DRAINING"
    assert not stopping.done()
    running.behaviour.release.set()
    assert "HOLD" in await held
    await stopping


@pytest.mark.parametrize("kind", ["Sum", "Each"])
async def test_a_caller_that_is_refused_while_it_writes_is_told_why(
    running: Running, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc.aio, whose write failed, would say INTERNAL."""
    for patience in ("_PAUSE_S", "_HEARD_OUT_WITHIN_S"):
        monkeypatch.setattr(f"services.kit.boundary.{patience}", 60.0)
    running.server._boundary.draining = True
    make = running.channel.stream_unary if kind == "Sum" else running.channel.stream_stream
    # More than is taken of a stream before somebody reads it.
    requests = [Text(value="x" * 3000)] * 100
    call = make(f"/test.Echo/{kind}", Text.SerializeToString, Text.FromString)(iter(requests))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (call if kind == "Sum" else call.read())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(refused.value)["ErrorInfo"].reason == "DRAINING"


async def test_a_caller_that_is_refused_while_it_waits_for_an_answer_is_told_so(running: Running) -> None:
    running.server._boundary.draining = True
    call = running.channel.stream_stream("/test.Echo/Each", Text.SerializeToString, Text.FromString)()
    await call.write(Text(value="word"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert details(refused.value)["ErrorInfo"].reason == "DRAINING"
    call.cancel()


async def test_callers_that_are_refused_keep_no_server_from_ending(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patience in ("_PAUSE_S", "_HEARD_OUT_WITHIN_S"):
        monkeypatch.setattr(f"services.kit.boundary.{patience}", 600.0)
    monkeypatch.setattr("services.kit.server._REFUSED_WITHIN_S", 0.1)
    running.server._boundary.draining = True
    call = running.channel.stream_stream("/test.Echo/Each", Text.SerializeToString, Text.FromString)()
    await call.write(Text(value="word"))
    await until(lambda: not running.server._boundary._refused.none.is_set())
    async with asyncio.timeout(60):
        await running.server.stop(grace_s=600)
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


async def test_when_the_grace_is_over_what_is_left_is_cancelled(running: Running) -> None:
    held = asyncio.create_task(running.call("One", "hold"))
    await running.behaviour.entered.wait()
    await running.server.stop(0)
    assert running.behaviour.left.is_set()
    with pytest.raises(grpc.aio.AioRpcError):
        await held


async def test_a_path_that_is_no_text_ends_no_call_and_the_server_listens_again(running: Running) -> None:
    """It ends the loop of grpc.aio that takes calls, and closes the port."""
    address = f"127.0.0.1:{running.server.port}"
    held = asyncio.create_task(running.call("One", "hold"))
    await running.behaviour.entered.wait()
    for _ in range(3):
        await asyncio.to_thread(hear, address, HTTP2.replace(PATH, PATH[:-1] + b"\xff"))
        # The SDK's: a call that meets the old server's end is made again.
        async with sdk.open_aio_channel(address, None) as channel:
            fresh = Running(running.server, channel, running.behaviour)
            assert await fresh.call("One", "word", wait_for_ready=True, timeout=60) == "WORD"
    running.behaviour.release.set()
    assert await held == "HOLD"


async def test_a_taken_port_is_an_error_at_start(running: Running) -> None:
    settings = ServiceSettings(port=running.server.port)
    second = ServiceServer("test", settings, metrics=Metrics("test"), host=None, register=lambda server: [])
    with pytest.raises(OSError, match=str(running.server.port)):
        await second.start()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the server tells nobody at this moment
        await asyncio.sleep(0)
