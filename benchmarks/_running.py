"""A service in processes of its own, for as long as a benchmark needs it."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import grpc
import msgspec
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services import local
from services.kit.settings import ServiceSettings

READY_WITHIN_S = 300.0


@contextmanager
def running(name: str, settings: ServiceSettings) -> Iterator[local.Service]:
    """The service with what is set in `settings`, ready for calls. Raises RuntimeError with its log when it fails."""
    prefix = settings.model_config["env_prefix"]
    given = {
        f"{prefix}{field.upper()}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for field, value in settings.model_dump(mode="json", exclude_unset=True).items()
    }
    ports = {name: (local.free_ports(1)[0], -1)}
    with tempfile.TemporaryDirectory(prefix="inkwell-") as folder:
        with patch.dict(os.environ, given):
            process = local.spawn(name, ports, Path(folder))
        try:
            wait_ready(process, Path(folder) / f"{name}.log")
            yield process
        finally:
            local.stop([process])


def wait_ready(process: local.Service, log: Path) -> None:
    """Return when its readiness is SERVING; raises RuntimeError with its log if it ends or takes too long."""
    deadline = time.monotonic() + READY_WITHIN_S
    request = health_pb2.HealthCheckRequest(service="readiness")
    with grpc.insecure_channel(process.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while True:
            try:
                status = check(request, timeout=5, wait_for_ready=True).status
            except grpc.RpcError:
                status = health_pb2.HealthCheckResponse.UNKNOWN
            if status == health_pb2.HealthCheckResponse.SERVING:
                return
            if time.monotonic() > deadline or not psutil.pid_exists(process.pid):
                raise RuntimeError(f"{process.name} did not get ready; its log:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)
