"""`python -m services.ocr`: the OCR service, configured by INKWELL_OCR_* variables (services/ocr/settings.py)."""

import contextlib
import sys
from collections.abc import AsyncIterator

import grpc
from pydantic import ValidationError

from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit import report
from services.kit.engine_host import EngineHost
from services.kit.metrics import Metrics
from services.kit.repeats import Repeats
from services.kit.report import Reporter
from services.kit.server import Health, ServiceServer, run
from services.ocr.servicer import OcrServicer
from services.ocr.settings import Settings

# Those whose work is worth not doing twice; a stream of requests cannot be repeated, and the others take no time.
_REPEATABLE = tuple(
    f"/inkwell.ocr.v1.OcrService/{name}" for name in ("Recognize", "StreamRecognize", "ReadDocument", "Embed")
)

ENGINE_FACTORY = "services.ocr.engine.main:create_engine"


def build(settings: Settings) -> ServiceServer:
    """The whole service, not yet started."""
    metrics = Metrics("ocr", tenants=settings.metrics_tenants)
    host = EngineHost(ENGINE_FACTORY, settings, slots=settings.max_jobs, metrics=metrics)
    servicer = OcrServicer(host, settings, metrics)
    reporter = Reporter("ocr")
    host.on_info_change = reporter.look_again

    def register(server: grpc.aio.Server) -> list[str]:
        ocr_pb2_grpc.add_OcrServiceServicer_to_server(servicer, server)
        return [ocr_pb2.DESCRIPTOR.services_by_name["OcrService"].full_name, report.register(server, reporter)]

    @contextlib.asynccontextmanager
    async def lifespan(health: Health) -> AsyncIterator[None]:
        try:
            async with reporter.following(servicer.report):
                yield
        finally:
            servicer.close()

    return ServiceServer(
        "ocr",
        settings,
        metrics=metrics,
        devices=True,
        host=host,
        register=register,
        lifespan=lifespan,
        interceptors=[Repeats(_REPEATABLE, settings, metrics)],
    )


def main() -> None:
    """Serve until SIGTERM; exits with 2 when a setting is unfit."""
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper() or "settings"
            print(f"INKWELL_OCR_{name}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
    run(build(settings))


if __name__ == "__main__":
    main()
