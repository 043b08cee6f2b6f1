"""The configuration file changes while the gateway serves: a right one is used, a wrong one is not, no call fails."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway import config
from services.gateway.__main__ import build
from services.gateway.reload import Reloading
from services.gateway.settings import Settings
from services.kit.metrics import Metrics
from tests.integration.test_gateway_routing import backends
from tests.support.backend import BIDI, UNARY
from tests.support.gateway import pool, running


@dataclass
class Applied:
    """Stands for the fleet where only the file is the subject."""

    configs: list[config.GatewayConfig]

    async def __call__(self, parsed: config.GatewayConfig) -> None:
        self.configs.append(parsed)


def following(path: Path, interval_s: float = 0) -> tuple[Reloading, Applied, Metrics]:
    metrics, applied = Metrics("gateway"), Applied([])
    reloading = Reloading(path, path.read_bytes(), interval_s=interval_s, apply=applied, registry=metrics.registry)
    return reloading, applied, metrics


def text(*names: str) -> str:
    return json.dumps(
        {"pools": [{"name": n, "service": "ocr", "hardware": "cpu", "targets": [f"{n}:1"]} for n in names]}
    )


async def test_a_wrong_file_is_refused_once_and_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(text("a"))
    reloading, applied, metrics = following(path)
    first = reloading.digest

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    await reloading.look()
    assert (applied.configs, reloading.error) == ([], "")

    path.write_text(text("A"))
    for _ in range(3):
        await reloading.look()
    assert "pools[0].name: string should match pattern" in reloading.error
    assert (reloading.digest, applied.configs) == (first, [])
    assert value("inkwell_gateway_config_refused") == 1
    assert value("inkwell_gateway_config_reloads_total", result="refused") == 1

    path.unlink()
    await reloading.look()
    assert "cannot be read" in reloading.error

    path.write_text(text("a"))  # back as it was: nothing to apply, nothing wrong
    await reloading.look()
    assert (applied.configs, reloading.error, value("inkwell_gateway_config_refused")) == ([], "", 0)

    path.write_text(text("a", "b"))
    await reloading.look()
    assert [[p.name for p in parsed.pools] for parsed in applied.configs] == [["a", "b"]]
    assert reloading.digest != first
    assert value("inkwell_gateway_config_reloads_total", result="applied") == 1


async def test_a_mounted_configmap_is_followed_through_its_links(tmp_path: Path) -> None:
    # As the kubelet replaces it: a link to a folder is moved in one step.
    for version, name in (("v1", "a"), ("v2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "gateway.yaml").write_text(text(name))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "gateway.yaml").symlink_to("..data/gateway.yaml")
    reloading, applied, _ = following(tmp_path / "gateway.yaml")
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "..data")
    await reloading.look()
    assert applied.configs[0].pools[0].name == "b"


async def test_pools_change_under_calls_and_none_fails() -> None:
    async with backends(3) as (first, second, third), running(pool("a", first), pool("b", second)) as gateway:
        kept = gateway.fleet.pools[1]
        held = gateway.channel.stream_stream(BIDI)()
        await held.write(b"1")
        assert await held.read() == b"1"
        begun = first if first.call_count else second

        stop = asyncio.Event()
        served: set[str] = set()

        async def calls() -> None:
            while not stop.is_set():
                call = gateway.channel.unary_unary(UNARY)(b"a")
                await call
                served.add(str(dict(await call.initial_metadata())["inkwell-endpoint"]))

        calling = [asyncio.create_task(calls()) for _ in range(4)]
        new = {"pools": [pool("a", third), pool("b", second)], "defaults": {"ocr": ["cpu"]}}
        await gateway.fleet.apply(config.parse(json.dumps(new)))
        assert gateway.fleet.pools[1] is kept  # with its connections
        before = third.call_count + second.call_count
        await gateway.channel.unary_unary(UNARY)(b"a")
        assert third.call_count + second.call_count > before
        stop.set()
        await asyncio.gather(*calling)  # raises what went wrong with any
        assert served <= {first.address, second.address, third.address}
        calls_of_first = first.call_count

        for backend_pool in ({"pools": [pool("a", third)]}, {"pools": [pool("c", third)]}):
            await gateway.fleet.apply(config.parse(json.dumps(backend_pool)))
            call = gateway.channel.unary_unary(UNARY)(b"a")
            await call
            assert dict(await call.initial_metadata())["inkwell-endpoint"] == third.address
        assert first.call_count == calls_of_first

        # The stream that began before all this goes on where it began.
        await held.write(b"2")
        assert await held.read() == b"2"
        await held.done_writing()
        assert await held.read() is grpc.aio.EOF
        assert dict(await held.initial_metadata())["inkwell-endpoint"] == begun.address


async def test_a_configuration_that_cannot_be_used_here_changes_nothing() -> None:
    async with backends(1) as (only,), running(pool("a", only)) as gateway:
        pools = list(gateway.fleet.pools)
        outside = {**pool("b", only), "targets": ["k8s:///default/ocr:50051"]}
        with contextlib.suppress(config.ConfigError):
            await gateway.fleet.apply(config.parse(json.dumps({"pools": [outside]})))
        assert gateway.fleet.pools == pools
        assert await gateway.channel.unary_unary(UNARY)(b"a") == b"a"


async def configuration(address: str) -> gateway_pb2.Configuration:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        found: gateway_pb2.Configuration = (await stub.ListPools(gateway_pb2.ListPoolsRequest())).configuration
        return found


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Any]:
    server = build(Settings(port=0, config=path, reload_interval_s=0.05))
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


async def test_the_running_gateway_follows_its_file_and_says_which_it_uses(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    async with backends(2) as (first, second):
        path.write_text(json.dumps({"pools": [pool("a", first)]}))
        async with serving(path) as server, asyncio.timeout(60):
            address = f"127.0.0.1:{server.port}"
            began = await configuration(address)
            assert (began.file, began.error) == (str(path), "")
            assert len(began.digest) == 12
            path.write_text("pools: []")
            while not (wrong := await configuration(address)).error:
                pass
            assert "pools: list should have at least 1 item" in wrong.error
            assert wrong.digest == began.digest
            path.write_text(json.dumps({"pools": [pool("b", second)]}))
            while (now := await configuration(address)).digest == began.digest:
                pass
            assert now.error == ""
            async with grpc.aio.insecure_channel(address) as channel:
                assert await channel.unary_unary(UNARY)(b"a", wait_for_ready=True) == b"a"
            assert (first.call_count, second.call_count) == (0, 1)
