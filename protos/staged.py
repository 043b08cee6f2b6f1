"""Write the protos and the google protos that they import into a folder, for buf: `python protos/staged.py FOLDER`."""

import importlib.util
import shutil
import sys
from pathlib import Path

import generate


def main() -> None:
    """The folder is emptied first."""
    stage = Path(sys.argv[1])
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(generate.PROTOS / "inkwell", stage / "inkwell")
    shutil.copy(generate.PROTOS / "buf.yaml", stage)
    google = importlib.util.find_spec("google.rpc")
    if google is None or not google.submodule_search_locations:
        raise RuntimeError("googleapis-common-protos is not installed: run `make protos`, which installs it")
    packages = Path(google.submodule_search_locations[0]).parents[1]
    for needed in (packages / "google/rpc/status.proto", *(packages / "google/api").glob("*.proto")):
        target = stage / needed.relative_to(packages)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(needed, target)
    generate.stage_operations(packages, stage)


if __name__ == "__main__":
    main()
