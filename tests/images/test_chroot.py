"""The images for the CPU, built and started in folders: the very commands of the Dockerfiles, on a clean Debian.

Takes some minutes and gigabytes a service, so it runs only when it is asked for: INKWELL_TEST_CHROOT=1. chroot.py says
what differs from a container engine.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inkwell import Client
from services import local
from tests.images import chroot, dockerfile
from tests.images.chroot import Builder, Image, Running

_COMPILERS = {"gcc", "g++", "cc", "c++", "clang", "tcc", "ld", "make", "nvcc", "hipcc", "rustc", "go"}
_ML = {"torch", "transformers", "diffusers", "onnx", "onnxruntime", "openvino", "nncf", "numpy", "tritonclient"}


def _impossible() -> str:
    """Why the tests cannot run here; empty if they can."""
    if os.environ.get("INKWELL_TEST_CHROOT") != "1":
        return "takes minutes a service: INKWELL_TEST_CHROOT=1 runs it"
    if os.geteuid() != 0:
        return "chroot and mounts need root"
    if missing := [name for name in ("debootstrap", "unshare", "chroot") if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)} (apt-get install debootstrap)"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "this machine gives no mount namespaces, as in most containers"
    return ""


pytestmark = [
    pytest.mark.skipif(bool(_impossible()), reason=_impossible() or "it can"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder on a disk: some 4 GB for each model service at a time."""
    with tempfile.TemporaryDirectory(prefix="inkwell-images-", dir="/var/tmp") as folder:  # noqa: S108
        yield Path(folder)


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    """In place of the base image; of a machine without a Debian mirror, the reason to skip."""
    root = work / "debian"
    try:
        chroot.debian(root)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"debootstrap found no Debian mirror: {error}")
    return root


@pytest.fixture
def built(request: pytest.FixtureRequest, base: Path, work: Path) -> Iterator[Image]:
    """The image of the service that the test is about."""
    service: str = request.param
    wheels = work / "wheels"
    if service != "gateway" and not wheels.exists():
        wheels.mkdir()
        chroot.download_torch(wheels)
    stages = work / service
    builder = Builder(dockerfile.read(service), base, stages, arguments={"TORCH_INDEX": ""})
    yield builder.build("cpu")
    shutil.rmtree(stages)


@dataclass
class Served:
    """A service that is ready."""

    running: Running
    address: str
    log: Path

    def uid(self) -> int:
        return self.running.process.uids().real


@contextmanager
def serving(image: Image, service: str, log: Path, **settings: str) -> Iterator[Served]:
    """The image's program on a port of its own, on loopback, once it says that it serves."""
    port, metrics_port = local.free_ports(2)
    chosen = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": str(metrics_port),
        **settings,
    }
    name = "inkwell.gateway.v1.GatewayService" if service == "gateway" else "readiness"
    prefix = f"INKWELL_{service.upper()}_"
    with chroot.running(image, {f"{prefix}{key}": value for key, value in chosen.items()}, log=log) as running:
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=name), wait_for_ready=True, timeout=120
            )
            try:
                next(answer for answer in watch if answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.RpcError as error:
                pytest.fail(f"{service} is not ready: {error.details()}\n{log.read_text()[-5000:]}")
        yield Served(running, address, log)


def _packages(image: Image) -> set[str]:
    return {path.name for path in image.root.glob("opt/venv/lib/python3.*/site-packages/*") if path.is_dir()}


def _compilers(image: Image) -> set[str]:
    folders = [image.root / place for place in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin")]
    return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()} & _COMPILERS


def _holds_what_every_image_promises(image: Image, service: str) -> None:
    refused = chroot.ended_by_itself(image, {})
    assert refused.returncode == 2
    assert f"INKWELL_{service.upper()}_TLS: " in refused.stderr
    assert not _compilers(image)
    bill = (image.root / "opt/venv/sbom.cdx.json").read_text()
    assert f'"name": "inkwell-{service}-cpu"' in bill
    assert "pkg:pypi/inkwell@" in bill
    for place in ("/app/services/new.py", "/opt/venv/new", "/etc/new"):
        tried = chroot.python(image, f"open({place!r}, 'w')")
        assert "Read-only file system" in tried.stderr or "Permission denied" in tried.stderr
    wrote = chroot.python(image, "import os, pathlib; pathlib.Path.home().joinpath('new').touch(); print(os.getuid())")
    assert (wrote.returncode, wrote.stdout) == (0, "10001\n")


def _zombies(served: Served) -> list[psutil.Process]:
    return [p for p in served.running.process.children(recursive=True) if p.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("built", ["gateway"], indirect=True)
def test_the_gateways_image(built: Image, tmp_path: Path, fleet: dict[str, local.Service]) -> None:
    assert not _packages(built) & _ML
    config = {"pools": [{"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [fleet["ocr"].address]}]}
    (built.root / "etc/gateway.yaml").write_text(yaml.safe_dump(config))
    with serving(built, "gateway", tmp_path / "log", CONFIG="/etc/gateway.yaml") as served:
        assert served.uid() == 10001
        with Client(served.address) as client:
            assert client.read(local.DEMO_LINE).text == "Meet me at the station"
        assert served.running.stop() == 0
    _holds_what_every_image_promises(built, "gateway")


@pytest.mark.parametrize("built", ["ocr"], indirect=True)
def test_the_ocr_services_image(built: Image, tmp_path: Path) -> None:
    with serving(built, "ocr", tmp_path / "log") as served:
        assert served.uid() == 10001
        with Client(served.address) as client:
            assert client.read(local.DEMO_LINE).text == "Meet me at the station"
            page = client.read_document(local.DEMO_LINE).pages[0]
            assert [line.text for line in page.lines] == ["Meet me at the station"]
        assert not _zombies(served)
        assert served.running.stop() == 0
    _holds_what_every_image_promises(built, "ocr")


@pytest.mark.parametrize("built", ["diffusion"], indirect=True)
def test_the_diffusion_services_image(built: Image, tmp_path: Path) -> None:
    with serving(built, "diffusion", tmp_path / "log") as served, Client(served.address) as client:
        (picture,) = client.paint(local.DEMO_PROMPT, seed=7, steps=4)
        assert picture.content.startswith(b"\x89PNG")
        assert served.running.stop() == 0
    _holds_what_every_image_promises(built, "diffusion")


@pytest.mark.parametrize("built", ["compiler"], indirect=True)
def test_the_compiler_services_image(built: Image, tmp_path: Path) -> None:
    with serving(built, "compiler", tmp_path / "log") as served, Client(served.address) as client:
        artifact = client.compile("handwriting-tiny", "onnx").result(timeout_s=600)
        assert artifact.model == "handwriting-tiny"
        assert not _zombies(served)
        assert served.running.stop() == 0
    _holds_what_every_image_promises(built, "compiler")
