"""What traces and metrics cost: throughput with them against throughput without.

Reading: the embedded model behind a gateway, with many callers, so that the engine is what limits. Each round visits a
fleet that records nothing, one that records the default share of calls and one that records every call, one after the
other; ratios are taken within a round. Passing on: a gateway before an echo service, where the gateway is all that
costs. There the processor time of its process for a call is compared, whose inverse is its throughput on a core of its
own: callers and echo share this machine's cores.

Metrics: a page that is scraped every second against none, in the same way; and what counting one call takes, measured
alone, as a share of what the gateway takes for a call.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import grpc
import psutil

from benchmarks._bars import Bar, at_most
from benchmarks._echo import UNARY
from benchmarks._running import wait_ready
from inkwell import Client
from services import local
from services.kit.metrics import Metrics

READING_ROUNDS = 7
PASSING_ROUNDS = 11
LINES = 64
CALLS = 3000
CALLERS = 16
SCRAPE_S = 1.0
COUNTED = 20_000

OFF, SHARE, ALL, SCRAPED = "off", "default share recorded", "all recorded", "page scraped"
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"

Environment = dict[str, str]


@dataclass
class _Side:
    """One of those that are compared. measure: answers its figure, of which more is worse."""

    name: str
    measure: Callable[[], float]


def run() -> dict[str, Bar]:
    """Bars are shares of throughput lost: 0.03 is 3 %."""
    bars: dict[str, Bar] = {}
    with _collector() as endpoint:
        ways = {
            OFF: {},
            SHARE: {"TRACE_ENDPOINT": endpoint},
            ALL: {"TRACE_ENDPOINT": endpoint, "TRACE_RATIO": "1"},
        }
        with ExitStack() as exits:
            sides = [_Side(name, exits.enter_context(_reading(settings))) for name, settings in ways.items()]
            lost, _ = _lost(sides, READING_ROUNDS, "reading")
        bars["reading_all_recorded"] = at_most(lost[ALL], 0.03)
        bars["reading_default_share"] = at_most(lost[SHARE], 0.03)
        with ExitStack() as exits:
            sides = [_Side(name, exits.enter_context(_passing(settings))) for name, settings in ways.items()]
            lost, _ = _lost(sides, PASSING_ROUNDS, "passing on")
        bars["gateway_default_share"] = at_most(lost[SHARE], 0.03)
    with ExitStack() as exits:
        plain = _Side(OFF, exits.enter_context(_passing({})))
        scraped = _Side(SCRAPED, exits.enter_context(_passing({}, scraped=True)))
        lost, call_s = _lost([plain, scraped], PASSING_ROUNDS, "passing on")
    bars["gateway_metrics_page"] = at_most(lost[SCRAPED], 0.01)
    counting_s = _counting_s()
    print(f"  counting a call takes {counting_s * 1e6:.1f} µs of the {call_s * 1e6:.0f} µs that the gateway takes")
    bars["gateway_counting"] = at_most(counting_s / call_s, 0.01)
    return bars


def _lost(sides: list[_Side], rounds: int, what: str) -> tuple[dict[str, float], float]:
    """Share of throughput that each but the first loses against it, and the first one's figure; medians over rounds."""
    for side in sides:
        side.measure()
    figures = [{side.name: side.measure() for side in _turned(sides, number)} for number in range(rounds)]
    base = sides[0].name
    lost = {}
    for side in sides[1:]:
        ratios = sorted(1 - each[base] / each[side.name] for each in figures)
        lost[side.name] = statistics.median(ratios)
        middle = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(f"  {what}, {side.name}: {lost[side.name]:+.1%} (middle half {middle[0]:+.1%} to {middle[1]:+.1%})")
    return lost, statistics.median(each[base] for each in figures)


def _turned(sides: list[_Side], number: int) -> list[_Side]:
    # Nobody is always the first after a change of load.
    start = number % len(sides)
    return [*sides[start:], *sides[:start]]


@contextmanager
def _reading(settings: Environment) -> Iterator[Callable[[], float]]:
    """Seconds to read LINES lines through a gateway."""
    line = (local.ROOT / "models" / "handwriting-tiny" / "samples" / "01-fox.png").read_bytes()
    with _fleet(["ocr", "gateway"], settings) as services, Client(services["gateway"].address) as client:

        def seconds() -> float:
            began = time.perf_counter()
            with ThreadPoolExecutor(CALLERS) as callers:
                list(callers.map(lambda _: client.read(line), range(LINES)))
            return time.perf_counter() - began

        yield seconds


@contextmanager
def _passing(settings: Environment, *, scraped: bool = False) -> Iterator[Callable[[], float]]:
    """Processor seconds of a gateway for a call."""
    with ExitStack() as exits:
        echo = exits.enter_context(_echo())
        metrics_port = local.free_ports(1)[0] if scraped else -1
        services = exits.enter_context(_fleet(["gateway"], settings, backend=echo, metrics_port=metrics_port))
        gateway = psutil.Process(services["gateway"].pid)
        channel = exits.enter_context(grpc.insecure_channel(services["gateway"].address))
        call = channel.unary_unary(UNARY)
        if scraped:
            exits.enter_context(_scraping(f"http://127.0.0.1:{metrics_port}/metrics"))

        def seconds() -> float:
            before = gateway.cpu_times()
            with ThreadPoolExecutor(CALLERS) as callers:
                list(callers.map(lambda _: call(bytes(1024)), range(CALLS)))
            after = gateway.cpu_times()
            return (after.user + after.system - before.user - before.system) / CALLS

        yield seconds


@contextmanager
def _fleet(
    names: list[str], settings: Environment, *, backend: int = 0, metrics_port: int = -1
) -> Iterator[dict[str, local.Service]]:
    """Services, ready, each with these settings. backend: port of what the gateway takes for the OCR service."""
    ports = dict(zip(names, ((port, metrics_port) for port in local.free_ports(len(names))), strict=True))
    known = ports if not backend else {**ports, "ocr": (backend, -1)}
    given = {f"INKWELL_{name.upper()}_{key}": value for name in names for key, value in settings.items()}
    with TemporaryDirectory(prefix="inkwell-") as folder, contextlib.ExitStack() as exits:
        with patch.dict(os.environ, given):
            services = [local.spawn(name, known, Path(folder)) for name in names]
        exits.callback(local.stop, services)
        for service in services:
            wait_ready(service, Path(folder) / f"{service.name}.log")
        yield {service.name: service for service in services}


@contextmanager
def _echo() -> Iterator[int]:
    (port,) = local.free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks._echo", str(port)])
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _collector() -> Iterator[str]:
    """Takes spans and does nothing with them: what a collector costs is not the question."""
    server = grpc.server(ThreadPoolExecutor(1))
    taken = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
    service, _, method = _EXPORT[1:].rpartition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: taken}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def _scraping(page: str) -> Iterator[None]:
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_S):
            urllib.request.urlopen(page, timeout=10).read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _counting_s() -> float:
    """Seconds that counting one call takes."""
    metrics = Metrics("gateway")
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(COUNTED):
            metrics.in_flight.inc()
            metrics.in_flight.dec()
            metrics.ended(UNARY, "OK", model="handwriting-tiny", hardware="cpu", seconds=0.05, tenant="a")
        best = min(best, (time.perf_counter() - began) / COUNTED)
    return best
