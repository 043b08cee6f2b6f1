"""`python -m services.compiler`: the compiler service, configured by INKWELL_COMPILER_* variables (settings.py)."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import grpc
from pydantic import ValidationError

from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from services.compiler import reporting
from services.compiler.compiling import Compiler
from services.compiler.servicer import CompilerServicer
from services.compiler.settings import Settings
from services.kit import operations, report
from services.kit.metrics import Metrics
from services.kit.report import Reporter
from services.kit.server import READINESS, Health, ServiceServer, run
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.store import open_store


def build(settings: Settings) -> ServiceServer:
    """The whole service, not yet started. Raises StoreError for a store that cannot be."""
    metrics = Metrics("compiler", tenants=settings.metrics_tenants)
    store = open_store(settings.artifact_store)
    compiler = Compiler(settings, store, metrics)
    servicer = CompilerServicer(compiler, store, settings)
    reporter = Reporter("compiler")
    own_name = compiler_pb2.DESCRIPTOR.services_by_name["CompilerService"].full_name

    def register(server: grpc.aio.Server) -> list[str]:
        compiler_pb2_grpc.add_CompilerServiceServicer_to_server(servicer, server)
        return [own_name, *operations.register(server, compiler.operations), report.register(server, reporter)]

    @contextlib.asynccontextmanager
    async def lifespan(health: Health) -> AsyncIterator[None]:
        async with compiler.operations, reporter.following(lambda: reporting.describe(compiler, settings)):
            collecting = asyncio.create_task(compiler.collect(), name="collect")
            metrics.ready.set(1)
            for name in ("", READINESS, own_name):
                health.set(name, True)
            try:
                yield
            finally:
                collecting.cancel()

    return ServiceServer(
        "compiler",
        settings,
        metrics=metrics,
        devices=True,
        host=None,
        register=register,
        lifespan=lifespan,
        # Watchers would otherwise wait for the whole grace; they go on at another replica, or when this one is back.
        on_drain=compiler.operations.drain,
    )


def main() -> None:
    """Serve until SIGTERM; exits with 2 when a setting is unfit."""
    try:
        server = build(Settings())
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper() or "settings"
            print(f"INKWELL_COMPILER_{name}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoreError as error:
        print(f"INKWELL_COMPILER_ARTIFACT_STORE: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    run(server)


if __name__ == "__main__":
    main()
