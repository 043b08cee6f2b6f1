"""The SDK over connections that break: calls sent again are done once, and watches go on where they stood."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

import inkwell
from inkwell.converters import operation as converters
from inkwell.ocr.v1 import ocr_pb2
from services.kit.metrics import Metrics
from services.kit.repeats import Repeats
from services.kit.server import ServiceServer
from services.kit.settings import RepeatSettings
from tests.support.child_work import Todo
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.gateway import pool, running
from tests.support.operations import Number, serving

SERVICE = "inkwell.ocr.v1.OcrService"


@dataclass
class Reader:
    """Reads b"say TEXT" as TEXT, once it may, and counts."""

    read: list[str] = field(default_factory=list)
    left: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def recognize(self, request: Any, context: Any) -> Any:
        text = request.image.content.decode().removeprefix("say ")
        self.read.append(text)
        self.entered.set()
        try:
            await self.release.wait()
        finally:
            self.left += 1
            self.ended.set()
        hypothesis = ocr_pb2.Hypothesis(text=text, confidence=1)
        recognition = ocr_pb2.Recognition(hypotheses=[hypothesis], model="pen", confidence=1)
        return ocr_pb2.RecognizeResponse(recognition=recognition)


@dataclass
class Service:
    server: ServiceServer
    reader: Reader

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def answer_lost_in(self, proxy: FaultProxy) -> None:
        """Answer the call that has come in, and cut its connection before the answer has passed the proxy."""
        await self.reader.entered.wait()
        proxy.hold()
        self.reader.release.set()
        await self.server._boundary.wait_idle()
        proxy.cut()
        await proxy.heal()

    def repeated(self, outcome: str) -> float:
        return self.server.metrics.registry.get_sample_value("inkwell_repeated_total", {"outcome": outcome}) or 0.0


@contextlib.asynccontextmanager
async def service(**options: Any) -> AsyncIterator[Service]:
    """The kit's server, with a reader in place of an engine."""
    reader, metrics, settings = Reader(), Metrics("ocr"), RepeatSettings(**options)

    def register(server: grpc.aio.Server) -> list[str]:
        handler = grpc.unary_unary_rpc_method_handler(
            reader.recognize,
            request_deserializer=ocr_pb2.RecognizeRequest.FromString,
            response_serializer=ocr_pb2.RecognizeResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Recognize": handler}),))
        return [SERVICE]

    @contextlib.asynccontextmanager
    async def ready(health: Any) -> AsyncIterator[None]:
        for name in ("", "readiness"):
            health.set(name, True)
        yield

    repeats = Repeats((f"/{SERVICE}/Recognize",), settings, metrics)
    server = ServiceServer(
        "ocr", settings, metrics=metrics, host=None, register=register, lifespan=ready, interceptors=[repeats]
    )
    await server.start()
    try:
        yield Service(server, reader)
    finally:
        reader.release.set()
        await server.stop(0)


async def test_a_reading_whose_answer_was_lost_is_not_read_again() -> None:
    async with (
        service() as ocr,
        fault_proxy(ocr.address) as proxy,
        inkwell.AsyncClient(proxy.address, timeout_s=20) as client,
    ):
        reading = asyncio.create_task(client.read(b"say lost"))
        await ocr.answer_lost_in(proxy)
        assert (await reading).text == "lost"
        assert ocr.reader.read == ["lost"]
        assert ocr.repeated("answered") == 1
        # Another call for the same is another call.
        assert (await client.read(b"say lost")).text == "lost"
        assert ocr.reader.read == ["lost", "lost"]


async def test_a_gateways_retry_of_a_reading_whose_answer_was_lost_is_not_read_again() -> None:
    async with (
        service() as ocr,
        fault_proxy(ocr.address) as proxy,
        running(pool("ocr-cpu", proxy)) as gateway,
        inkwell.AsyncClient(f"127.0.0.1:{gateway.server.port}", timeout_s=20) as client,
    ):
        reading = asyncio.create_task(client.read(b"say lost"))
        await ocr.answer_lost_in(proxy)
        assert (await reading).text == "lost"
        assert ocr.reader.read == ["lost"]
        assert ocr.repeated("answered") == 1


async def test_a_reading_whose_connection_broke_stops_and_is_begun_again() -> None:
    async with (
        service() as ocr,
        fault_proxy(ocr.address) as proxy,
        inkwell.AsyncClient(proxy.address, timeout_s=20) as client,
    ):
        reading = asyncio.create_task(client.read(b"say again"))
        await ocr.reader.entered.wait()
        ocr.reader.entered.clear()
        proxy.cut()
        await ocr.reader.entered.wait()
        ocr.reader.release.set()
        assert (await reading).text == "again"
        assert (ocr.reader.read, ocr.reader.left) == (["again", "again"], 2)


async def test_the_reading_of_a_client_that_vanished_ends() -> None:
    async with (
        service(client_keepalive_time_s=1, client_keepalive_timeout_s=0.25) as ocr,
        fault_proxy(ocr.address) as proxy,
        inkwell.AsyncClient(proxy.address, timeout_s=None) as client,
    ):
        reading = asyncio.create_task(client.read(b"say nobody listens"))
        await ocr.reader.entered.wait()
        proxy.half_open("caller")
        await ocr.reader.ended.wait()
        await ocr.server._boundary.wait_idle()
        assert not ocr.reader.release.is_set()
        reading.cancel()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test service's operations carry numbers."""
    monkeypatch.setitem(converters.KNOWN, Number.DESCRIPTOR.full_name, (Number, lambda number: number.value))


BREAKS: dict[str, Callable[[FaultProxy], None]] = {
    "cut": FaultProxy.cut,
    "reset": FaultProxy.reset,
    "half-open": lambda proxy: proxy.half_open("server"),
}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("fault", BREAKS)
async def test_a_watch_goes_on_where_its_connection_broke(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that vanished is found out within a second, not the 50 s of the SDK.
    monkeypatch.setattr("inkwell.channel.KEEPALIVE_S", 0.25)
    monkeypatch.setattr("inkwell.channel.KEEPALIVE_TIMEOUT_S", 0.25)
    todo = Todo(steps=3, wait_for=str(tmp_path / "go"))
    async with (
        serving(tmp_path / "operations.sqlite") as caller,
        fault_proxy(f"127.0.0.1:{caller.port}") as proxy,
        inkwell.AsyncClient(proxy.address) as client,
    ):
        operation = await client.operation((await caller.begin(todo)).name)
        heard: list[inkwell.OperationEvent] = []
        begun = asyncio.Event()

        def hear(event: inkwell.OperationEvent) -> None:
            heard.append(event)
            if isinstance(event, inkwell.Started):
                begun.set()

        result = asyncio.create_task(operation.result(on_event=hear))
        await begun.wait()
        connections = proxy.accepted
        BREAKS[fault](proxy)
        (tmp_path / "go").touch()
        await proxy.connected(connections + 1)  # so the client knows
        await proxy.heal()
        assert await result == 3
        assert [event.sequence for event in heard] == [1, 2, 3, 4, 5, 6]
        assert isinstance(heard[-1], inkwell.OperationDone)
