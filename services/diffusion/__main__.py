"""`python -m services.diffusion`: settings, engine host, servicer, serve."""

import contextlib
import sys
from collections.abc import AsyncIterator

import grpc
from pydantic import ValidationError

from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from services.diffusion.servicer import DiffusionServicer
from services.diffusion.settings import Settings
from services.kit import report
from services.kit.engine_host import EngineHost
from services.kit.metrics import Metrics
from services.kit.repeats import Repeats
from services.kit.report import Reporter
from services.kit.server import Health, ServiceServer, run

# The only one whose work is worth not doing twice.
_REPEATABLE = ("/inkwell.diffusion.v1.DiffusionService/Generate",)

ENGINE_FACTORY = "services.diffusion.engine.main:create_engine"


def build(settings: Settings) -> ServiceServer:
    """The service, not yet started."""
    metrics = Metrics("diffusion", tenants=settings.metrics_tenants)
    host = EngineHost(ENGINE_FACTORY, settings, slots=settings.max_concurrent_calls, metrics=metrics)
    servicer = DiffusionServicer(settings, host, metrics)
    reporter = Reporter("diffusion")
    host.on_info_change = reporter.look_again

    def register(server: grpc.aio.Server) -> list[str]:
        diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(servicer, server)
        return [
            diffusion_pb2.DESCRIPTOR.services_by_name["DiffusionService"].full_name,
            report.register(server, reporter),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(health: Health) -> AsyncIterator[None]:
        async with reporter.following(servicer.report):
            yield

    return ServiceServer(
        "diffusion",
        settings,
        metrics=metrics,
        devices=True,
        host=host,
        register=register,
        lifespan=lifespan,
        interceptors=[Repeats(_REPEATABLE, settings, metrics)],
    )


def main() -> None:
    """Serve until told to stop; exits with 2 when a setting is unfit."""
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper() or "settings"
            print(f"INKWELL_DIFFUSION_{name}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
    run(build(settings))


if __name__ == "__main__":
    main()
