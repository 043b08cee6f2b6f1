"""Requirements against what an endpoint reports: what it lacks is said in words."""

from typing import Any

import pydantic
import pytest

from services.gateway.selectors import Requirements, misplaced
from tests.support.reporting_backend import report

L4 = report(
    "cuda",
    device="NVIDIA L4",
    gib=22.5,
    capability="8.9",
    runtimes=("torch", "onnxruntime"),
    models=("sdxl-base", "flux-dev"),
    loaded=("sdxl-base",),
)


@pytest.mark.parametrize(
    "asked",
    [
        {"memory_gib": 22.5},
        {"compute_capability": "8.9"},
        {"compute_capability": "7.10"},
        {"device": "*l4*"},
        {"runtimes": ["torch", "onnxruntime"]},
        {"models": ["flux-*", "sdxl-base"]},
        {"loaded": ["sdxl*"]},
        {"memory_gib": 20, "compute_capability": "8.0", "runtimes": ["torch"], "loaded": ["sdxl*"]},
    ],
)
def test_what_is_met(asked: dict[str, Any]) -> None:
    assert Requirements.model_validate(asked).why_not(L4) == ""


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"memory_gib": 24}, "it has 22.5 GiB of memory, and 24 are needed"),
        ({"compute_capability": "8.10"}, "its compute capability is 8.9, and 8.10 is needed"),
        ({"compute_capability": "9.0"}, "its compute capability is 8.9, and 9.0 is needed"),
        ({"device": "*A100*"}, "its device is 'NVIDIA L4', and '*A100*' is needed"),
        ({"runtimes": ["torch", "tensorrt"]}, "it cannot run tensorrt"),
        ({"models": ["sd3*"]}, "it knows no model 'sd3*'"),
        ({"loaded": ["flux-*"]}, "it has no model 'flux-*' loaded"),
        ({"memory_gib": 8, "loaded": ["flux-*"]}, "it has no model 'flux-*' loaded"),
    ],
)
def test_what_is_lacking(asked: dict[str, Any], why: str) -> None:
    assert Requirements.model_validate(asked).why_not(L4) == why


def test_an_endpoint_that_has_reported_nothing_meets_no_requirement() -> None:
    assert Requirements(memory_gib=1).why_not(None) == "it has not reported its hardware yet"
    assert "compute capability is none" in Requirements(compute_capability="5.0").why_not(report("cpu"))


@pytest.mark.parametrize(
    "wrong",
    [{}, {"memory_gib": 0}, {"compute_capability": "8"}, {"runtimes": ["trt"]}, {"memory": 4}, {"models": [""]}],
)
def test_requirements_that_say_nothing_or_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Requirements.model_validate(wrong)


def test_an_endpoint_on_other_hardware_than_its_pool_s_is_misplaced() -> None:
    assert misplaced("cuda", None, report("cpu")) == "it reports hardware cpu, and this pool is for cuda"
    assert misplaced("cuda", None, report("cuda")) == ""
    assert misplaced("cpu", None, report("cuda")) == ""  # more than was promised
    assert misplaced("cuda", None, None) == ""  # an older service
    assert misplaced("cuda", None, report("")) == ""  # its engine has not started yet
    assert misplaced("cuda", Requirements(memory_gib=40), L4).startswith("it has 22.5 GiB")
