"""Endpoints that come and go: names that are looked up again, and the EndpointSlices of Kubernetes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway import config
from services.gateway.__main__ import make_fleet
from services.gateway.config import ConfigError
from services.gateway.endpoint import State
from services.gateway.settings import Settings
from tests.integration.test_gateway_routing import Names, served_by
from tests.support.backend import BIDI, Backend
from tests.support.gateway import Gateway, running
from tests.support.kube_api import TOKEN, KubeApi, endpoint_slice


@contextlib.asynccontextmanager
async def on_loopback(count: int) -> AsyncIterator[list[Backend]]:
    """Backends at 127.0.0.1, 127.0.0.2 …, at one and the same port, as pods of a Service are."""
    first = await Backend().start()
    others = []
    for i in range(1, count):
        other = Backend()
        other.port = first.port
        others.append(await other.start(host=f"127.0.0.{i + 1}"))
    try:
        yield [first, *others]
    finally:
        for backend in (first, *others):
            await backend.stop()


def named(target: str) -> dict[str, Any]:
    return {"name": "reads", "service": "ocr", "hardware": "cpu", "targets": [target]}


async def until_at(gateway: Gateway, *hosts: str) -> None:
    """Return when the pool has exactly these hosts, and all are ready."""
    reads = gateway.fleet.pools[0]

    def there() -> bool:
        ready = [e.address.rpartition(":")[0] for e in reads.endpoints if e.state is State.READY]
        return len(ready) == len(reads.endpoints) and sorted(ready) == sorted(hosts)

    async with asyncio.timeout(60):
        await gateway.until(there)


async def test_the_successor_of_an_endpoint_that_is_gone_is_looked_for_at_once() -> None:
    names = Names("127.0.0.1")
    async with on_loopback(2) as (first, _):
        target = named(f"dns:///ocr.internal:{first.port}")
        async with running(target, resolver=names, resolve_interval_s=3600) as gateway:
            names.addresses = ["127.0.0.2"]
            await first.stop()
            await until_at(gateway, "127.0.0.2")
            assert await served_by(gateway) == "reads"


@contextlib.asynccontextmanager
async def in_cluster(api: KubeApi, folder: Path, target: str) -> AsyncIterator[Gateway]:
    async with (
        api.serving(folder) as account,
        running(named(target), kubernetes_url=api.url, kubernetes_account=account, wait=False) as gateway,
    ):
        yield gateway


@pytest.mark.parametrize("by", ["number", "name"])
async def test_pods_come_and_go_by_the_slices_of_their_service(tmp_path: Path, by: str) -> None:
    api = KubeApi()
    async with on_loopback(3) as (first, _, _):
        port = first.port
        api.put(endpoint_slice("ocr-1", "127.0.0.1", port=port))
        api.put(endpoint_slice("other-1", "127.0.0.9", service="other", port=port))
        target = f"k8s:///prod/ocr:{port if by == 'number' else 'grpc'}"
        async with in_cluster(api, tmp_path, target) as gateway:
            await until_at(gateway, "127.0.0.1")
            await api.watched.wait()
            assert api.requests[0] == {"labelSelector": "kubernetes.io/service-name=ocr"}

            held = gateway.channel.stream_stream(BIDI)()
            await held.write(b"a")
            assert await held.read() == b"a"
            # A second slice, and the first pod terminates: no new call goes there, and the one under way goes on.
            api.put(endpoint_slice("ocr-2", "127.0.0.2", "127.0.0.3", port=port))
            api.put(endpoint_slice("ocr-1", leaving=("127.0.0.1",), port=port))
            await until_at(gateway, "127.0.0.2", "127.0.0.3")
            for _ in range(4):
                await served_by(gateway)
            assert first.call_count == 1
            await held.write(b"b")
            assert await held.read() == b"b"
            await held.done_writing()

            # A pod that moves between slices is in both for a while, and is one endpoint.
            api.put(endpoint_slice("ocr-1", "127.0.0.2", port=port))
            api.put(endpoint_slice("ocr-2", "127.0.0.2", "127.0.0.3", port=port))
            api.delete("ocr-2")
            await until_at(gateway, "127.0.0.2")


async def test_a_watch_goes_on_from_where_it_was_and_lists_anew_when_that_is_too_old(tmp_path: Path) -> None:
    api = KubeApi()
    async with on_loopback(3) as (first, _, _):
        api.put(endpoint_slice("ocr-1", "127.0.0.1", port=first.port))
        async with in_cluster(api, tmp_path, "k8s:///prod/ocr:grpc") as gateway:
            await api.watched.wait()
            api.bookmark()
            api.end_watches()
            await api.watched.wait()
            assert [r.get("resourceVersion") for r in api.requests] == [None, "101", "102"]

            # What changed while nobody watched is in the next watch.
            api.end_watches()
            api.put(endpoint_slice("ocr-2", "127.0.0.2", port=first.port))
            await until_at(gateway, "127.0.0.1", "127.0.0.2")

            api.end_watches()
            del api.slices["ocr-1"]
            api.version += 10
            api.expired_before = api.version
            await until_at(gateway, "127.0.0.2")
            lists = [r for r in api.requests if "watch" not in r]
            assert len(lists) == 2


@pytest.mark.parametrize(
    "event",
    [
        {"type": "ADDED", "object": {"metadata": {}}},
        {"type": "ADDED"},
        {"type": "SHRUNK", "object": {"metadata": {"resourceVersion": "1"}}},
        {"type": "ERROR", "object": {"code": 500, "message": "etcd is away"}},
        {"type": "MODIFIED", "object": {"metadata": {"name": "x"}, "endpoints": [{"addresses": []}]}},
        [],
    ],
    ids=["no name", "no object", "no type", "error", "no address", "no event"],
)
async def test_what_the_api_server_should_not_say_costs_nothing(tmp_path: Path, event: Any) -> None:
    api = KubeApi()
    async with on_loopback(2) as (first, _):
        api.put(endpoint_slice("ocr-1", "127.0.0.1", port=first.port))
        async with in_cluster(api, tmp_path, "k8s:///prod/ocr:grpc") as gateway:
            await until_at(gateway, "127.0.0.1")
            await api.watched.wait()
            api.watched.clear()
            api.send(event)
            await api.watched.wait()  # another list, another watch
            assert await served_by(gateway) == "reads"
            api.put(endpoint_slice("ocr-1", "127.0.0.2", port=first.port))
            await until_at(gateway, "127.0.0.2")


async def test_a_token_that_is_replaced_is_shown_from_then_on_and_a_refusal_empties_no_pool(tmp_path: Path) -> None:
    api = KubeApi()
    async with on_loopback(2) as (first, _):
        api.put(endpoint_slice("ocr-1", "127.0.0.1", port=first.port))
        async with in_cluster(api, tmp_path, "k8s:///prod/ocr:grpc") as gateway:
            await until_at(gateway, "127.0.0.1")
            await api.watched.wait()
            api.token = "the-next-one"
            api.end_watches()
            while 401 not in api.statuses:
                api.asked.clear()
                await api.asked.wait()
            assert await served_by(gateway) == "reads"

            (tmp_path / "account" / "token").write_text("the-next-one")
            api.put(endpoint_slice("ocr-1", "127.0.0.2", port=first.port))
            await until_at(gateway, "127.0.0.2")


async def test_a_gateway_starts_without_its_api_server_and_goes_on_when_it_comes(tmp_path: Path) -> None:
    api = KubeApi()
    async with on_loopback(1) as (first,):
        api.put(endpoint_slice("ocr-1", "127.0.0.1", port=first.port))
        api.token = "not yet"
        async with api.serving(tmp_path) as account:
            (account / "token").write_text(TOKEN)
            starting = asyncio.create_task(_start(api, account, first))
            while 401 not in api.statuses:
                api.asked.clear()
                await api.asked.wait()
            api.token = TOKEN
            await starting


async def _start(api: KubeApi, account: Path, first: Backend) -> None:
    target = named(f"k8s:///prod/ocr:{first.port}")
    async with running(target, kubernetes_url=api.url, kubernetes_account=account, wait=False) as gateway:
        await until_at(gateway, "127.0.0.1")
        assert await served_by(gateway) == "reads"


def test_a_kubernetes_target_outside_of_kubernetes_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    text = '{"pools": [{"name": "reads", "service": "ocr", "hardware": "cpu", "targets": ["k8s:///prod/ocr:grpc"]}]}'
    with pytest.raises(ConfigError, match="k8s:///prod/ocr:grpc needs a Kubernetes API server.*KUBERNETES_URL"):
        make_fleet(Settings(), config.parse(text))
