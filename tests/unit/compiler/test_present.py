"""What is said of a machine without the packages that building for a target takes."""

from importlib import metadata
from typing import get_args

import pytest

from services.compiler.targets import present
from services.kit.faults import Fault, Kind
from services.runtimes.artifacts.manifest import Target


def test_this_machine_builds_for_all_but_tensorrt() -> None:
    assert {target: bool(present.missing(target)) for target in get_args(Target)} == {
        "onnx": False,
        "openvino": False,
        "tensorrt": True,
        "triton": False,
    }


def test_missing_packages_are_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name in ("nncf", "onnxscript"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "the Python package onnxscript (pip install" in present.missing("onnx")
    assert "the Python packages onnxscript, nncf (pip install 'inkwell[compiler,cpu]'" in present.missing("openvino")
    assert "onnxscript" in present.missing("tensorrt")
    with pytest.raises(Fault, match="nothing can be compiled to openvino here: .*nncf") as refused:
        present.require("openvino")
    assert (refused.value.data.kind, refused.value.data.reason) == (Kind.FAILED_PRECONDITION, "TARGET_NOT_HERE")
