"""A real Prometheus reads services that run, and the recording rules come to what is known to be there."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

import inkwell
from services import local
from services.kit.server import ServiceServer
from tests.monitoring.test_pages import panels
from tests.support import counting_service, gateway
from tests.support.backend import UNARY
from tests.support.counting_service import request
from tests.support.gateway import Gateway
from tests.support.prometheus import Prometheus, prometheus

# What a pod of the pool is labelled with by the component's PodMonitor.
OF_THE_POOL = {"namespace": "inkwell", "pod": "ocr-cpu-0", "pool": "ocr-cpu", "job": "inkwell-ocr"}
OF_THE_GATEWAY = {"namespace": "inkwell", "pod": "gateway-0", "job": "inkwell-gateway"}
# Scaled to zero: no address is known.
CUDA = {"name": "ocr-cuda", "service": "ocr", "hardware": "cuda", "targets": ["dns:///ocr-cuda:50051"]}
SLOTS = 2


@dataclass
class Watched:
    """A gateway, a service behind it, and the Prometheus that reads both."""

    gateway: Gateway
    service: ServiceServer
    prometheus: Prometheus

    def call(self, *, hardware: str = "", **count: Any) -> "grpc.aio.UnaryUnaryCall[bytes, bytes]":
        metadata = (("inkwell-hardware", hardware),) if hardware else ()
        return self.gateway.channel.unary_unary(UNARY)(request(**count), metadata=metadata)


async def calls(channel: grpc.aio.Channel, *, good: int, bad: int) -> None:
    """So many calls that end OK, and so many INTERNAL."""
    for _ in range(good):
        await channel.unary_unary(UNARY)(request(count=1))
    for _ in range(bad):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(UNARY)(request(fail_at=1))
        assert error.value.code() is grpc.StatusCode.INTERNAL


@pytest_asyncio.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    async def nowhere(target: str) -> list[str]:
        return []

    service = counting_service.build(counting_service.Settings(slots=SLOTS, metrics_port=0))
    await service.start()
    try:
        await service.wait_ready()
        pools = (counting_service.pool_at(service), CUDA)
        async with gateway.running(*pools, wait=False, resolver=nowhere, metrics_port=0, wake_wait_s=600) as running:
            await running.until(lambda: running.fleet.ready())
            # A rate begins with the first value that is read; in the same proportions, it is exact.
            await calls(running.channel, good=9, bad=1)
            await running.idle()
            targets = {service.metrics_port: OF_THE_POOL, running.server.metrics_port: OF_THE_GATEWAY}
            async with prometheus(tmp_path, targets) as server:
                yield Watched(running, service, server)
    finally:
        await service.stop(0)


async def test_demand_is_what_waits_and_runs_in_each_pool_also_in_one_without_pods(
    watched: Watched, tmp_path: Path
) -> None:
    async def becomes(rule: str, label: str, expected: dict[str, float]) -> None:
        wanted = {(value,): number for value, number in expected.items()}
        await watched.prometheus.until(rule, label, holds=lambda found: found == wanted)

    await becomes("pool:inkwell_demand:calls", "pool", {"ocr-cpu": 0, "ocr-cuda": 0})
    release = tmp_path / "release"
    held = [watched.call(count=2, hold_at=2, release=str(release)) for _ in range(5)]
    waking = watched.call(hardware="cuda!", count=1)

    await becomes("pool:inkwell_demand:calls", "pool", {"ocr-cpu": 5, "ocr-cuda": 1})
    await becomes("pool:inkwell_waiting:calls", "pool", {"ocr-cpu": 5 - SLOTS, "ocr-cuda": 1})
    await becomes("hardware:inkwell_demand:calls", "hardware", {"cpu": 5, "cuda": 1})
    await becomes("pool:inkwell_endpoints:ready", "pool", {"ocr-cpu": 1, "ocr-cuda": 0})
    # As an autoscaler asks.
    await becomes('sum(pool:inkwell_demand:calls{pool="ocr-cuda"})', "pool", {"": 1})

    release.touch()
    await asyncio.gather(*held)
    waking.cancel()
    await becomes("pool:inkwell_demand:calls", "pool", {"ocr-cpu": 0, "ocr-cuda": 0})


async def test_the_share_of_bad_calls_is_what_it_was(watched: Watched) -> None:
    await calls(watched.gateway.channel, good=18, bad=2)
    await watched.gateway.idle()
    total = 'sum(inkwell_gateway_requests_total{pool="ocr-cpu"})'
    await watched.prometheus.until(total, holds=lambda found: found == {(): 30})
    rule = 'slo:inkwell_errors:ratio_rate5m{slo="availability"}'
    found = await watched.prometheus.until(rule, "namespace", holds=lambda found: found.get(("inkwell",), 0) > 0.0999)
    assert found == {("inkwell",): pytest.approx(0.1)}
    rates = 'pool:inkwell_requests:rate5m{pool="ocr-cpu"}'
    shares = await watched.prometheus.values(f"{rates} / on () group_left () sum({rates})", "code")
    assert shares == {("OK",): pytest.approx(0.9), ("INTERNAL",): pytest.approx(0.1)}


async def test_an_example_leads_from_a_graph_to_a_trace(watched: Watched) -> None:
    trace = "ab" * 16
    watched.service.metrics.ended("m", "OK", model="", hardware="", seconds=0.02, trace_id=trace)
    url = f"http://127.0.0.1:{watched.prometheus.port}/api/v1/query_exemplars?query=inkwell_request_seconds_bucket&start=0&end=4102444800"

    def ask() -> Any:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    async with asyncio.timeout(60):
        while True:
            found = await asyncio.to_thread(ask)
            if found:
                break
            await asyncio.sleep(0.1)  # Prometheus tells nobody
    assert [example["labels"] for series in found for example in series["exemplars"]] == [{"trace_id": trace}]


# What has something to show after a line was read and a picture was painted.
SHOWN = {
    "fleet": {
        "Calls that wait or run, by pool",
        "Calls, by hardware",
        "Ready pods, by pool",
        "Memory in use",
        "Devices",
    },
    "gateway": {"Calls by status", "Calls by pool", "Time of calls", "Endpoints by state", "Calls of the busiest"},
    "ocr": {"Calls by method", "Tokens decoded, a second", "Rows that share a step, on average", "Wait for the engine"},
    "diffusion": {"Steps, a second", "One step of one picture", "First step of a call", "Weights of loaded models"},
}


async def test_dashboards_show_what_real_services_did(fleet: dict[str, local.Service], tmp_path: Path) -> None:
    targets = {
        service.metrics_port: {"namespace": "inkwell", "pod": f"{name}-0", "job": f"inkwell-{name}"}
        | ({} if name == "gateway" else {"pool": f"{name}-local"})
        for name, service in fleet.items()
    }
    async with inkwell.AsyncClient(fleet["gateway"].address) as client:

        async def work() -> None:
            await client.read(local.DEMO_LINE)
            await client.paint("grinning face", steps=2)

        await work()  # the series begin
        async with prometheus(tmp_path, targets) as server:
            before = await server.values("sum(inkwell_requests_total)")
            await work()
            await server.until("sum(inkwell_requests_total)", holds=lambda found: found[()] >= before[()] + 4)
            filled: dict[str, set[str]] = {}
            for where, expr in panels():
                board, _, title = where.partition(": ")
                asked = expr.replace("$__rate_interval", "5m").replace("$namespace", ".*")
                if await server.query(asked):  # a wrong one raises
                    filled.setdefault(board, set()).add(title)
    assert {board: titles - filled[board] for board, titles in SHOWN.items()} == {board: set() for board in SHOWN}
