"""What this machine is and has installed, and whether an artifact can run on it."""

import functools
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from services.runtimes.artifacts.manifest import BuiltOn, Manifest, RuntimeName
from services.runtimes.hardware import Hardware

log = logging.getLogger(__name__)

# Packages that write or run artifacts -> the distributions that bring them, the likeliest first.
_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "diffusers": ("diffusers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-migraphx",
        "onnxruntime-rocm",
        "onnxruntime-openvino",
        "onnxruntime-directml",
    ),
    "openvino": ("openvino",),
    "nncf": ("nncf",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tritonclient": ("tritonclient",),
}
# What a runtime is imported from, and the extra of this project that installs it.
_PACKAGE: dict[RuntimeName, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "triton": ("tritonclient", "triton"),
}


@dataclass(frozen=True)
class Machine:
    """What decides whether an artifact runs here."""

    hardware: Hardware
    processor: str  # for people, such as "AMD EPYC 7763"; of a GPU its name
    features: tuple[str, ...]  # what the CPU can, as torch names it, sorted; () when torch is not here
    compute_capability: str  # of a CUDA device, such as "8.9"; "" of others
    versions: Mapping[str, str]  # of the packages above that are installed
    onnx_opset: int  # the newest operator set that the ONNX Runtime here knows; 0 when it does not tell

    def built_on(self) -> BuiltOn:
        """As a manifest tells it."""
        return BuiltOn(self.hardware.label, self.processor, self.features, dict(self.versions))


def machine(hardware: Hardware) -> Machine:
    """This machine, with `hardware` as the device that models run on. Never raises."""
    return Machine(
        hardware=hardware,
        processor=hardware.name if hardware.label != "cpu" else _processor_name(),
        features=_features(),
        compute_capability=_compute_capability(hardware),
        versions=installed(),
        onnx_opset=_onnx_opset(),
    )


def refusal(manifest: Manifest, here: Machine) -> str:
    """Why an artifact cannot run on this machine, and what to do; empty if it can."""
    package, extra = _PACKAGE[manifest.runtime]
    if package not in here.versions:
        return (
            f"it runs on {manifest.runtime}, and the package {package} is not installed; install it with"
            f" pip install 'inkwell[{extra}]'"
        )
    if manifest.runtime == "triton":
        # The graphs run on the server, which says itself what it lacks.
        return ""
    again = f"compile it on this machine: inkwell compile {manifest.model} --to {manifest.target}"
    if manifest.precision != "float32":
        again += f" --precision {manifest.precision}"
    needed = manifest.requires
    if needed.hardware and needed.hardware != here.hardware.label:
        return (
            f"it was built for {needed.hardware}, and this machine runs on {here.hardware.label}; {again}, or send"
            f" calls for it to a {needed.hardware} machine"
        )
    if needed.compute_capability and needed.compute_capability != here.compute_capability:
        has = here.compute_capability or "unknown"
        return (
            f"it was built for GPUs of compute capability {needed.compute_capability}, such as"
            f" {manifest.built_on.device_name}, and that of {here.hardware.name} is {has}; {again}"
        )
    for name, version in sorted(needed.versions.items()):
        found = here.versions.get(name)
        if found is None:
            return f"it takes {name} {version}, which is not installed; install {name}=={version}, or {again}"
        if found != version:
            return (
                f"it was built with {name} {version} and runs with no other, and {found} is installed; {again}, or"
                f" install {name}=={version}"
            )
    if manifest.target == "onnx" and needed.onnx_opset > here.onnx_opset > 0:
        version = here.versions[package]
        return (
            f"its graphs are written in ONNX operator set {needed.onnx_opset}, and the ONNX Runtime here ({version})"
            f" knows {here.onnx_opset} at most; update onnxruntime, or {again}"
        )
    return ""


def installed() -> dict[str, str]:
    """The versions of all packages that write or run artifacts and are here; none of them is imported."""
    found = {}
    for package, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[package] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _features() -> tuple[str, ...]:
    try:
        import torch

        capabilities = torch.cpu.get_capabilities()
    except Exception:  # noqa: BLE001 - no torch, or one that does not know this processor
        log.info("the processor's abilities are unknown", exc_info=True)
        return ()
    return tuple(sorted(name for name, value in capabilities.items() if value is True))


def _compute_capability(hardware: Hardware) -> str:
    if hardware.label != "cuda":
        return ""
    try:
        import torch

        major, minor = torch.cuda.get_device_capability(hardware.device)
    except Exception:  # noqa: BLE001 - whatever a driver throws, the artifact is refused for it
        log.warning("the GPU's compute capability cannot be read", exc_info=True)
        return ""
    return f"{major}.{minor}"


@functools.cache
def _onnx_opset() -> int:
    """Every operator set changes at least one operator: the newest change tells which one the runtime was built for."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        return max(int(schema.since_version) for schema in state.get_all_operator_schema() if schema.domain == "")
    except Exception:  # noqa: BLE001 - not installed, or a library it needs is not
        log.info("the ONNX Runtime's operator sets are unknown", exc_info=True)
        return 0
