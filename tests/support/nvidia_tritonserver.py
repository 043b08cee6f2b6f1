"""NVIDIA's own tritonserver, from the PyPI wheel nvidia-pytriton, which runs on a CPU.

The wheel brings the server and its Python backend, and no onnxruntime backend: `triton_backend/onnxruntime` stands in
for that as a Python-based backend. All else is NVIDIA's: how a repository and config.pbtxt are read, batching, warmup,
shared memory, and the protocol.

    make test-triton    installs it into a cache outside the checkout, and runs the tests that use it
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.local import free_ports

# Says where it is installed; without it the tests that use it are skipped.
VARIABLE = "INKWELL_TRITONSERVER"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0")
# Its binaries are built for the glibc and the Python of Debian and Ubuntu, and crash under others.
PYTHON = Path("/usr/bin/python3.11")
_BACKEND = Path(__file__).parent / "triton_backend" / "onnxruntime"


def missing() -> str:
    """Why tests cannot use it; "" if they can."""
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        return f"{VARIABLE} is not set; make test-triton installs NVIDIA's tritonserver (450 MB) and sets it"
    return "" if _server(Path(folder)).exists() else f"{folder} holds no tritonserver; run make test-triton"


def install(folder: Path) -> None:
    """Make a virtual environment of Debian's Python with it. Raises SystemExit with the reason where that cannot be."""
    if _server(folder).exists():
        return
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is not there: apt-get install python3.11-venv (Debian 12)")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run([PYTHON, "-m", "venv", partial], check=True)
    pip = [str(partial / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    partial.rename(folder)


@contextmanager
def serving(repository: Path, scratch: Path) -> Iterator[str]:
    """Run it on a repository; yields the address of its gRPC. scratch: an empty folder for its backends.

    Raises RuntimeError with its log if it does not take every model.
    """
    folder = Path(os.environ[VARIABLE])
    packages = _packages(folder)
    backends = scratch / "backends"
    shutil.copytree(_server(folder).parent.parent / "backends" / "python", backends / "python")
    stub = _server(folder).parent.parent / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    shutil.copytree(_BACKEND, backends / "onnxruntime")
    (port,) = free_ports(1)
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "HOME": str(scratch),
    }
    options = {
        "model-repository": repository,
        "backend-directory": backends,
        "grpc-address": "127.0.0.1",
        "grpc-port": port,
        "allow-http": "false",
        "allow-metrics": "false",
        "exit-on-error": "true",
        "exit-timeout-secs": 5,
    }
    command = [str(_server(folder)), *(f"--{name}={value}" for name, value in options.items())]
    log: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line)
                if "Started GRPCInferenceService" in line:
                    break
            else:
                raise RuntimeError(f"tritonserver did not start:\n{''.join(log)}")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.stdout.read()  # or it waits for someone to read what it says last
            process.wait()


def _packages(folder: Path) -> Path:
    return folder / "lib" / "python3.11" / "site-packages"


def _server(folder: Path) -> Path:
    return _packages(folder) / "pytriton" / "tritonserver" / "bin" / "tritonserver"


if __name__ == "__main__":
    install(Path(sys.argv[1]))
