"""Generate the Python modules and type stubs of every proto into inkwell/. Run through `make protos`.

The output is never committed: it belongs to the installed versions of grpcio and protobuf.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def generate(output: Path = ROOT) -> list[Path]:
    """Write `<output>/inkwell/<package>/v1/*_pb2*.py[i]`; answers the generated packages' folders."""
    sources = sorted(PROTOS.glob("inkwell/**/*.proto"))
    folders = sorted({output / source.parent.relative_to(PROTOS) for source in sources})
    for folder in folders:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / "__init__.py").touch()
    # google/rpc and google/api come with googleapis-common-protos, google/protobuf with grpcio-tools.
    google_rpc = importlib.util.find_spec("google.rpc")
    if google_rpc is None or not google_rpc.submodule_search_locations:
        raise RuntimeError("googleapis-common-protos is not installed: run `make protos`, which installs it")
    site_packages = Path(google_rpc.submodule_search_locations[0]).parents[1]
    with tempfile.TemporaryDirectory() as stage:
        stage_operations(site_packages, Path(stage))
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={PROTOS}",
                f"--proto_path={stage}",
                f"--proto_path={site_packages}",
                f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
                f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
                f"--python_out={output}",
                f"--grpc_python_out={output}",
                f"--mypy_out=quiet:{output}",
                f"--mypy_grpc_out=quiet:{output}",
                *(str(source.relative_to(PROTOS)) for source in sources),
            ],
            check=True,
            cwd=PROTOS,
        )
    return folders


def stage_operations(site_packages: Path, stage: Path) -> None:
    """Write `<stage>/google/longrunning/operations.proto`.

    googleapis-common-protos ships that file as operations_proto.proto, while its own module is built from a file of the
    proper name: importing it by any other would define every message a second time.
    """
    folder = stage / "google" / "longrunning"
    folder.mkdir(parents=True)
    shutil.copy(site_packages / "google" / "longrunning" / "operations_proto.proto", folder / "operations.proto")


def _plugin(name: str) -> str:
    # Beside the interpreter in an environment that was not activated; on PATH in an isolated build.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if found is None:
        raise RuntimeError(f"{name} is not installed: it comes with mypy-protobuf")
    return found


if __name__ == "__main__":
    for generated in generate():
        print(f"generated {generated.relative_to(ROOT)}")
