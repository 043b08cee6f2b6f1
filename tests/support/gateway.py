"""A gateway in front of the backends a test chooses."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from services.gateway import config
from services.gateway.__main__ import assemble, make_fleet
from services.gateway.discovery import Resolver, resolve_host
from services.gateway.endpoint import Endpoint, State
from services.gateway.pools import Fleet
from services.gateway.settings import Settings
from services.kit.server import ServiceServer
from tests.support.backend import Backend


@dataclass
class Gateway:
    """A running gateway and a channel to it."""

    server: ServiceServer
    fleet: Fleet
    channel: grpc.aio.Channel

    def endpoint(self, backend: Backend) -> Endpoint:
        return next(e for pool in self.fleet.pools for e in pool.endpoints if e.address == backend.address)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once it holds; looked at after every change of an endpoint."""
        while not condition():
            await self.fleet.wait_change()

    async def until_state(self, backend: Backend, state: State) -> None:
        await self.until(lambda: self.endpoint(backend).state is state)

    async def idle(self) -> None:
        """Return when no call is under way in the gateway: callers have their status a little before."""
        await self.server._boundary.wait_idle()


def pool(name: str, *backends: Backend, service: str = "ocr", hardware: str = "cpu") -> dict[str, Any]:
    """A pool of the configuration file."""
    return {"name": name, "service": service, "hardware": hardware, "targets": [b.address for b in backends]}


@contextlib.asynccontextmanager
async def running(
    *pools: dict[str, Any],
    defaults: dict[str, list[str]] | None = None,
    wait: bool = True,
    resolver: Resolver = resolve_host,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """Start a gateway; with `wait`, return when every endpoint is ready."""
    chosen = Settings(port=0, **settings)
    fleet = make_fleet(
        chosen, config.parse(json.dumps({"pools": pools, "defaults": defaults or {}})), resolver=resolver
    )
    server = assemble(chosen, fleet)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{server.port}",
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)],
        ) as channel:
            gateway = Gateway(server, fleet, channel)
            if wait:
                async with asyncio.timeout(10):
                    await gateway.until(
                        lambda: all(p.endpoints and p.count(State.READY) == len(p.endpoints) for p in fleet.pools)
                    )
            yield gateway
    finally:
        await server.stop(0)
