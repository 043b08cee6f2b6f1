"""Inkwell on one machine: `python -m services.local up | down | demo`, behind the Makefile targets of those names.

Starts the services and a gateway in front of them as processes of their own, as Kubernetes would, on loopback.
State and logs of `up` are kept in .run/: `up.json` names the processes, `<service>.log` holds their JSON log lines.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / ".run"
STATE = RUN / "up.json"
DEMO_OUTPUT = ROOT / "build" / "demo"
SAMPLES = ROOT / "models" / "handwriting-tiny" / "samples"
DEMO_LINE = SAMPLES / "02-station.png"
DEMO_PROMPT = "grinning face"

# Fixed for `make up`, so that clients and Prometheus find them: gRPC port and metrics port.
PORTS = {"gateway": (50050, 9150), "ocr": (50051, 9151), "diffusion": (50052, 9152), "compiler": (50053, 9153)}
BACKENDS = {
    "ocr": "inkwell.ocr.v1.OcrService",
    "diffusion": "inkwell.diffusion.v1.DiffusionService",
    "compiler": "inkwell.compiler.v1.CompilerService",
}
# Where free ports are looked for: below those that Linux (from 32768, ip_local_port_range) and macOS (from 49152) give
# to outgoing connections, one of which could take it before its server listens, or while that is restarted.
CHOSEN_PORTS = range(20_000, 32_000)
# What the demo and the benchmarks need; a compiler keeps its operations in a file that only one may open.
MODEL_SERVICES = ("ocr", "diffusion")
# Loading both models took 10 s on two busy cores; the rest is for slower disks.
READY_WITHIN_S = 180.0
STOP_WITHIN_S = 40.0


@dataclass(frozen=True)
class Service:
    """A process that runs one service."""

    name: str
    pid: int
    address: str
    metrics_port: int = -1  # -1: no page of metrics


class StartError(RuntimeError):
    """A service did not come up; the message says which and shows the end of its log."""


def start(ports: dict[str, tuple[int, int]], folder: Path) -> list[Service]:
    """Start the services and the gateway, logging to `folder`; raises StartError unless all get ready in time."""
    started: list[Service] = []
    backends = [name for name in BACKENDS if name in ports]
    try:
        for name in (*backends, "gateway"):
            started.append(spawn(name, ports, folder))
        _wait_ready(started, backends, address(ports, "gateway"), folder)
    except BaseException:
        stop(started)
        raise
    return started


def stop(services: list[Service]) -> None:
    """SIGTERM to all, the gateway first, and SIGKILL to what has not drained within STOP_WITHIN_S."""
    processes = [process for service in reversed(services) if (process := _process_of(service))]
    # Their engines too, should a front be killed before it could end its own.
    engines = [child for process in processes for child in process.children(recursive=True)]
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_WITHIN_S)
    for process in [*alive, *engines]:
        if process.is_running():
            process.kill()
    psutil.wait_procs([*alive, *engines], timeout=5)


@contextmanager
def running_on_free_ports(*, metrics: bool = False) -> Iterator[dict[str, Service]]:
    """Everything, on ports that nobody else has; yields the services by name and stops them afterwards.

    metrics: each has its page of metrics, too.
    """
    names = (*MODEL_SERVICES, "gateway")
    free = free_ports(2 * len(names))
    pages = free[len(names) :] if metrics else [-1] * len(names)
    ports = {name: (port, page) for name, port, page in zip(names, free, pages, strict=False)}
    with tempfile.TemporaryDirectory(prefix="inkwell-") as folder:
        services = start(ports, Path(folder))
        try:
            yield {service.name: service for service in services}
        finally:
            stop(services)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now, of CHOSEN_PORTS; raises RuntimeError if there are not so many."""
    found: list[int] = []
    for port in random.sample(CHOSEN_PORTS, len(CHOSEN_PORTS)):
        if len(found) == count:
            return found
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
    raise RuntimeError(f"no {count} of the ports {CHOSEN_PORTS.start} to {CHOSEN_PORTS.stop - 1} are free")


def hardware_label() -> str:
    """The hardware that services here run on, without loading torch for it: "cuda", "rocm" or "cpu"."""
    devices = (("cuda", Path("/dev/nvidiactl"), "cuda"), ("rocm", Path("/dev/kfd"), "hip"))
    return next((label for label, device, build in devices if device.exists() and _torch_has(build)), "cpu")


def _torch_has(build: str) -> bool:
    # What torch.version says of the build: a torch for the CPU does not see the card.
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    said = Path(found.origin).with_name("version.py").read_text("utf-8")
    return re.search(rf"^{build}\b[^=]*= *['\"]", said, re.MULTILINE) is not None


def address(ports: dict[str, tuple[int, int]], name: str) -> str:
    """Where a service listens."""
    return f"127.0.0.1:{ports[name][0]}"


def spawn(name: str, ports: dict[str, tuple[int, int]], folder: Path) -> Service:
    """Start one service's process, logging to `folder`; `ports` gives each service's gRPC and metrics port."""
    port, metrics_port = ports[name]
    prefix = f"INKWELL_{name.upper()}_"
    environment = {
        **os.environ,
        f"{prefix}PORT": str(port),
        f"{prefix}METRICS_PORT": str(metrics_port),
    }
    folder.mkdir(exist_ok=True)
    if name == "gateway":
        environment[f"{prefix}CONFIG"] = str(_write_gateway_config(ports, folder))
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C stops this program first, which then stops them in order; and `up` may end.
            start_new_session=True,
        )
    _children[process.pid] = process
    return Service(name, process.pid, address(ports, name), metrics_port)


# Kept, because only their parent can tell a process that ended from a zombie, and Python warns when one is forgotten.
_children: dict[int, subprocess.Popen[bytes]] = {}


def _write_gateway_config(ports: dict[str, tuple[int, int]], folder: Path) -> Path:
    config = {
        "pools": [
            {"name": f"{name}-local", "service": name, "hardware": hardware_label(), "targets": [address(ports, name)]}
            for name in BACKENDS
            if name in ports
        ]
    }
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _wait_ready(services: list[Service], backends: list[str], gateway: str, folder: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    waiting = set(backends)
    with grpc.insecure_channel(gateway) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while waiting:
            for service in services:
                if _process_of(service) is None:
                    raise StartError(f"{service.name} ended while starting.\n{_log_tail(folder, service.name)}")
            for name in sorted(waiting):
                try:
                    answer = check(health_pb2.HealthCheckRequest(service=BACKENDS[name]), timeout=1)
                except grpc.RpcError:
                    continue  # the gateway itself is still starting
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    waiting.discard(name)
                    print(f"  {name} is ready", flush=True)
            if waiting and time.monotonic() > deadline:
                late = sorted(waiting)[0]
                raise StartError(f"{late} was not ready within {READY_WITHIN_S:.0f} s.\n{_log_tail(folder, late)}")
            time.sleep(0.1)


def _process_of(service: Service) -> psutil.Process | None:
    """The service's process, None when it is gone (also when another program got its number since)."""
    child = _children.get(service.pid)
    if child is not None and child.poll() is not None:
        return None
    try:
        process = psutil.Process(service.pid)
        ours = child is not None or f"services.{service.name}" in process.cmdline()
    except psutil.Error:
        return None
    return process if ours else None


def _log_tail(folder: Path, name: str, lines: int = 15) -> str:
    log = folder / f"{name}.log"
    tail = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join([f"The end of its log, {log}:", *tail])


# --- up and down ---


def up() -> int:
    """Start everything in the background; answers the exit code."""
    running = [service for service in _read_state() if _process_of(service)]
    if running:
        print("already running; `make down` stops it")
        _print_addresses(running)
        return 0
    print("· starting ocr, diffusion, the compiler and the gateway", flush=True)
    services = start(PORTS, RUN)
    STATE.write_text(json.dumps([vars(service) for service in services]))
    _print_addresses(services)
    print("Try: .venv/bin/inkwell fleet")
    return 0


def down() -> int:
    """Stop what `up` started; answers the exit code."""
    services = [service for service in _read_state() if _process_of(service)]
    if services:
        print("· stopping " + ", ".join(service.name for service in services), flush=True)
        stop(services)
    else:
        print("nothing is running")
    STATE.unlink(missing_ok=True)
    return 0


def _read_state() -> list[Service]:
    return [Service(**entry) for entry in json.loads(STATE.read_text())] if STATE.exists() else []


def _print_addresses(services: list[Service]) -> None:
    for service in services:
        metrics = PORTS[service.name][1]
        print(f"  {service.name:<10} {service.address}   metrics http://127.0.0.1:{metrics}/metrics")


# --- the demo ---


def demo() -> int:
    """Read a line and paint a picture through freshly started services, then stop them; answers the exit code."""
    began = time.monotonic()
    print("· starting ocr, diffusion, the compiler and the gateway", flush=True)
    with running_on_free_ports() as services:
        line = DEMO_LINE.relative_to(ROOT)
        picture = DEMO_OUTPUT / f"{DEMO_PROMPT.replace(' ', '-')}.png"
        DEMO_OUTPUT.mkdir(parents=True, exist_ok=True)
        for arguments in (
            ["read", str(line)],
            ["paint", DEMO_PROMPT, "--seed", "7", "-o", str(picture.relative_to(ROOT))],
            ["fleet"],
        ):
            shown = " ".join(f'"{a}"' if " " in a else a for a in arguments)
            print(f"\n$ inkwell {shown}", flush=True)
            environment = {**os.environ, "INKWELL_ADDRESS": services["gateway"].address}
            done = subprocess.run([sys.executable, "-m", "inkwell", *arguments], cwd=ROOT, env=environment, check=False)
            if done.returncode:
                print(f"inkwell ended with exit code {done.returncode}", file=sys.stderr)
                return 1
        print("\n· stopping the services", flush=True)
    print(f"The picture is {picture.relative_to(ROOT)}. Nothing is left running ({time.monotonic() - began:.0f} s).")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.local", description="Inkwell on one machine")
    parser.add_argument("command", choices=["up", "down", "demo"])
    command = parser.parse_args().command
    # `kill` stops the demo as Ctrl-C does: everything it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit({"up": up, "down": down, "demo": demo}[command]())
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
