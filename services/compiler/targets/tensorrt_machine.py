"""Whether this machine can build TensorRT engines, and what it lacks. Imports neither torch nor onnx."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from services.kit.faults import Fault, failed_precondition
from services.runtimes.artifacts.manifest import ArtifactPrecision
from services.runtimes.cuda_device import CudaDevice, NoCudaDeviceError, find

# The first version whose networks are strongly typed in all that our graphs use; 11 knows no others.
OLDEST = (10, 12)
INSTALL = "pip install tensorrt-cu12 or tensorrt-cu13, for the CUDA that torch.version.cuda names"
# A strongly typed network computes in the types of its ONNX graph. TensorRT quantizes weights together with their
# inputs, by ranges in the graph ("Working with Quantized Types", TensorRT documentation); ranges found as the inputs
# come have no ONNX operator there, and 4-bit weights none that the compiler writes. Beside each the compute capability
# from which devices have the type: NVIDIA's support matrices of TensorRT and Transformer Engine. 7.5 is the oldest
# device of TensorRT 11.
MINIMUM_CAPABILITY: dict[ArtifactPrecision, tuple[int, int]] = {
    "float32": (7, 5),
    "float16": (7, 5),
    "bfloat16": (8, 0),
    "int8_static": (7, 5),
}
PRECISIONS: tuple[ArtifactPrecision, ...] = tuple(MINIMUM_CAPABILITY)


@dataclass(frozen=True)
class Machine:
    """What an engine is built for: it runs nowhere else."""

    device: CudaDevice
    tensorrt: str  # whole version, such as "11.4.0.106"

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.tensorrt.split(".")[:2]
        return int(major), int(minor)


def missing() -> str:
    """What this machine lacks to build engines, in words; "" for nothing. Takes milliseconds and imports nothing."""
    lacks = []
    try:
        find()
    except NoCudaDeviceError as error:
        lacks.append(f"a CUDA device ({error})")
    if importlib.util.find_spec("tensorrt") is None:
        lacks.append(f"the Python package tensorrt ({INSTALL})")
    return " and ".join(lacks)


def require(precision: ArtifactPrecision | None = None) -> Machine:
    """The machine, for a build in this precision. Raises Fault (FAILED_PRECONDITION) naming all that is missing."""
    if precision is not None and precision not in PRECISIONS:
        raise no_such_precision(precision)
    if lacks := missing():
        raise _refusal(f"this machine lacks {lacks}", missing=lacks)
    machine = Machine(find(), str(load().__version__))
    if precision is not None:
        require_capability(precision, MINIMUM_CAPABILITY[precision], machine)
    return machine


def require_capability(what: str, capability: tuple[int, int], machine: Machine) -> None:
    """Raises Fault (FAILED_PRECONDITION) if the device is older than what computes it."""
    if machine.device.capability < capability:
        raise failed_precondition(
            "PRECISION_NOT_SUPPORTED",
            f"{what} takes a device of compute capability {capability[0]}.{capability[1]} or more, and"
            f" {machine.device.name} has {machine.device.compute_capability}; compile to float16 instead",
        )


def no_such_precision(precision: ArtifactPrecision) -> Fault:
    """TensorRT has no such networks."""
    return failed_precondition(
        "PRECISION_NOT_SUPPORTED", f"TensorRT has no {precision}; it takes {', '.join(PRECISIONS)}"
    )


def load() -> ModuleType:
    """The tensorrt package. Raises Fault (FAILED_PRECONDITION) where it is not there, broken or too old."""
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise _refusal(f"the Python package tensorrt cannot be imported: {error}; {INSTALL}") from error
    if tuple(int(part) for part in tensorrt.__version__.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise _refusal(f"tensorrt is version {tensorrt.__version__}, and engines are built with {wanted} or newer")
    return tensorrt


def _refusal(message: str, **metadata: object) -> Fault:
    return failed_precondition(
        "TENSORRT_NOT_HERE",
        f"TensorRT engines cannot be built here: {message}. Compile on a node with label cuda, or compile to onnx,"
        " which onnxruntime-gpu runs on CUDA without a build.",
        **metadata,
    )
