"""Which runtimes a machine can run graphs with."""

import re
import sys

import pytest
import torch

from services.runtimes.hardware import Hardware
from services.runtimes.sessions.available import available_runtimes

CPU = Hardware("cpu", "cpu", "CPU", 0, 2)


def test_a_processor_runs_all_but_tensorrt() -> None:
    found = available_runtimes(CPU)
    assert set(found) == {"torch", "onnxruntime", "openvino", "tensorrt", "triton"}
    assert {name for name, why in found.items() if not why} == {"torch", "onnxruntime", "openvino", "triton"}
    assert "CUDA" in found["tensorrt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("label", "told"),
    [("cuda", "CUDAExecutionProvider is not in .*onnxruntime-gpu"), ("rocm", "MIGraphXExecutionProvider is not in")],
)
def test_an_onnxruntime_without_the_gpus_provider_says_which_package(label: str, told: str) -> None:
    why = available_runtimes(Hardware(label, "cuda:0", "a GPU", 1 << 30, 2))["onnxruntime"]
    assert re.match(told, why)


@pytest.mark.parametrize(("package", "runtime"), [("onnxruntime", "onnxruntime"), ("tritonclient", "triton")])
def test_a_missing_package_names_its_extra(package: str, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = available_runtimes(CPU)
    assert found[runtime].startswith(f"the package {package} is missing")  # type: ignore[index]
    assert "pip install 'inkwell[" in found[runtime]  # type: ignore[index]
