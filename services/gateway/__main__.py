"""`python -m services.gateway [--config FILE]`: one address in front of every pool of every service."""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pydantic
from prometheus_client import CollectorRegistry

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway import config as configuration
from services.gateway.access import Access
from services.gateway.balance import BalanceRules
from services.gateway.check import check
from services.gateway.config import ConfigError, GatewayConfig
from services.gateway.discovery import Resolver, resolve_host
from services.gateway.ejection import EjectionRules
from services.gateway.endpoint import ChannelOptions
from services.gateway.kubernetes import api_server
from services.gateway.member import Member
from services.gateway.methods import FULL_NAMES, SHARED_NAMES
from services.gateway.metrics import GatewayMetrics
from services.gateway.overload import Overload
from services.gateway.pools import Fleet, Ways
from services.gateway.proxy import Proxy
from services.gateway.reload import Reloading
from services.gateway.routed import Routing
from services.gateway.servicer import GatewayServicer
from services.gateway.settings import Settings
from services.gateway.supervisor import process_count, supervise
from services.kit.metrics import Metrics
from services.kit.server import READINESS, Health, ServiceServer, run
from services.kit.tls import TlsError, TlsFolder


def build(settings: Settings, *, member: Member | None = None) -> ServiceServer:
    """The gateway's server, with the pools of the file that the settings name; raises ConfigError."""
    contents = configuration.read(settings.config)
    config = configuration.parse(configuration.decode(contents, settings.config), name=str(settings.config))
    return assemble(settings, make_fleet(settings, config), member=member, contents=contents)


def make_fleet(settings: Settings, config: GatewayConfig, *, resolver: Resolver = resolve_host) -> Fleet:
    """The pools of a configuration, with connections as the settings say."""
    ways = Ways(
        options=ChannelOptions(
            settings.connect_timeout_s,
            settings.keepalive_time_s,
            settings.keepalive_timeout_s,
            tls=None if settings.services_folder is None else TlsFolder(settings.services_folder),
            server_name=settings.services_tls_name,
        ),
        resolver=resolver,
        resolve_interval_s=settings.resolve_interval_s,
        kubernetes=api_server(settings.kubernetes_url, settings.kubernetes_account),
        load_interval_s=settings.load_interval_s,
        balance=BalanceRules(stale_s=settings.load_stale_s, slow_start_s=settings.slow_start_s),
        ejection=EjectionRules(consecutive=settings.eject_after, first_s=settings.eject_s),
    )
    return Fleet(config, ways)


def assemble(
    settings: Settings, fleet: Fleet, *, member: Member | None = None, contents: bytes | None = None
) -> ServiceServer:
    """A server in front of the fleet, which runs while the server does; `member` if it is one process of several.

    contents: of the file that the settings name, which is followed from then on; None if the fleet comes from no file.
    """
    metrics = Metrics("gateway", tenants=settings.metrics_tenants)
    reloading: Reloading | None = None
    if contents is not None:
        reloading = Reloading(
            settings.config,
            contents,
            interval_s=settings.reload_interval_s,
            apply=fleet.apply,
            registry=metrics.registry,
        )
    overload = Overload(fleet, settings, metrics.registry)
    access = Access(settings, metrics.registry)
    routing = Routing(fleet, settings, GatewayMetrics(metrics.registry, fleet), overload, access)
    own_name = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

    def register(server: grpc.aio.Server) -> list[str]:
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(GatewayServicer(fleet, reloading), server)
        server.add_generic_rpc_handlers((Proxy(routing),))
        return [own_name, *FULL_NAMES.values(), *SHARED_NAMES]

    @contextlib.asynccontextmanager
    async def lifespan(health: Health) -> AsyncIterator[None]:
        def changed() -> None:
            overload.fleet_changed()
            ready = fleet.ready()
            metrics.ready.set(ready)
            names = {"": ready, READINESS: ready} | {full: fleet.ready(name) for name, full in FULL_NAMES.items()}
            if member is not None:
                member.tell(names)
                return
            for name, serving in names.items():
                health.set(name, serving)

        health.set(own_name, True)
        async with contextlib.AsyncExitStack() as exits:
            if member is not None:
                await exits.enter_async_context(member.connected(metrics.registry, health.set))
            fleet.on_change = changed
            changed()
            await exits.enter_async_context(access.running())
            await exits.enter_async_context(fleet.running())
            if member is not None:
                await member.serving(fleet)
            if reloading is not None:
                following = asyncio.create_task(reloading.run(), name="reload")
                exits.callback(following.cancel)
            yield

    return ServiceServer(
        "gateway",
        settings,
        metrics=metrics,
        host=None,
        register=register,
        lifespan=lifespan,
        share_port=member is not None,
        guard=access.guard,
    )


@contextlib.contextmanager
def saying_what_is_wrong() -> Iterator[None]:
    """End the program with 2 for a wrong setting or configuration file, after a line for each."""
    try:
        yield
    except pydantic.ValidationError as error:
        for wrong in error.errors():
            setting = "INKWELL_GATEWAY_" + "_".join(str(part) for part in wrong["loc"]).upper()
            print(f"gateway: {setting}: {wrong['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ConfigError, TlsError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main() -> None:
    """Serve until SIGTERM or SIGINT. A wrong setting or configuration file ends with 2 and says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description=__doc__)
    parser.add_argument("--config", type=Path, help="the file that names the pools (or INKWELL_GATEWAY_CONFIG)")
    checking = parser.add_subparsers(dest="command", metavar="check").add_parser(
        "check", help="say whether a configuration file is right and what it does, and end"
    )
    checking.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "check":
        with saying_what_is_wrong():
            print("\n".join(check(arguments.file)))
        return
    with saying_what_is_wrong():
        settings = Settings() if arguments.config is None else Settings(config=arguments.config)
        several = process_count(settings) > 1
        if several:
            configuration.load(settings.config)  # to say what is wrong with it once
            Access(settings, CollectorRegistry())
        else:
            server = build(settings)
    if several:
        supervise(settings)
    else:
        run(server)


if __name__ == "__main__":
    main()
