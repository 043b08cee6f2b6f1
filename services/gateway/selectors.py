"""What is asked of an endpoint's hardware and models, held against what the endpoint reports of itself."""

import fnmatch
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from inkwell.endpoint.v1 import endpoint_pb2

GIB = 1 << 30

Report = endpoint_pb2.Report
Pattern = Annotated[str, Field(min_length=1, max_length=200)]  # with * and ? as in a shell


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


class Requirements(BaseModel):
    """All of it has to hold. An endpoint that has reported nothing yet meets only requirements that are empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_gib: float | None = Field(None, gt=0, le=100_000)  # of the device, at least
    compute_capability: str | None = Field(None, pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")  # of an NVIDIA device, at least
    device: Pattern | None = None  # its name, such as "*L4*"; case does not matter
    # All of these can compute a model there.
    runtimes: tuple[Literal["torch", "onnxruntime", "openvino", "tensorrt", "triton"], ...] = ()
    models: tuple[Pattern, ...] = ()  # for each there is a model that the endpoint knows, loaded or not
    loaded: tuple[Pattern, ...] = ()  # for each there is a model that it has loaded

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> "Requirements":
        if not self.model_fields_set:
            raise ValueError(f"it is empty; accepted: one or more of {', '.join(type(self).model_fields)}")
        return self

    def why_not(self, report: Report | None) -> str:
        """What the endpoint lacks, in words; "" if it meets everything."""
        if report is None:
            return "it has not reported its hardware yet"
        hardware = report.hardware
        if self.memory_gib is not None and hardware.memory_bytes < self.memory_gib * GIB:
            return f"it has {hardware.memory_bytes / GIB:.1f} GiB of memory, and {self.memory_gib:g} are needed"
        if self.compute_capability is not None:
            there = hardware.compute_capability
            if not there or _capability(there) < _capability(self.compute_capability):
                return f"its compute capability is {there or 'none'}, and {self.compute_capability} is needed"
        if self.device is not None and not fnmatch.fnmatchcase(hardware.device.lower(), self.device.lower()):
            return f"its device is {hardware.device!r}, and {self.device!r} is needed"
        for runtime in self.runtimes:
            if runtime not in report.runtimes:
                return f"it cannot run {runtime}"
        for pattern in self.models:
            if not any(fnmatch.fnmatchcase(model.name, pattern) for model in report.models):
                return f"it knows no model {pattern!r}"
        for pattern in self.loaded:
            if not any(model.loaded and fnmatch.fnmatchcase(model.name, pattern) for model in report.models):
                return f"it has no model {pattern!r} loaded"
        return ""


def misplaced(hardware: str, select: Requirements | None, report: Report | None) -> str:
    """Why an endpoint may not be used in a pool with this label and selector; "" if it may.

    Without a selector, an endpoint that reports nothing is taken to be what its pool says.
    """
    if hardware != "cpu" and report is not None and report.hardware.label not in ("", hardware):
        # A machine whose driver is broken serves on its CPU: not what who asked for `cuda!` may be given. In a pool for
        # cpu anything will do.
        return f"it reports hardware {report.hardware.label}, and this pool is for {hardware}"
    return "" if select is None else select.why_not(report)
