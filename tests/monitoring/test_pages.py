"""The pages of metrics of services that run: clean, small, and what dashboards and rules name is there."""

import json
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services import local
from services.compiler.__main__ import build as build_compiler
from services.diffusion.__main__ import build as build_diffusion
from services.diffusion.settings import Settings as DiffusionSettings
from services.gateway.__main__ import build as build_gateway
from services.gateway.settings import Settings as GatewaySettings
from services.gateway.supervisor import Supervisor
from services.kit import device_metrics
from services.kit.metrics import Metrics
from services.ocr.__main__ import build as build_ocr
from services.ocr.settings import Settings as OcrSettings
from tests.support import gateway, prometheus
from tests.support.compiler_service import settings as compiler_settings

BYTES_MOST = 500_000
# What a scrape adds to every series, with the component's PodMonitor.
OF_THE_SCRAPE = {"namespace", "pod", "pool", "job", "instance", "container", "endpoint"}
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
# One machine's stand-in for what only a Kubernetes cluster or a Prometheus has.
OF_PROMETHEUS = {"up"}
POOL = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": ["127.0.0.1:1"]}


def read(port: int, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pages(fleet: dict[str, local.Service], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page of each service, and of a gateway with several processes."""
    found = {name: read(service.metrics_port) for name, service in fleet.items()}
    server = build_compiler(compiler_settings(tmp_path_factory.mktemp("compiler"), metrics_port=0))
    await server.start()
    try:
        found["compiler"] = read(server.metrics_port)
    finally:
        await server.stop(0)
    several = await Supervisor(GatewaySettings(processes=2)).metrics()
    found["gateway of several processes"] = generate_latest(_Fixed(several)).decode()
    return found


class _Fixed(CollectorRegistry):
    def __init__(self, metrics: list[Any]) -> None:
        super().__init__()
        held = type("Held", (Collector,), {"collect": lambda self: metrics})
        self.register(held())


def test_promtool_finds_nothing_to_say(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        done = prometheus.promtool("check", "metrics", input=page)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), name


def test_the_openmetrics_form_is_right(fleet: dict[str, local.Service]) -> None:
    for service in fleet.values():
        page = read(service.metrics_port, OPEN_METRICS)
        names = {family.name for family in text_string_to_metric_families(page)}  # type: ignore[no-untyped-call]
        assert "inkwell_request_seconds" in names


# --- what dashboards and rules name ---


def exported(page: str) -> set[str]:
    """The names of all series that a page's families can have."""
    names = set()
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
            if kind == "summary":
                names |= {f"{name}_sum", f"{name}_count"}
    return names


_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# PromQL's own words; functions are told by their bracket.
_WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "on",
    "without",
    "ignoring",
    "group_left",
    "group_right",
    "bool",
    "offset",
    "inf",
}


def named(expr: str) -> set[str]:
    """The metrics that an expression names."""
    found = set(re.findall(r'__name__=~?"([^"]+)"', expr))
    found = {name for group in found for name in group.split("|")}
    rest = re.sub(r'"[^"]*"', '""', expr)
    rest = re.sub(r"\{[^}]*\}", "", rest)
    rest = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", "", rest)
    rest = re.sub(r"\[[^\]]*\]", "", rest)
    for match in _NAME.finditer(rest):
        called = rest[match.end() :].lstrip().startswith("(")
        numeral = match.start() > 0 and rest[match.start() - 1].isdigit()
        if not called and not numeral and match[0] not in _WORDS:
            found.add(match[0])
    return found


def recorded() -> set[str]:
    return {rule["record"] for rule in prometheus.rules() if "record" in rule}


def panels() -> Iterable[tuple[str, str]]:
    """The expression of every line of every dashboard, and where it is."""
    for path in sorted((prometheus.MONITORING / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.stem}: {panel['title']}", target["expr"]


def unknown(expressions: Iterable[tuple[str, str]], known: set[str]) -> list[str]:
    return [f"{where} names {name}" for where, expr in expressions for name in sorted(named(expr) - known)]


def test_dashboards_name_only_what_somebody_exports(pages: dict[str, str]) -> None:
    known = set().union(*map(exported, pages.values()), recorded(), ONLY_WITH_TLS)
    assert unknown(panels(), known) == []
    made_up = [("here", 'sum by (pool) (rate(inkwell_batch_sizes_sum{pool="a"}[5m])) / on (pool) inkwell_engine_slots')]
    assert unknown(made_up, known) == ["here names inkwell_batch_sizes_sum"]


ONLY_WITH_TLS = {"inkwell_certificate_expires_seconds"}


def test_rules_name_only_what_somebody_exports(pages: dict[str, str]) -> None:
    known = set().union(*map(exported, pages.values()), recorded(), ONLY_WITH_TLS, OF_PROMETHEUS)
    expressions = [(rule.get("record") or rule["alert"], rule["expr"]) for rule in prometheus.rules()]
    assert unknown(expressions, known) == []


def test_a_certificates_end_is_exported_under_the_name_that_rules_use() -> None:
    metrics = Metrics("ocr")
    metrics.follow_certificate(lambda: 1.0)
    assert exported(generate_latest(metrics.registry).decode()) >= ONLY_WITH_TLS


def test_what_people_see_is_of_every_service_and_in_the_documentation(pages: dict[str, str]) -> None:
    documented = set(re.findall(r"`(inkwell_[a-z_]+)", (local.ROOT / "docs" / "metrics.md").read_text()))
    families = {
        line.split()[2] for page in pages.values() for line in page.splitlines() if line.startswith("# TYPE inkwell_")
    }
    assert families - documented == set()
    assert documented - families - ONLY_WITH_TLS == set()


# --- labels ---


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every metric of every service, by the name of its series."""
    found: dict[str, set[str]] = {}
    ocr, diffusion = build_ocr(OcrSettings()), build_diffusion(DiffusionSettings())
    compiler = build_compiler(compiler_settings(tmp_path_factory.mktemp("labels")))
    device_metrics.register(ocr.metrics.registry, [device_metrics.Host()])
    ocr.metrics.follow_certificate(lambda: 1.0)
    config = tmp_path_factory.mktemp("gateway") / "gateway.yaml"
    config.write_text(json.dumps({"pools": [POOL]}))
    servers = (ocr, diffusion, compiler, build_gateway(GatewaySettings(config=config)))
    for registry in (server.metrics.registry for server in servers):
        for collector in list(registry._collector_to_names):
            own = getattr(collector, "_labelnames", None)
            for family in collector.collect():
                given = own if own is not None else getattr(family, "_labelnames", ())
                for name in (family.name, *(f"{family.name}_{end}" for end in ("total", "sum", "count"))):
                    found.setdefault(name, set()).update(given)
                found.setdefault(f"{family.name}_bucket", set()).update((*given, "le"))
    found["inkwell_gateway_processes"] = {"state"}
    found["inkwell_gateway_process_restarts_total"] = set()
    for rule in prometheus.rules():
        if "record" in rule:
            own = re.findall(r"\bby \(([^)]*)\)", rule["expr"])[:1]
            given = {label.strip() for group in own for label in group.split(",")} | set(rule.get("labels", {}))
            found.setdefault(rule["record"], set()).update(given)
    return found


def test_dashboards_use_only_labels_that_their_metrics_have(labels: dict[str, set[str]]) -> None:
    wrong = []
    for where, expr in panels():
        for name, matchers in re.findall(r"([a-z_:0-9]+)\{([^}]*)\}", expr):
            used = set(re.findall(r"([a-z_]+)\s*=?[=~!]~?\s*\"", matchers))
            wrong += [f"{where}: {name} has no label {label}" for label in used - labels[name] - OF_THE_SCRAPE]
        names = named(expr) - {"slo:inkwell_objective:ratio"}
        for group in re.findall(r"\bby \(([^)]*)\)", expr):
            for label in (part.strip() for part in group.split(",")):
                wrong += [
                    f"{where}: {name} has no label {label}"
                    for name in names
                    if label not in labels[name] | OF_THE_SCRAPE
                ]
    assert wrong == []


# --- size ---


@pytest.mark.parametrize("tenants", [100, 250], ids=["as it is set", "as it can be set"])
async def test_a_thousand_tenants_fit_on_a_page(tenants: int, tmp_path: Path) -> None:
    compiler = build_compiler(compiler_settings(tmp_path, metrics_tenants=tenants))
    servers = [
        build_ocr(OcrSettings(metrics_tenants=tenants)),
        build_diffusion(DiffusionSettings(metrics_tenants=tenants)),
        compiler,
    ]
    async with gateway.running(POOL, wait=False, metrics_tenants=tenants) as running:
        for server in (*servers, running.server):
            fill(server.metrics)
            assert len(generate_latest(server.metrics.registry)) < BYTES_MOST


def fill(metrics: Metrics) -> None:
    """A thousand tenants call thirty methods with a hundred models, and their calls end in every way."""
    codes = ("OK", "CANCELLED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INVALID_ARGUMENT")
    for number in range(1000):
        for code in codes:
            metrics.ended(
                f"inkwell.ocr.v1.OcrService/Method{number % 30}",
                code,
                model=f"handwriting-{number % 100}",
                hardware="cuda",
                seconds=0.1,
                tenant=f"certificate/team-{number}.example.com",
            )
