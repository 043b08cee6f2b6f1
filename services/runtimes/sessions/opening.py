"""Opens a graph with the runtime that an artifact is written for. Each runtime's library is imported when asked for."""

from pathlib import Path

from services.runtimes.artifacts.manifest import RuntimeName
from services.runtimes.sessions.interface import Session, SessionError, SessionOptions


def open_session(file: Path, runtime: RuntimeName, options: SessionOptions) -> Session:
    """Open a graph.

    file: the ONNX graph for "onnxruntime", the .xml of an OpenVINO IR, a TensorRT engine, or the graph within a Triton
    model repository. Raises SessionError, HardwareMissingError where the machine lacks what the runtime needs.
    """
    match runtime:
        case "onnxruntime":
            from services.runtimes.sessions.onnxruntime_session import OnnxruntimeSession

            return OnnxruntimeSession(file, options)
        case "openvino":
            from services.runtimes.sessions.openvino_session import OpenvinoSession

            return OpenvinoSession(file, options)
        case "tensorrt":
            from services.runtimes.sessions.tensorrt_session import TensorrtSession

            return TensorrtSession(file, options)
        case "triton":
            from services.runtimes.sessions.triton_session import TritonSession

            return TritonSession(file, options)
        case "torch":
            raise SessionError(f"{file}: torch runs checkpoints and no graphs")
