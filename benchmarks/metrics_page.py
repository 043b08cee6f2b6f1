"""How long a scrape takes and how much it brings, of every service after a thousand tenants have called.

As Prometheus asks: in the OpenMetrics form, compressed. What is measured is the whole answer over HTTP, while nothing
else runs in the process. The tenants are more than have series of their own, as the setting METRICS_TENANTS has it.
"""

import asyncio
import gzip
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks._bars import Bar, at_most
from services.compiler.__main__ import build as build_compiler
from services.compiler.settings import Settings as CompilerSettings
from services.diffusion.__main__ import build as build_diffusion
from services.diffusion.settings import Settings as DiffusionSettings
from services.gateway.__main__ import build as build_gateway
from services.gateway.settings import Settings as GatewaySettings
from services.kit import device_metrics
from services.kit.metrics import Metrics, MetricsPage
from services.ocr.__main__ import build as build_ocr
from services.ocr.settings import Settings as OcrSettings

SCRAPES = 30
TENANTS = 1000
METHODS = 10  # as many as the largest service has
MODELS = 20
CODES = ("OK", "CANCELLED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INVALID_ARGUMENT")
_ASKED = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}


def fill(metrics: Metrics) -> None:
    """A thousand tenants call every method with twenty models, and their calls end in every way."""
    for number in range(TENANTS):
        for code in CODES:
            metrics.ended(
                f"inkwell.ocr.v1.OcrService/Method{number % METHODS}",
                code,
                model=f"handwriting-{number % MODELS}",
                hardware="cuda",
                seconds=0.1,
                tenant=f"certificate/team-{number}.example.com",
                trace_id=f"{number:032x}",
            )


def _services(folder: Path) -> Iterator[tuple[str, Metrics]]:
    config = folder / "gateway.yaml"
    pools = [f'{{name: ocr-{n}, service: ocr, hardware: cpu, targets: ["127.0.0.1:{n + 1}"]}}' for n in range(10)]
    config.write_text(f"pools: [{', '.join(pools)}]")
    yield "gateway", build_gateway(GatewaySettings(config=config)).metrics
    yield "ocr", build_ocr(OcrSettings()).metrics
    yield "diffusion", build_diffusion(DiffusionSettings()).metrics
    compiler = CompilerSettings(
        artifact_store=str(folder / "artifacts"), operations_database=str(folder / "operations.sqlite")
    )
    yield "compiler", build_compiler(compiler).metrics


def _scrape(port: int) -> tuple[float, int]:
    """Milliseconds that a scrape takes, and the bytes of the page."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=_ASKED)
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return (time.perf_counter() - began) * 1000, len(gzip.decompress(content))


async def _measure() -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    with tempfile.TemporaryDirectory(prefix="metrics-page-") as folder:
        for name, metrics in _services(Path(folder)):
            if name != "gateway":
                device_metrics.register(metrics.registry, device_metrics.find())
            fill(metrics)
            with closing(MetricsPage(metrics.registry, "127.0.0.1", 0)) as page:
                _scrape(page.port)
                scrapes = [_scrape(page.port) for _ in range(SCRAPES)]
            times = [took for took, _ in scrapes]
            size = scrapes[-1][1]
            print(f"  {name:<10} {statistics.median(times):6.1f} ms (most {max(times):6.1f})  {size / 1000:6.1f} kB")
            bars[f"{name}: ms"] = at_most(statistics.median(times), 100.0)
            bars[f"{name}: kB"] = at_most(size / 1000, 500.0)
    return bars


def run() -> dict[str, Bar]:
    """Milliseconds a scrape, median, and kilobytes a page."""
    return asyncio.run(_measure())
