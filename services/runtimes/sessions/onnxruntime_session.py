"""Runs an ONNX graph with ONNX Runtime, on a processor or through the execution providers for GPUs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.checked import require_file, require_fit
from services.runtimes.sessions.interface import HardwareMissingError, SessionError, SessionOptions

# ONNX's numbers of element types (onnx.TensorProto.DataType) by torch's; onnx itself need not be installed here.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
# What ONNX Runtime calls them.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bfloat16)": "bfloat16",
}
_PACKAGES = {
    "cuda": "onnxruntime-gpu (the extra inkwell[cuda])",
    "rocm": "ONNX Runtime with MIGraphX, from AMD's wheels",
}
Provider = tuple[str, dict[str, str]]


def providers_for(hardware: Hardware, options: SessionOptions) -> list[Provider]:
    """The execution providers for the hardware with their options, best first; what none of them can runs on the CPU.

    options.providers replaces the choice, not the options of a provider.
    """
    index = hardware.device.partition(":")[2] or "0"
    known: dict[str, dict[str, str]] = {
        "CPUExecutionProvider": {},
        # The arena grows by what is asked for and not by doubling: torch's models live on the same device.
        "CUDAExecutionProvider": {
            "device_id": index,
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "1" if options.allow_16_bit else "0",
        },
        "MIGraphXExecutionProvider": {"device_id": index},
        "ROCMExecutionProvider": {"device_id": index},
        "TensorrtExecutionProvider": {"device_id": index},
    }
    if options.cache_folder is not None:
        folder = str(options.cache_folder / "onnxruntime-tensorrt")
        known["TensorrtExecutionProvider"] |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    if options.allow_16_bit:
        known["TensorrtExecutionProvider"]["trt_fp16_enable"] = "1"
        known["MIGraphXExecutionProvider"]["migraphx_fp16_enable"] = "1"
    names = list(options.providers)
    if not names and hardware.label == "cuda":
        # Not TensorRT: it builds engines for minutes at the first call. A setting may name it.
        names = ["CUDAExecutionProvider"]
    elif not names and hardware.label == "rocm":
        names = ["MIGraphXExecutionProvider"]
    for name in names:
        if name not in known:
            raise SessionError(f"there is no execution provider {name}; accepted: {', '.join(known)}")
    chosen = [(name, known[name]) for name in names if name != "CPUExecutionProvider"]
    return [*chosen, ("CPUExecutionProvider", {})]


def require_providers(
    onnxruntime: Any, providers: Sequence[Provider], hardware: Hardware, file: Path | None = None
) -> None:
    """Raise HardwareMissingError for a provider that the package was built without.

    One that it was built with may still lack its driver: the session knows that, and this list does not.
    """
    built = onnxruntime.get_available_providers()
    unbuilt = [name for name, _ in providers if name not in built]
    if unbuilt:
        package = _PACKAGES.get(hardware.label, "an ONNX Runtime that was built with it")
        what = f"{file}: " if file is not None else ""
        raise HardwareMissingError(f"{what}{unbuilt[0]} is not in this ONNX Runtime; install {package}")


class OnnxruntimeSession:
    """See `interface.Session`. Inputs are read where they lie and outputs are handed over without a copy."""

    runtime: RuntimeName = "onnxruntime"

    def __init__(self, file: Path, options: SessionOptions) -> None:
        """Load a graph and its external weights. Raises SessionError, HardwareMissingError."""
        require_file(file)
        try:
            import onnxruntime
        except ImportError as error:
            raise HardwareMissingError(
                f"{file}: the package onnxruntime is missing ({error}); pip install 'inkwell[cpu]'"
            ) from error
        self._file = file
        self._nothing = torch.empty(1, dtype=torch.uint8)
        providers = providers_for(options.hardware, options)
        wanted = [name for name, _ in providers if name != "CPUExecutionProvider"]
        require_providers(onnxruntime, providers, options.hardware, file)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads or options.hardware.core_count
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # Idle threads give their core back at once: the service's front process needs it. Measured on two cores, ms a
        # call, not spinning against spinning: the U-Net of emoji-tiny 6.8 and 6.3, a decoding step of TrOCR-base 72 and
        # 107; with half a core taken by another process 8.2 and 7.9, 203 and 337.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), settings, providers=providers)
        except Exception as error:  # the library has many kinds, and a file can be broken in any way
            raise SessionError(f"{file}: ONNX Runtime cannot open it: {_short(error)}") from error
        running = self._session.get_providers()
        lost = [name for name in wanted if name not in running]
        if lost:
            # It warns and runs on the CPU, which nobody asked for.
            raise HardwareMissingError(
                f"{file}: {lost[0]} cannot be used on this machine; is its driver there, and its libraries in the"
                " versions that this ONNX Runtime was built for?"
            )
        # AMD's memory goes by a name that differs between versions; there tensors pass through the CPU.
        self._on_cuda = "CUDAExecutionProvider" in running
        self.inputs = tuple(self._port(each) for each in self._session.get_inputs())
        self.outputs = tuple(self._port(each) for each in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `interface.Session.run`."""
        require_fit(self._file, self.inputs, feeds)
        names = [port.name for port in self.outputs if wanted is None or port.name in wanted]
        # Each is bound where it lies; ONNX Runtime copies what its kernels need elsewhere.
        placed = {
            name: feed.detach().contiguous() if self._on_cuda else feed.detach().cpu().contiguous()
            for name, feed in feeds.items()
        }
        device = next((tensor.device for tensor in placed.values() if tensor.is_cuda), torch.device("cpu"))
        binding = self._session.io_binding()
        for name, tensor in placed.items():
            binding.bind_input(
                name,
                tensor.device.type,
                tensor.device.index or 0,
                _ELEMENT_TYPES[tensor.dtype],
                tuple(tensor.shape),
                # torch gives empty tensors no address, and ONNX Runtime wants one.
                tensor.data_ptr() or self._nothing.data_ptr(),
            )
        for name in names:
            binding.bind_output(name, device.type, device.index or 0)
        if device.type == "cuda":
            # ONNX Runtime computes on a stream of its own.
            torch.cuda.current_stream(device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise SessionError(f"{self._file.name}: ONNX Runtime failed on it: {_short(error)}") from error
        if device.type == "cuda":
            binding.synchronize_outputs()
        return dict(zip(names, map(from_dlpack, binding.get_outputs()), strict=True))

    def close(self) -> None:
        """See `interface.Session.close`."""
        self._session = None

    def _port(self, each: Any) -> Port:
        dtype = _DTYPES.get(each.type)
        if dtype is None:
            raise SessionError(f"{self._file}: {each.name} is a {each.type}; only tensors of numbers can be passed")
        # A size without a name may be anything; each has to be its own, or they would be held to be equal.
        shape = [size if size is not None else f"{each.name}.{place}" for place, size in enumerate(each.shape)]
        return Port(each.name, dtype, tuple(shape))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
