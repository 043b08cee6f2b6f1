"""Servers with certificates: who gets in, renewal without a restart, and what is said when it cannot be."""

import asyncio
import contextlib
import datetime
import os
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError
from structlog.testing import capture_logs

from services.kit import identity
from services.kit.metrics import Metrics
from services.kit.server import ServiceServer
from services.kit.settings import ServiceSettings
from services.kit.tls import TlsError, TlsFolder
from tests.support.certificates import Authority, credentials

PATH = "/test.Who/Am"


async def _who(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return wrappers_pb2.StringValue(value=identity.current(context)).SerializeToString()


def _register(server: grpc.aio.Server) -> list[str]:
    handler = grpc.unary_unary_rpc_method_handler(_who)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Am": handler}),))
    return ["test.Who"]


def _page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        return str(page.read().decode())


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[ServiceServer]:
    server = ServiceServer("test", ServiceSettings(**settings), metrics=Metrics("test"), host=None, register=_register)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


async def who(server: ServiceServer, creds: grpc.ChannelCredentials | None, said: str | None = None) -> str:
    """The name that the server knows its caller by, on a new connection."""
    target = f"localhost:{server.port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.secure_channel(target, creds, options) if creds else grpc.aio.insecure_channel(target, options)
    async with channel:
        metadata = ((identity.CALLER_KEY, said),) if said is not None else ()
        answer = await channel.unary_unary(PATH)(b"", metadata=metadata, timeout=60)
        return wrappers_pb2.StringValue.FromString(answer).value


async def refused(server: ServiceServer, creds: grpc.ChannelCredentials | None, said: str | None = None) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await who(server, creds, said)
    return caught.value


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server_folder(authority: Authority, tmp_path: Path) -> Path:
    return authority.folder(tmp_path / "server", "localhost")


async def test_a_caller_is_known_by_its_certificate(authority: Authority, server_folder: Path, tmp_path: Path) -> None:
    scanner = authority.folder(tmp_path / "scanner", "scanner")
    async with serving(tls=str(server_folder)) as server:
        assert await who(server, credentials(scanner)) == "certificate/scanner"


async def test_without_a_certificate_of_the_authority_nobody_gets_in(
    authority: Authority, server_folder: Path, tmp_path: Path
) -> None:
    strangers = Authority("strangers").folder(tmp_path / "stranger", "scanner")
    (strangers / "ca.crt").write_bytes(authority.pem)  # the stranger trusts us; we do not trust the stranger
    expired = authority.folder(tmp_path / "expired", "scanner", valid=datetime.timedelta(hours=-1))
    async with serving(tls=str(server_folder)) as server:
        for creds in (
            None,
            credentials(server_folder, certificate=False),
            credentials(strangers),
            credentials(expired),
        ):
            assert (await refused(server, creds)).code() is grpc.StatusCode.UNAVAILABLE


async def test_encryption_alone(server_folder: Path) -> None:
    async with serving(tls=str(server_folder), tls_clients=False) as server:
        assert await who(server, credentials(server_folder, certificate=False)) == ""


async def test_renewed_files_serve_the_next_connection(
    authority: Authority, server_folder: Path, tmp_path: Path
) -> None:
    caller = credentials(authority.folder(tmp_path / "caller", "caller"))
    async with serving(tls=str(server_folder), metrics_port=0) as server:
        assert await who(server, caller) == "certificate/caller"

        renewed = Authority("renewed")
        renewed.folder(server_folder, "localhost", valid=datetime.timedelta(days=9))

        assert (await refused(server, caller)).code() is grpc.StatusCode.UNAVAILABLE
        assert await who(server, credentials(renewed.folder(tmp_path / "new", "new"))) == "certificate/new"
        page = await asyncio.to_thread(_page, server.metrics_port)
        shown = next(line for line in page.splitlines() if line.startswith("inkwell_certificate"))
        left = float(shown.split()[1]) - datetime.datetime.now(datetime.UTC).timestamp()
        assert 8 < left / 86400 < 10


async def test_a_connection_outlives_the_certificate_it_began_with(authority: Authority, server_folder: Path) -> None:
    async with (
        serving(tls=str(server_folder)) as server,
        grpc.aio.secure_channel(f"localhost:{server.port}", credentials(server_folder)) as channel,
    ):
        call = channel.unary_unary(PATH)
        await call(b"", timeout=60)
        Authority("renewed").folder(server_folder, "localhost")
        await call(b"", timeout=60)


@pytest.mark.parametrize(
    ("file", "content"), [("tls.crt", b"not a certificate"), ("tls.key", b"not a key"), ("tls.crt", None)]
)
async def test_wrong_files_change_nothing_and_are_reported_once(
    server_folder: Path, file: str, content: bytes | None
) -> None:
    folder = TlsFolder(server_folder)
    before = folder.current()
    if content is None:
        (server_folder / file).unlink()
    else:
        (server_folder / file).write_bytes(content)
    with capture_logs() as logged:
        assert folder.current() is before
        assert folder.current() is before
    assert [entry["log_level"] for entry in logged] == ["error"]
    assert file in logged[0]["error"]


async def test_a_key_of_another_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.folder(tmp_path / "one", "one"), authority.folder(tmp_path / "other", "other")
    (one / "tls.key").write_bytes((other / "tls.key").read_bytes())
    with pytest.raises(TlsError, match=r"tls.key is not the key of the first certificate in .*tls.crt"):
        TlsFolder(one)


async def test_an_expired_certificate_is_said(authority: Authority, tmp_path: Path) -> None:
    folder = authority.folder(tmp_path / "old", "localhost", valid=datetime.timedelta(hours=-1))
    with capture_logs() as logged:
        TlsFolder(folder)
    assert logged[0]["event"] == "the certificate has expired"


async def test_plain_text_is_said(tmp_path: Path) -> None:
    with capture_logs() as logged:
        async with serving():
            pass
    assert any(entry["log_level"] == "warning" and "plain text" in entry["event"] for entry in logged)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.1.2.3", "example.org"])
def test_other_addresses_than_loopback_need_a_decision(host: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ServiceSettings(host=host)
    (wrong,) = caught.value.errors()
    assert wrong["loc"] == ("tls",)
    assert "TLS=off" in wrong["msg"]
    assert "tls.crt, tls.key and ca.crt" in wrong["msg"]
    assert ServiceSettings(host=host, tls="off").tls_folder is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]", "::1", "unix:/run/inkwell"])
def test_loopback_needs_none(host: str) -> None:
    assert ServiceSettings(host=host).tls_folder is None


def test_settings_that_do_not_fit(server_folder: Path) -> None:
    with pytest.raises(ValidationError, match="neither a folder nor 'off'"):
        ServiceSettings(tls=str(server_folder / "missing"))
    with pytest.raises(ValidationError, match="known only with a TLS folder"):
        ServiceSettings(callers=("gateway",))
    (server_folder / "ca.crt").unlink()
    with pytest.raises(ValidationError, match=r"has no ca.crt .* TLS_CLIENTS=false"):
        ServiceSettings(tls=str(server_folder))


async def test_a_service_takes_calls_from_its_gateway_only(
    authority: Authority, server_folder: Path, tmp_path: Path
) -> None:
    gateway = credentials(authority.folder(tmp_path / "gateway", "gateway"))
    scanner = credentials(authority.folder(tmp_path / "scanner", "scanner"))
    async with serving(tls=str(server_folder), callers=("gateway",)) as server:
        assert await who(server, gateway, said="key/alice") == "key/alice"
        error = await refused(server, scanner, said="key/alice")
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "takes calls from gateway only, not 'scanner'" in error.details()

        async with grpc.aio.secure_channel(f"localhost:{server.port}", scanner) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="liveness"))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await listing.read()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with grpc.aio.secure_channel(f"localhost:{server.port}", gateway) as channel:
            listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            answer = await listing.read()
            assert "test.Who" in [s.name for s in answer.list_services_response.service]


async def test_a_certificate_speaks_for_others_only_if_it_is_named(
    authority: Authority, server_folder: Path, tmp_path: Path
) -> None:
    scanner = credentials(authority.folder(tmp_path / "scanner", "scanner"))
    async with serving(tls=str(server_folder)) as server:
        error = await refused(server, scanner, said="key/alice")
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "CALLERS" in error.details()


async def test_probes_that_speak_no_tls_have_a_port_for_health_alone(server_folder: Path) -> None:
    async with serving(tls=str(server_folder), health_port=0) as server:
        server.health.set("readiness", True)
        async with grpc.aio.insecure_channel(f"localhost:{server.health_port}") as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
            said = await watched.read()
            while said.status != health_pb2.HealthCheckResponse.SERVING:
                said = await watched.read()
            call = channel.unary_unary(PATH)
            with pytest.raises(grpc.aio.AioRpcError) as nobody:
                await call(b"")
            assert nobody.value.code() is grpc.StatusCode.UNIMPLEMENTED

            # While it drains, it says so there too.
            stopping = asyncio.create_task(server.stop(0))
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await stopping


async def test_a_health_port_that_is_taken_ends_the_start(server_folder: Path) -> None:
    async with serving(tls=str(server_folder), health_port=0) as server:
        with pytest.raises(OSError, match=f"127.0.0.1:{server.health_port}; is the port taken"):
            async with serving(tls=str(server_folder), health_port=server.health_port):
                pass


@pytest.mark.parametrize("encrypted", [True, False])
async def test_a_probe_asks_with_the_servers_own_certificate(
    authority: Authority, tmp_path: Path, encrypted: bool
) -> None:
    folder = authority.folder(tmp_path / "ocr", "ocr.vision.svc")
    settings: dict[str, Any] = {"tls": str(folder), "callers": ("gateway",)} if encrypted else {}
    async with serving(**settings) as server:
        environment = {**os.environ, "INKWELL_OCR_PORT": str(server.port)}
        if encrypted:
            environment["INKWELL_OCR_TLS"] = str(folder)
        answers = {}
        for name in ("liveness", "readiness"):
            probe = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.kit.probe", "ocr", name),
                env=environment,
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await probe.communicate()
            answers[name] = (probe.returncode, output.decode().strip())
    assert answers == {"liveness": (0, "SERVING"), "readiness": (1, "NOT_SERVING")}
