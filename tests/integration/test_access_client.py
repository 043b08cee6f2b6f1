"""The SDK and the command line with certificates and tokens, against a gateway that wants them."""

import asyncio
import datetime
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import inkwell
from inkwell.cli.app import app
from services.gateway import access_file, new_key
from tests.support import gateway as gateways
from tests.support.backend import Backend
from tests.support.certificates import Authority
from tests.support.gateway import Gateway, pool
from tests.support.tokens import AUDIENCE, ISSUER, Issuer


class Running:
    def __init__(self, gateway: Gateway, folder: Path, key: str, issuer: Issuer) -> None:
        self.target = f"localhost:{gateway.server.port}"
        self.ca = folder / "ca.crt"
        self.key = key
        self.issuer = issuer


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    key, entry = new_key.make("scanner")
    issuer = Issuer()
    issuer.write(tmp_path / "jwks.json")
    (tmp_path / "access.yaml").write_text(
        json.dumps(
            {
                "keys": [entry.model_dump()],
                "tokens": [{"name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "keys": "jwks.json"}],
                "rules": [{"callers": ["key/scanner", "corp/alice"], "methods": ["gateway/*"]}],
            }
        )
    )
    folder = Authority().folder(tmp_path / "gateway", "localhost")
    backend = await Backend().start()
    async with gateways.running(
        pool("ocr", backend),
        access=str(tmp_path / "access.yaml"),
        tls=str(folder),
        tls_clients=False,
        services_tls="off",
    ) as gateway:
        yield Running(gateway, folder, key, issuer)
    await backend.stop()


async def test_a_key_over_tls(running: Running) -> None:
    credentials = inkwell.tls(ca=running.ca)
    async with inkwell.AsyncClient(running.target, credentials=credentials, token=running.key) as client:
        assert [p.name for p in await client.fleet()] == ["ocr"]
        with pytest.raises(inkwell.PermissionDenied, match="key/scanner may not call ocr/ListModels"):
            await client.models("ocr")
    async with inkwell.AsyncClient(running.target, credentials=credentials, token="ik_wrong") as client:
        with pytest.raises(inkwell.Unauthenticated):
            await client.fleet()


async def test_a_token_that_is_renewed(running: Running) -> None:
    asked = []

    def renewed() -> str:
        asked.append(1)
        return running.issuer.token()

    def blocking() -> list[str]:
        with inkwell.Client(running.target, credentials=inkwell.tls(ca=running.ca), token=renewed) as client:
            return [client.fleet()[0].name for _ in range(2)]

    assert await asyncio.to_thread(blocking) == ["ocr", "ocr"]
    assert len(asked) == 2


async def test_a_server_of_another_authority_is_not_spoken_to(running: Running, tmp_path: Path) -> None:
    other = Authority("other").folder(tmp_path / "other", "other")
    credentials = inkwell.tls(ca=other / "ca.crt")
    async with inkwell.AsyncClient(running.target, credentials=credentials, token=running.key) as client:
        with pytest.raises(inkwell.Unavailable):
            await client.fleet(timeout_s=2)


@pytest.mark.parametrize("target", ["inkwell:50050", "dns:///10.0.0.1:50050", "[fd00::1]:50050"])
def test_a_token_is_never_sent_in_plain_text(target: str) -> None:
    with pytest.raises(inkwell.InvalidRequest, match="plain text") as caught:
        inkwell.Client(target, token="secret-token")
    assert "secret-token" not in str(caught.value)


@pytest.mark.parametrize("target", ["localhost:1", "127.0.0.1:1", "dns:///localhost:1", "[::1]:1", "unix:/tmp/socket"])
def test_but_on_this_machine_it_may(target: str) -> None:
    inkwell.Client(target, token="secret-token").close()


def test_a_certificate_takes_its_key(tmp_path: Path) -> None:
    with pytest.raises(inkwell.InvalidRequest, match="belong together"):
        inkwell.tls(certificate=tmp_path / "tls.crt")


async def command(*arguments: str, **environment: str) -> Any:
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), env=environment)


async def test_the_command_line(running: Running) -> None:
    fleet = ("fleet", "--address", running.target, "--json")
    told = await command("--ca", str(running.ca), "--token", running.key, *fleet)
    # The gateway of this test logs to the same standard output.
    (shown,) = (line for line in told.stdout.splitlines() if line.startswith("{"))
    assert json.loads(shown)["name"] == "ocr"
    told = await command(*fleet, INKWELL_CA=str(running.ca), INKWELL_TOKEN=running.key)
    assert told.exit_code == 0
    told = await command("--ca", str(running.ca), *fleet)
    assert isinstance(told.exception, inkwell.Unauthenticated)
    told = await command("--ca", "/nowhere/ca.crt", *fleet)
    assert told.exit_code == 2
    assert "/nowhere/ca.crt" in told.output


async def test_the_command_line_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority()
    folder = authority.folder(tmp_path / "gateway", "localhost")
    scanner = authority.folder(tmp_path / "scanner", "scanner", valid=datetime.timedelta(hours=1))
    backend = await Backend().start()
    async with gateways.running(pool("ocr", backend), tls=str(folder), services_tls="off") as gateway:
        told = await command(
            *("--ca", str(scanner / "ca.crt"), "--cert", str(scanner / "tls.crt"), "--key", str(scanner / "tls.key")),
            *("fleet", "--address", f"localhost:{gateway.server.port}"),
        )
        assert told.exit_code == 0, told.output
    await backend.stop()


def test_a_new_key_is_printed_with_what_the_file_needs(tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "services.gateway.new_key", "scanner"], capture_output=True, text=True, check=True
    ).stdout
    key = re.search(r"ik_\S{43}", printed)
    assert key is not None
    entry = printed.partition("In the access file:")[2]
    path = tmp_path / "access.yaml"
    path.write_text(f"{entry}\nrules: [{{callers: [key/scanner], methods: ['*']}}]")
    assert access_file.load(path).keys[0].name == "scanner"
    assert key[0] not in entry
