"""How quickly each front process answers, and how much memory it holds, against importing torch alone.

Start: from spawning the process until its first health reply; the engine then still loads in its own process. Memory:
resident size of the front once every engine is ready.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks._bars import Bar, at_most
from services import local

ROUNDS = 3


def run() -> dict[str, Bar]:
    """Bars in seconds and MB (10^6 bytes)."""
    starts: dict[str, list[float]] = {name: [] for name in local.PORTS}
    torch_import: list[float] = []
    for _ in range(ROUNDS):
        for name in starts:
            starts[name].append(_seconds_until_alive(name))
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_import.append(time.perf_counter() - began)
    with local.running_on_free_ports() as services:
        sizes = {name: psutil.Process(service.pid).memory_info().rss / 1e6 for name, service in services.items()}
    bars: dict[str, Bar] = {}
    for name, seconds in starts.items():
        bars[f"{name}_start_s"] = at_most(statistics.median(seconds), 2.0)
        bars[f"{name}_rss_mb"] = at_most(sizes[name], 150.0)
        print(f"  {name}: alive after {statistics.median(seconds):.2f} s, {sizes[name]:.0f} MB")
    print(f"  for comparison, `import torch` alone takes {statistics.median(torch_import):.2f} s")
    return bars


def _seconds_until_alive(name: str) -> float:
    ports = dict(zip(local.PORTS, ((port, -1) for port in local.free_ports(3)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        service = local.spawn(name, ports, Path(folder))
        try:
            with grpc.insecure_channel(local.address(ports, name)) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                check(health_pb2.HealthCheckRequest(service="liveness"), wait_for_ready=True, timeout=60)
            return time.perf_counter() - began
        finally:
            local.stop([service])
