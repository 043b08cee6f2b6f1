"""What a page of metrics tells of an engine process that works, hangs, and is killed."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable

import grpc
import pytest_asyncio
from prometheus_client import generate_latest

from services.kit import engine_metrics
from services.kit.server import ServiceServer
from tests.support import counting_service
from tests.support.backend import UNARY


def page(server: ServiceServer) -> dict[str, float]:
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    found = [re.fullmatch(r"(inkwell_engine_\w+)(\{.*\})? (\S+)", line) for line in lines]
    return {match[1]: float(match[3]) for match in found if match}


async def until(server: ServiceServer, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The page, once it is as it should be. The engine beats once a second, and tells nobody here."""
    while True:
        found = page(server)
        if holds(found):
            return found
        await asyncio.sleep(0.05)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[ServiceServer]:
    server = counting_service.build(counting_service.Settings(slots=3))
    assert server.host is not None
    engine_metrics.register(server.metrics, server.host)
    await server.start()
    try:
        await server.wait_ready()
        yield server
    finally:
        await server.stop(0)


async def test_an_engine_that_serves(server: ServiceServer) -> None:
    found = page(server)
    assert found["inkwell_engine_slots"] == 3
    assert found["inkwell_engine_memory_bytes"] > 1e6
    assert found["inkwell_engine_cpu_seconds_total"] > 0
    assert found["inkwell_engine_step_age_seconds"] == 0
    assert found["inkwell_engine_silent_seconds"] >= 0


async def test_a_step_that_does_not_end_grows_old(server: ServiceServer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(UNARY)(counting_service.request(count=3, stall_at=2))
        old = await until(server, lambda page: page["inkwell_engine_step_age_seconds"] > 0.5)
        await until(
            server,
            lambda page: page["inkwell_engine_step_age_seconds"] > old["inkwell_engine_step_age_seconds"] + 0.5,
        )
        call.cancel()


async def test_an_engine_that_is_stopped_is_silent_and_one_that_is_gone_is_not(server: ServiceServer) -> None:
    assert server.host is not None
    pid = server.host.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await until(server, lambda page: page["inkwell_engine_silent_seconds"] > 2)
    os.kill(pid, signal.SIGKILL)
    found = await until(server, lambda page: page["inkwell_engine_restarts_total"] == 1)
    assert found["inkwell_engine_silent_seconds"] < 2
    await server.wait_ready()
    assert server.host.pid != pid
    assert "inkwell_engine_memory_bytes" in page(server)


async def test_a_page_is_whole_before_there_is_an_engine() -> None:
    server = counting_service.build(counting_service.Settings())
    assert server.host is not None
    engine_metrics.register(server.metrics, server.host)
    found = page(server)  # not started yet
    assert "inkwell_engine_memory_bytes" not in found
    assert found["inkwell_engine_silent_seconds"] == 0
