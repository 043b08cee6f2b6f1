"""A gateway in front of the backends a test chooses."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway import config
from services.gateway.__main__ import assemble, make_fleet
from services.gateway.discovery import Resolver, resolve_host
from services.gateway.endpoint import Endpoint, State
from services.gateway.pools import Fleet
from services.gateway.settings import Settings
from services.kit.server import ServiceServer
from tests.support.backend import Backend
from tests.support.fault_proxy import FaultProxy
from tests.support.service_process import ServiceProcess

Somewhere = Backend | FaultProxy | ServiceProcess  # all that a pool needs of it is its `address`


@dataclass
class Gateway:
    """A running gateway and a channel to it."""

    server: ServiceServer
    fleet: Fleet
    channel: grpc.aio.Channel

    def endpoint(self, backend: Somewhere) -> Endpoint:
        return next(e for pool in self.fleet.pools for e in pool.endpoints if e.address == backend.address)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once it holds; looked at after every change of an endpoint."""
        while not condition():
            await self.fleet.wait_change()

    async def until_state(self, backend: Somewhere, state: State) -> None:
        await self.until(lambda: self.endpoint(backend).state is state)

    async def idle(self) -> None:
        """Return when no call is under way in the gateway: callers have their status a little before."""
        await self.server._boundary.wait_idle()


def pool(name: str, *backends: Somewhere, service: str = "ocr", hardware: str = "cpu") -> dict[str, Any]:
    """A pool of the configuration file."""
    return {"name": name, "service": service, "hardware": hardware, "targets": [b.address for b in backends]}


@contextlib.asynccontextmanager
async def running(
    *pools: dict[str, Any],
    defaults: dict[str, list[str]] | None = None,
    wait: bool = True,
    resolver: Resolver = resolve_host,
    unchecked: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """Start a gateway; with `wait`, return when every endpoint is ready.

    unchecked: settings beyond what users may set, such as a keepalive that a test can wait for.
    """
    chosen = Settings(port=0, **settings).model_copy(update=unchecked)
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
                async with asyncio.timeout(60):
                    await gateway.until(
                        lambda: all(p.endpoints and p.count(State.READY) == len(p.endpoints) for p in fleet.pools)
                    )
            yield gateway
    finally:
        await server.stop(0)


def gateway_process(config: Path, **settings: str) -> ServiceProcess:
    """One that is not started yet."""
    return ServiceProcess("services.gateway", "INKWELL_GATEWAY_", {"config": str(config), **settings})


async def ready(process: ServiceProcess) -> None:
    """Return when it says that it is ready for calls."""
    async with grpc.aio.insecure_channel(process.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        async for answer in watch(health_pb2.HealthCheckRequest(service="readiness"), wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def all_ready(process: ServiceProcess) -> None:
    """Return when it sends calls to every endpoint of its first pool."""
    async with grpc.aio.insecure_channel(process.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        fleet = gateway_pb2_grpc.GatewayServiceStub(channel)
        while True:
            answer = await fleet.ListPools(gateway_pb2.ListPoolsRequest(), wait_for_ready=True)
            states = {endpoint.state for endpoint in answer.pools[0].endpoints}
            if states == {gateway_pb2.ENDPOINT_STATE_READY}:
                return
            await asyncio.sleep(0.05)  # nobody is told
