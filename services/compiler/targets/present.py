"""Whether this machine has what building for a target takes. Imports nothing of it."""

from services.compiler.targets import tensorrt_machine
from services.kit.faults import failed_precondition
from services.runtimes.artifacts.built_on import installed
from services.runtimes.artifacts.manifest import Target

_EXPORT = ("torch", "onnx", "onnxscript", "onnxruntime")
# The packages that a build for each target imports; what it lacks of hardware is looked for elsewhere.
_PACKAGES: dict[Target, tuple[str, ...]] = {
    "onnx": _EXPORT,
    "openvino": (*_EXPORT, "openvino", "nncf"),
    "tensorrt": _EXPORT,
    "triton": (*_EXPORT, "tritonclient"),
}


def missing(target: Target) -> str:
    """What this machine lacks to build for the target, in words and with what would help; "" for nothing."""
    here = installed()
    lacking = [package for package in _PACKAGES[target] if package not in here]
    words = []
    if lacking:
        packages = "the Python packages " if len(lacking) > 1 else "the Python package "
        words.append(f"{packages}{', '.join(lacking)} (pip install 'inkwell[compiler,cpu]', or cuda or rocm)")
    if target == "tensorrt" and (machine := tensorrt_machine.missing()):
        words.append(machine)
    return " and ".join(words)


def require(target: Target) -> None:
    """Raises Fault (FAILED_PRECONDITION) naming the packages that are missing."""
    if target != "tensorrt" and (lacks := missing(target)):
        raise failed_precondition(
            "TARGET_NOT_HERE", f"nothing can be compiled to {target} here: this machine lacks {lacks}", missing=lacks
        )
