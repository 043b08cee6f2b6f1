"""Which runtimes this machine can run graphs with, and what the others lack."""

import importlib
from importlib import util

from services.runtimes import cuda_device
from services.runtimes.artifacts.manifest import RuntimeName
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import HardwareMissingError, SessionOptions
from services.runtimes.sessions.onnxruntime_session import providers_for, require_providers


def available_runtimes(hardware: Hardware) -> dict[RuntimeName, str]:
    """Each runtime with why it cannot run graphs on this hardware, and what would help; "" where it can.

    Packages are imported where finding them does not tell, which takes a second the first time. Whether a driver fits
    is known when a session is opened. Never raises for what is missing or broken.
    """
    return {
        "torch": "",
        "onnxruntime": _onnxruntime(hardware),
        "openvino": _openvino(hardware),
        "tensorrt": _tensorrt(hardware),
        # The graphs run on the server, whatever this machine is.
        "triton": "" if _found("tritonclient") else _missing("tritonclient", "triton"),
    }


def _onnxruntime(hardware: Hardware) -> str:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        return _missing("onnxruntime", "cuda" if hardware.label == "cuda" else "cpu", error)
    try:
        require_providers(onnxruntime, providers_for(hardware, SessionOptions(hardware)), hardware)
    except HardwareMissingError as error:
        return str(error)
    return ""


def _openvino(hardware: Hardware) -> str:
    return "" if _found("openvino") else _missing("openvino", "cpu")


def _tensorrt(hardware: Hardware) -> str:
    try:
        cuda_device.find()
    except cuda_device.NoCudaDeviceError as error:
        return f"TensorRT engines run on CUDA devices only: {error}"
    if hardware.label != "cuda":
        return "this torch was built without CUDA; install the build for this device"
    return "" if _found("tensorrt") else _missing("tensorrt", "tensorrt")


def _found(package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _missing(package: str, extra: str, error: ImportError | None = None) -> str:
    why = f" ({error})" if error else ""
    return f"the package {package} is missing{why}; pip install 'inkwell[{extra}]'"
