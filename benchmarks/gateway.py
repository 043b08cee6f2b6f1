"""What the gateway costs: calls straight to a service, through the gateway, and through nginx in the gateway's place.

An echo service answers, so that nothing but transport is measured; h2load calls. All of them share this machine's
cores. Gateway and nginx are one process each, which is what the bars are for, and both write a line for every call; the
gateway is shown with a process for each core too. Every round visits every route, one after the other; figures are
medians over the rounds, ratios and differences are taken within a round. Then the embedded models read and paint,
straight and through the gateway. nginx and h2load are found on the PATH, or by INKWELL_BENCH_NGINX and
INKWELL_BENCH_H2LOAD.

As a program of its own (`python -m benchmarks.gateway --help`) it takes fewer rounds, and leaves the models out.
"""

import argparse
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil

from benchmarks import _nginx
from benchmarks._bars import Bar, at_least, at_most, print_report
from benchmarks._echo import MESSAGES, STREAM, UNARY
from benchmarks._running import wait_ready
from inkwell import Client
from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2
from services import local

ROUNDS = 7
CALLERS = (1, 16, 64)
DIRECT, GATEWAY, ALL_CORES, NGINX = "direct", "gateway", "gateway on all cores", "nginx"
SECONDS = 1.0  # about what one measurement takes
MEMORY_CALLS = 50_000
READERS = 16
LINES = 64
PICTURES = 8
MODEL_ROUNDS = 7


@dataclass(frozen=True)
class Kind:
    """One kind of call."""

    name: str
    path: str
    image_bytes: int
    answers: int  # messages that come back
    guess: float  # calls a second, to begin with

    def message(self) -> bytes:
        """A request, and each of its answers."""
        return ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=bytes(self.image_bytes))).SerializeToString()


SMALL = Kind("1 KiB", UNARY, 1024, 1, 2000)
LARGE = Kind("200 KiB", UNARY, 200 * 1024, 1, 500)
STREAMED = Kind(f"{MESSAGES} messages of 1 KiB", STREAM, 1024, MESSAGES, 200)
KINDS = (SMALL, LARGE, STREAMED)


@dataclass(frozen=True)
class Measured:
    """One measurement; latencies in milliseconds."""

    calls_per_s: float
    p50_ms: float
    p99_ms: float


def run(rounds: int = ROUNDS, models: bool = True) -> dict[str, Bar]:
    """Milliseconds, ratios to nginx and to no gateway at all, and the growth of memory in percent."""
    bars = _echo(rounds)
    if models:
        bars |= _models()
    return bars


def _echo(rounds: int) -> dict[str, Bar]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inkwell-")))
        load = _Load(folder)
        service, nginx_port = local.free_ports(2)
        stack.enter_context(_echo_service(service))
        gateway = stack.enter_context(_gateway(service, folder / "one", processes=1))
        all_cores = stack.enter_context(_gateway(service, folder / "all", processes=0))
        stack.enter_context(_nginx.running(f"127.0.0.1:{service}", nginx_port))
        ports = {DIRECT: service, GATEWAY: _port(gateway), ALL_CORES: _port(all_cores), NGINX: nginx_port}

        found: dict[tuple[str, int], dict[str, list[Measured]]] = {}
        for kind in KINDS:
            for callers in CALLERS:
                found[kind.name, callers] = _routes(load, ports, kind, callers, rounds)
                _print(kind, callers, found[kind.name, callers])
        growth = _memory_growth(load, gateway)

    alone, many = found[SMALL.name, 1], found[SMALL.name, 16]
    added = [g.p50_ms - d.p50_ms for g, d in zip(alone[GATEWAY], alone[DIRECT], strict=True)]
    ratio = [g.calls_per_s / n.calls_per_s for g, n in zip(many[GATEWAY], many[NGINX], strict=True)]
    return {
        "added_ms_1_caller_1_kib": at_most(statistics.median(added), 0.6),
        "throughput_over_nginx_16_callers_1_kib": at_least(statistics.median(ratio), 0.6),
        "memory_growth_percent": at_most(growth, 3.0),
    }


@contextmanager
def _echo_service(port: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks._echo", str(port)])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _gateway(service: int, folder: Path, *, processes: int) -> Iterator[local.Service]:
    (port,) = local.free_ports(1)
    with patch.dict(os.environ, {"INKWELL_GATEWAY_PROCESSES": str(processes)}):
        gateway = local.spawn("gateway", {"gateway": (port, -1), "ocr": (service, -1)}, folder)
    try:
        wait_ready(gateway, folder / "gateway.log")
        yield gateway
    finally:
        local.stop([gateway])


def _port(service: local.Service) -> int:
    return int(service.address.rpartition(":")[2])


class _Load:
    """h2load, each caller with a connection of its own and one call under way."""

    def __init__(self, folder: Path) -> None:
        self._program = _nginx.program("h2load", "INKWELL_BENCH_H2LOAD", "nghttp2-client")
        self._folder = folder

    def __call__(self, port: int, kind: Kind, callers: int, calls: int) -> Measured:
        """Raises RuntimeError unless every call was answered with every byte."""
        body, log = self._folder / "body", self._folder / "calls"
        message = kind.message()
        # On the wire: not compressed, its length, its bytes.
        body.write_bytes(struct.pack(">BI", 0, len(message)) + message)
        log.unlink(missing_ok=True)  # h2load appends
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        told = subprocess.run(
            [self._program, "-n", str(calls), "-c", str(callers), "-m", "1", "-w", "20", "-W", "24", *headers]
            + ["-d", str(body), "--log-file", str(log), f"http://127.0.0.1:{port}{kind.path}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        # gRPC says in a trailer, which h2load does not read, whether a call failed; but then its answer is missing.
        data = re.search(r"\((\d+)\) data$", told, re.MULTILINE)
        expected = calls * kind.answers * body.stat().st_size
        if data is None or int(data[1]) != expected:
            raise RuntimeError(f"{expected} bytes of answers were to come; h2load says:\n{told}")
        rows = [line.split("\t") for line in log.read_text().splitlines()]
        starts = [int(row[0]) for row in rows]
        took = sorted(int(row[2]) for row in rows)
        ends = [start + int(row[2]) for start, row in zip(starts, rows, strict=True)]
        return Measured(
            calls_per_s=len(rows) / ((max(ends) - min(starts)) / 1e6),
            p50_ms=statistics.median(took) / 1000,
            p99_ms=took[min(len(took) - 1, len(took) * 99 // 100)] / 1000,
        )


def _routes(load: _Load, ports: dict[str, int], kind: Kind, callers: int, rounds: int) -> dict[str, list[Measured]]:
    counts = {}
    for route, port in ports.items():  # also warms up
        trial = load(port, kind, callers, max(callers * 4, int(kind.guess * SECONDS / 4)))
        counts[route] = max(callers * 4, int(trial.calls_per_s * SECONDS))
    found: dict[str, list[Measured]] = {route: [] for route in ports}
    for _ in range(rounds):
        for route, port in ports.items():
            found[route].append(load(port, kind, callers, counts[route]))
    return found


def _print(kind: Kind, callers: int, found: dict[str, list[Measured]]) -> None:
    print(f"  {kind.name}, {callers} caller{'s' if callers > 1 else ''}:", flush=True)
    for route, all_measured in found.items():
        rates = [m.calls_per_s for m in all_measured]
        over = statistics.median(m.calls_per_s / n.calls_per_s for m, n in zip(all_measured, found[NGINX], strict=True))
        print(
            f"    {route:21}{statistics.median(rates):8.0f} calls/s ({min(rates):.0f} to {max(rates):.0f}),"
            f" {over:.2f} × nginx, median {statistics.median(m.p50_ms for m in all_measured):.2f} ms,"
            f" p99 {statistics.median(m.p99_ms for m in all_measured):.2f} ms",
            flush=True,
        )


def _memory_growth(load: _Load, gateway: local.Service) -> float:
    """Percent that the gateway grows over MEMORY_CALLS calls, after the calls of all the measurements."""
    process = psutil.Process(gateway.pid)
    before = process.memory_info().rss
    load(_port(gateway), SMALL, 16, MEMORY_CALLS)
    after = process.memory_info().rss
    print(f"  gateway: {before / 1e6:.1f} MB, {after / 1e6:.1f} MB after {MEMORY_CALLS} more calls", flush=True)
    return 100 * (after / before - 1)


def _models() -> dict[str, Bar]:
    with ExitStack() as stack:
        services = stack.enter_context(local.running_on_free_ports())
        callers = stack.enter_context(ThreadPoolExecutor(READERS))
        through = stack.enter_context(Client(services["gateway"].address, timeout_s=None))
        reader = stack.enter_context(Client(services["ocr"].address, timeout_s=None))
        painter = stack.enter_context(Client(services["diffusion"].address, timeout_s=None))
        samples = [path.read_bytes() for path in sorted(local.SAMPLES.glob("*.png"))]

        def read(client: Client) -> None:
            list(callers.map(lambda i: client.read(samples[i % len(samples)]), range(LINES)))

        def paint(client: Client) -> None:
            list(callers.map(lambda seed: client.paint(local.DEMO_PROMPT, seed=seed), range(PICTURES)))

        return {
            "ocr_throughput_over_direct": _over_direct("lines", read, LINES, reader, through),
            "diffusion_throughput_over_direct": _over_direct("pictures", paint, PICTURES, painter, through),
        }


def _over_direct(what: str, work: Callable[[Client], None], count: int, direct: Client, through: Client) -> Bar:
    clients = {DIRECT: direct, GATEWAY: through}
    rates: dict[str, list[float]] = {route: [] for route in clients}
    for client in clients.values():
        work(client)
    for number in range(MODEL_ROUNDS):
        # In turns, so that a machine that becomes slower or faster favours neither.
        for route in (clients, reversed(clients))[number % 2]:
            began = time.perf_counter()
            work(clients[route])
            rates[route].append(count / (time.perf_counter() - began))
    ratios = [g / d for g, d in zip(rates[GATEWAY], rates[DIRECT], strict=True)]
    medians = ", ".join(f"{route} {statistics.median(values):.2f}" for route, values in rates.items())
    print(f"  {what} a second, {READERS} callers: {medians}; ratios {min(ratios):.3f} to {max(ratios):.3f}", flush=True)
    return at_least(statistics.median(ratios), 0.98)


def main() -> None:
    """The last line is the JSON object of the bars."""
    parser = argparse.ArgumentParser(description="What the gateway adds, against no gateway and against nginx")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--echo-only", action="store_true", help="leave the embedded models out")
    arguments = parser.parse_args()
    print_report("gateway", run(arguments.rounds, models=not arguments.echo_only))


if __name__ == "__main__":
    main()
