"""Certificates all the way: a caller's to the gateway, and the gateway's to a service that takes calls from it only."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2

from services.gateway.endpoint import State
from services.kit import identity
from services.kit.metrics import Metrics
from services.kit.server import READINESS, Health, ServiceServer
from services.kit.settings import ServiceSettings
from tests.support import gateway as gateways
from tests.support.backend import SERVER_STREAM, UNARY, Backend
from tests.support.certificates import Authority, credentials

Text = wrappers_pb2.StringValue


async def _who(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return Text(value=identity.current(context)).SerializeToString()


def _service(folder: Path, *, port: int = 0) -> ServiceServer:
    def register(server: grpc.aio.Server) -> list[str]:
        handler = grpc.method_handlers_generic_handler(
            "inkwell.ocr.v1.OcrService", {"Recognize": grpc.unary_unary_rpc_method_handler(_who)}
        )
        server.add_generic_rpc_handlers((handler,))
        return ["inkwell.ocr.v1.OcrService"]

    @contextlib.asynccontextmanager
    async def lifespan(health: Health) -> AsyncIterator[None]:
        health.set(READINESS, True)
        yield

    settings = ServiceSettings(tls=str(folder), callers=("gateway",), port=port)
    return ServiceServer("test", settings, metrics=Metrics("test"), host=None, register=register, lifespan=lifespan)


@contextlib.asynccontextmanager
async def serving(folder: Path, *, port: int = 0) -> AsyncIterator[int]:
    server = _service(folder, port=port)
    await server.start()
    try:
        yield server.port
    finally:
        await server.stop(0)


def pool(target: str) -> dict[str, Any]:
    return {"name": "ocr", "service": "ocr", "hardware": "cpu", "targets": [target]}


async def who(port: int, creds: grpc.ChannelCredentials, **options: Any) -> str:
    async with grpc.aio.secure_channel(
        f"localhost:{port}", creds, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        return Text.FromString(await channel.unary_unary(UNARY)(b"", timeout=60, **options)).value


@pytest.fixture
def authority() -> Authority:
    return Authority()


async def test_from_a_caller_to_the_service(authority: Authority, tmp_path: Path) -> None:
    gateway_folder = authority.folder(tmp_path / "gateway", "gateway", hosts=("localhost",))
    scanner = credentials(authority.folder(tmp_path / "scanner", "scanner"))
    async with (
        serving(authority.folder(tmp_path / "ocr", "localhost")) as port,
        gateways.running(pool(f"localhost:{port}"), tls=str(gateway_folder)) as gateway,
    ):
        assert await who(gateway.server.port, scanner) == "certificate/scanner"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await who(port, scanner)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await who(gateway.server.port, scanner, metadata=(("inkwell-caller", "certificate/root"),))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_rules_for_certificates(authority: Authority, tmp_path: Path) -> None:
    rules = tmp_path / "access.yaml"
    rules.write_text("rules: [{callers: [certificate/scanner], methods: [ocr/Recognize]}]")
    gateway_folder = authority.folder(tmp_path / "gateway", "gateway", hosts=("localhost",))
    async with (
        serving(authority.folder(tmp_path / "ocr", "localhost")) as port,
        gateways.running(pool(f"localhost:{port}"), tls=str(gateway_folder), access=str(rules)) as gateway,
    ):
        scanner = credentials(authority.folder(tmp_path / "scanner", "scanner"))
        assert await who(gateway.server.port, scanner) == "certificate/scanner"
        other = credentials(authority.folder(tmp_path / "other", "other"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await who(gateway.server.port, other)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "certificate/other may not call ocr/Recognize" in (caught.value.details() or "")


async def test_a_service_found_by_its_name_has_to_have_that_name(authority: Authority, tmp_path: Path) -> None:
    async def resolve(_host: str) -> list[str]:
        return ["127.0.0.1"]

    gateway_folder = authority.folder(tmp_path / "gateway", "gateway")
    async with serving(authority.folder(tmp_path / "ocr", "ocr-cuda")) as port:
        settings: dict[str, Any] = {"services_tls": str(gateway_folder), "resolver": resolve}
        async with gateways.running(pool(f"dns:///ocr-cuda:{port}"), **settings) as gateway:
            await gateway.channel.unary_unary(UNARY)(b"", timeout=60)
        async with gateways.running(pool(f"dns:///ocr-cpu:{port}"), wait=False, **settings) as gateway:
            await gateway.until(lambda: all(p.count(State.UNREACHABLE) == 1 for p in gateway.fleet.pools))
        async with gateways.running(
            pool(f"127.0.0.1:{port}"), services_tls_name="ocr-cuda", services_tls=str(gateway_folder)
        ) as gateway:
            await gateway.channel.unary_unary(UNARY)(b"", timeout=60)


async def test_all_certificates_renewed_by_another_authority(authority: Authority, tmp_path: Path) -> None:
    service_folder = authority.folder(tmp_path / "ocr", "localhost")
    gateway_folder = authority.folder(tmp_path / "gateway", "gateway", hosts=("localhost",))
    async with contextlib.AsyncExitStack() as exits:
        async with serving(service_folder) as port:
            gateway = await exits.enter_async_context(
                gateways.running(pool(f"localhost:{port}"), tls=str(gateway_folder))
            )
            caller = credentials(authority.folder(tmp_path / "caller", "caller"))
            assert await who(gateway.server.port, caller) == "certificate/caller"

            renewed = Authority("renewed")
            renewed.folder(service_folder, "localhost")
            renewed.folder(gateway_folder, "gateway", hosts=("localhost",))
            caller = credentials(renewed.folder(tmp_path / "caller", "caller"))
            assert await who(gateway.server.port, caller) == "certificate/caller"
        # A service that knows nothing but the new ones, as after a restart.
        async with serving(service_folder, port=port), asyncio.timeout(60):
            await gateway.until(lambda: all(p.count(State.READY) == 1 for p in gateway.fleet.pools))
            assert await who(gateway.server.port, caller, wait_for_ready=True) == "certificate/caller"


@pytest.mark.parametrize("path", [UNARY, SERVER_STREAM])
async def test_calls_under_way_survive_a_renewal(path: str) -> None:
    release = asyncio.Event()

    async def hold(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        async for request in requests:
            if request == b"hold":
                await release.wait()
            yield request

    backend = await Backend(hold).start()

    async with gateways.running(gateways.pool("ocr", backend)) as gateway:

        async def call(request: bytes) -> bytes:
            if path == UNARY:
                answer: bytes = await gateway.channel.unary_unary(path)(request, timeout=60)
            else:
                answer = await gateway.channel.unary_stream(path)(request, timeout=60).read()
            return answer

        held = asyncio.create_task(call(b"hold"))
        await backend.entered.wait()
        gateway.endpoint(backend).renew()
        assert await call(b"new") == b"new"
        assert not held.done()
        release.set()
        assert await held == b"hold"
    await backend.stop()
