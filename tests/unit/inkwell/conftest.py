"""A fake Inkwell and clients of it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import inkwell
from tests.unit.inkwell.fake_server import InkwellServer


@pytest.fixture
def server() -> Iterator[InkwellServer]:
    """Offers everything, as a gateway does."""
    running = InkwellServer()
    yield running
    running.stop()


@pytest.fixture
def client(server: InkwellServer) -> Iterator[inkwell.Client]:
    with inkwell.Client(server.address, timeout_s=20) as opened:
        yield opened


@pytest.fixture
async def aio_client(server: InkwellServer) -> AsyncIterator[inkwell.AsyncClient]:
    async with inkwell.AsyncClient(server.address, timeout_s=20) as opened:
        yield opened


@pytest.fixture
def command_at_server(server: InkwellServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The `inkwell` command calls the fake, from an empty folder."""
    monkeypatch.setenv("INKWELL_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
