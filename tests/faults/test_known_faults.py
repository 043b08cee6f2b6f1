"""Faults that other servers were found to have, one test each; the reports are named where the fault is theirs.

Two more have their place elsewhere: that a caller's disconnect is seen, and its slot freed, while the engine computes
(retries would pile up behind abandoned work): test_released.py, `test_when_a_caller_is_killed`; and that the gateway's
pools outlive its calls: `test_when_a_server_drains` there.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import inkwell
from services import local
from services.kit.metrics import Metrics
from services.kit.server import ServiceServer
from services.kit.settings import ServiceSettings
from tests.integration.test_gateway_routing import backends
from tests.support.gateway import pool, running

IMAGES = [path.read_bytes() for path in sorted(local.SAMPLES.glob("*.png"))[:4]]
PROMPTS = ["grinning face", "red heart", "sun", "snowman"]


@pytest.fixture
async def client(fleet: dict[str, local.Service]) -> AsyncIterator[inkwell.AsyncClient]:
    async with inkwell.AsyncClient(fleet["gateway"].address, timeout_s=100) as opened:
        yield opened


async def first_event(events: AsyncGenerator[Any, None], kind: type) -> None:
    """Return once it was told an event of that kind."""
    async for event in events:
        if isinstance(event, kind):
            return
    raise AssertionError(f"it ended without {kind.__name__}")


async def last_of(events: AsyncGenerator[Any, None]) -> Any:
    return [event async for event in events][-1]


async def test_cancelling_readings_leaves_their_neighbours_in_the_batch_their_own(client: inkwell.AsyncClient) -> None:
    """MLServer: the others of a batch, one member of which was cancelled, were never answered."""
    alone = [(await client.read(image)).text for image in IMAGES]
    calls = [client.read_stream(image) for image in IMAGES * 2]
    readings = [asyncio.create_task(last_of(call)) for call in calls[1::2]]
    leaving = [asyncio.create_task(first_event(call, object)) for call in calls[::2]]
    await asyncio.gather(*leaving)
    await asyncio.gather(*(call.aclose() for call in calls[::2]))
    assert [(await reading).reading.text for reading in readings] == (alone * 2)[1::2]


async def test_cancelling_pictures_leaves_their_neighbours_in_the_batch_their_own(client: inkwell.AsyncClient) -> None:
    alone = [(await client.paint(prompt, steps=6, seed=1))[0].content for prompt in PROMPTS]
    calls = [client.paint_stream(prompt, steps=6, seed=1) for prompt in PROMPTS]
    painting = [asyncio.create_task(last_of(call)) for call in calls[1::2]]
    await asyncio.gather(*(first_event(call, inkwell.Progress) for call in calls[::2]))
    await asyncio.gather(*(call.aclose() for call in calls[::2]))
    done = [(await result).pictures[0].content for result in painting]
    assert done == alone[1::2]


async def test_calls_after_one_that_was_aborted_are_served(client: inkwell.AsyncClient) -> None:
    """vLLM-Omni #3167: after one abort, all later calls were aborted too."""
    for _ in range(3):
        painting = client.paint_stream("grinning face", steps=200)
        await first_event(painting, inkwell.Progress)
        await painting.aclose()
        reading = client.read_stream(IMAGES[0])
        await first_event(reading, object)
        await reading.aclose()
        assert await client.paint("grinning face", steps=1)
        assert (await client.read(IMAGES[0])).text


async def test_a_server_answers_while_its_engine_computes(
    fleet: dict[str, local.Service], client: inkwell.AsyncClient
) -> None:
    """Services that compute on their event loop cannot see that a caller has gone, nor answer a probe."""
    painting = client.paint_stream("grinning face", steps=200)
    await first_event(painting, inkwell.Progress)
    async with grpc.aio.insecure_channel(fleet["diffusion"].address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(20):
            answer = await check(health_pb2.HealthCheckRequest(service="readiness"), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(inkwell.InvalidRequest):
        await client.paint("grinning face", steps=0)
    # All that came before the picture was done.
    assert isinstance(await anext(painting), inkwell.Progress)
    await painting.aclose()


async def test_stopping_waits_until_handlers_have_cleaned_up() -> None:
    """grpc #37239: stop() of grpc.aio returns before the `finally` blocks of cancelled handlers have run."""
    order: list[str] = []
    entered = asyncio.Event()

    async def hold(_request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(20):
                await asyncio.sleep(0.001)  # as one that gives something back to another process
            order.append("handler ended")
        return b""

    def register(server: grpc.aio.Server) -> list[str]:
        handlers = {"Hold": grpc.unary_unary_rpc_method_handler(hold)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Held", handlers),))
        return ["test.Held"]

    @contextlib.asynccontextmanager
    async def lifespan(_health: Any) -> AsyncIterator[None]:
        yield
        order.append("what handlers need was closed")

    server = ServiceServer(
        "test", ServiceSettings(), metrics=Metrics("test"), host=None, register=register, lifespan=lifespan
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary("/test.Held/Hold")(b"")
        await entered.wait()
        await server.stop(0)
        assert order == ["handler ended", "what handlers need was closed"]
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_cancelling_crosses_everything_between_the_sdk_and_the_endpoint() -> None:
    """OpenTelemetry's aio client interceptor lost cancellation (contrib #3271)."""

    async def held(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    async with backends(1) as (backend,), running(pool("ocr-cpu", backend)) as gateway:
        backend.behaviour = held
        async with inkwell.AsyncClient(f"127.0.0.1:{gateway.server.port}", timeout_s=100) as client:
            reading = asyncio.create_task(client.read(IMAGES[0]))
            await backend.entered.wait()
            reading.cancel()
            await backend.cancelled.wait()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await gateway.idle()
            assert gateway.endpoint(backend).in_flight == 0
