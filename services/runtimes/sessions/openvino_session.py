"""Runs an OpenVINO IR (or an ONNX graph) with OpenVINO on a processor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.precision import of_cpu
from services.runtimes.sessions.checked import require_file, require_fit
from services.runtimes.sessions.interface import HardwareMissingError, SessionError, SessionOptions

# OpenVINO's names of element types by numpy's.
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}


class OpenvinoSession:
    """See `interface.Session`. Inputs are read where they lie."""

    runtime: RuntimeName = "openvino"

    def __init__(self, file: Path, options: SessionOptions) -> None:
        """Read a graph and compile it for this processor. Raises SessionError, HardwareMissingError."""
        require_file(file)
        try:
            import openvino
        except ImportError as error:
            raise HardwareMissingError(
                f"{file}: the package openvino is missing ({error}); pip install 'inkwell[cpu]'"
            ) from error
        self._file = file
        self._openvino: Any = openvino
        try:
            core = openvino.Core()
            self._model: Any = core.compile_model(str(file), "CPU", properties(options))
            self._request: Any = self._model.create_infer_request()
        except Exception as error:  # the library has one kind for all, and a file can be broken in any way
            raise SessionError(f"{file}: OpenVINO cannot open it: {_short(error)}") from error
        self.inputs = tuple(self._port(each) for each in self._model.inputs)
        self.outputs = tuple(self._port(each) for each in self._model.outputs)

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `interface.Session.run`."""
        require_fit(self._file, self.inputs, feeds)
        # Held until the call returns: the request only borrows their memory.
        tensors = [feeds[port.name].detach().cpu().contiguous() for port in self.inputs]
        try:
            for index, tensor in enumerate(tensors):
                self._request.set_input_tensor(index, self._wrapped(tensor))
            self._request.infer()
        except Exception as error:
            raise SessionError(f"{self._file.name}: OpenVINO failed on it: {_short(error)}") from error
        return {
            # Copied: the request writes its next results to the same place.
            port.name: self._unwrapped(self._request.get_output_tensor(index), port).clone()
            for index, port in enumerate(self.outputs)
            if wanted is None or port.name in wanted
        }

    def close(self) -> None:
        """See `interface.Session.close`."""
        self._request = self._model = None

    def _wrapped(self, tensor: Tensor) -> Any:
        if tensor.dtype is torch.bfloat16:
            # numpy has no such type: the same bytes under OpenVINO's name of it.
            bits = tensor.view(torch.int16).numpy()
            return self._openvino.Tensor(bits, list(tensor.shape), self._openvino.Type.bf16)
        return self._openvino.Tensor(tensor.numpy(), shared_memory=True)

    def _unwrapped(self, result: Any, port: Port) -> Tensor:
        if port.dtype == "bfloat16":
            return torch.from_numpy(result.data.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(result.data)

    def _port(self, each: Any) -> Port:
        name, kind = each.get_any_name(), each.get_element_type().get_type_name()
        if kind not in _DTYPES:
            raise SessionError(f"{self._file}: {name} is a {kind}; only tensors of numbers can be passed")
        # OpenVINO keeps no names of axes, so each is its own.
        sizes = [
            f"{name}.{place}" if size.is_dynamic else size.get_length()
            for place, size in enumerate(each.get_partial_shape())
        ]
        return Port(name, _DTYPES[kind], tuple(sizes))


def properties(options: SessionOptions) -> dict[str, Any]:
    """What a graph is compiled with, by OpenVINO's names of its properties.

    No CACHE_DIR: the plugin's cache is a second copy of all weights. For the 913 MB of TrOCR-base's decoder, whose
    weights are mapped into memory from the artifact, it was measured to make the first opening 4.6 s instead of 2.0 s
    long, and every later one 1.1 s.
    """
    # The processor's, whatever GPU stands beside it.
    bf16 = options.allow_16_bit and not of_cpu(torch.cpu.get_capabilities()).bfloat16
    chosen: dict[str, Any] = {
        # Said in any case: where the processor has bfloat16, OpenVINO would round float32 graphs to it by itself.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": options.threads or options.hardware.core_count,
        # Pinned threads would share a core with the front process while another is idle.
        "ENABLE_CPU_PINNING": False,
    }
    return chosen


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
