"""The hardware and its runtimes in the words that services report."""

from importlib import util

from services.kit.device import Device
from services.runtimes.hardware import Hardware

# The package that each runtime is, and the labels it runs on; None for all.
_RUNTIMES: dict[str, tuple[str, frozenset[str] | None]] = {
    "torch": ("torch", None),
    "onnxruntime": ("onnxruntime", None),
    "openvino": ("openvino", None),
    "tensorrt": ("tensorrt", frozenset(("cuda",))),
    "triton": ("tritonclient", None),  # the graphs run on the server, whatever this machine is
}


def describe(hardware: Hardware) -> Device:
    """What is here. Imports nothing: whether a package fits the driver shows when a session is opened."""
    return Device(
        label=hardware.label,
        name=hardware.name,
        memory_bytes=hardware.memory_bytes,
        core_count=hardware.core_count,
        compute_capability=hardware.compute_capability,
        runtimes=tuple(
            name
            for name, (package, labels) in _RUNTIMES.items()
            if (labels is None or hardware.label in labels) and _installed(package)
        ),
    )


def _installed(package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
