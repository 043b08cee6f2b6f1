"""Runs a TensorRT engine on the CUDA device that it was built for."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch
from torch import Tensor

from services.runtimes import cuda_device
from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.sessions.checked import require_file, require_fit
from services.runtimes.sessions.interface import HardwareMissingError, SessionError, SessionOptions

# NvInferRuntime.h asks for tensors that begin at a multiple of this, and for an address even where nothing is read.
_ALIGNMENT = 256
_COMPILE_ANEW = "compile the model for tensorrt on this node (inkwell compile MODEL --to tensorrt)"
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class TensorrtSession:
    """See `interface.Session`. Outputs stay on the device if an input came from there, else they return to the CPU."""

    runtime: RuntimeName = "tensorrt"

    def __init__(self, file: Path, options: SessionOptions) -> None:
        """Load an engine. Raises HardwareMissingError without CUDA or tensorrt, SessionError if it is not for them."""
        trt = _require(file)
        _require_same(file, trt)
        self._file = file
        self._trt = trt
        self._device = torch.device(options.hardware.device if options.hardware.label == "cuda" else "cuda:0")
        self._logger = _logger(trt)
        with torch.cuda.device(self._device):
            self._runtime: Any = trt.Runtime(self._logger)  # has to live as long as its engines
            engine = self._runtime.deserialize_cuda_engine(_read(file))
            if engine is None:
                raise SessionError(f"{file}: TensorRT refuses the engine: {self._logger.told()}; {_COMPILE_ANEW}")
            self._engine: Any = engine
            self._context: Any = engine.create_execution_context()
            if self._context is None:
                raise SessionError(
                    f"{file}: no memory on {self._device} to run the engine: {self._logger.told()}; unload other models"
                )
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._nothing = torch.empty(_ALIGNMENT, dtype=torch.uint8, device=self._device)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(self._port(name) for name in names if is_input[name])
        self.outputs = tuple(self._port(name) for name in names if not is_input[name])

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `interface.Session.run`."""
        require_fit(self._file, self.inputs, feeds)
        stay = any(feed.is_cuda for feed in feeds.values())
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                held = self._set_inputs(feeds)
                allocators = self._set_outputs()
                if not self._context.execute_async_v3(self._stream.cuda_stream):
                    raise SessionError(f"{self._file}: the engine failed: {self._logger.told()}")
            caller.wait_stream(self._stream)
            # What the stream still reads must not be handed out again by torch's allocator.
            for tensor in held:
                tensor.record_stream(self._stream)
            outputs = {}
            for port in self.outputs:
                if wanted is None or port.name in wanted:
                    result = allocators[port.name].result()
                    result.record_stream(caller)
                    outputs[port.name] = result if stay else result.cpu()
            return outputs

    def close(self) -> None:
        """See `interface.Session.close`."""
        self._context = self._engine = self._runtime = None

    def _port(self, name: str) -> Port:
        shape = tuple(self._engine.get_tensor_shape(name))
        # Engines keep no names of axes.
        sizes = tuple(size if size >= 0 else f"{name}.{place}" for place, size in enumerate(shape))
        return Port(name, str(self._dtype(name)).removeprefix("torch."), sizes)

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise SessionError(f"{self._file}: {name} is of TensorRT's type {kind}, which torch tensors do not hold")
        return _DTYPES[kind]

    def _set_inputs(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Point the engine at the inputs; the tensors have to live until it has run."""
        held = []
        for port in self.inputs:
            tensor = feeds[port.name].to(self._device, non_blocking=True).contiguous()
            if tensor.data_ptr() % _ALIGNMENT:
                tensor = tensor.clone()
            if not self._context.set_input_shape(port.name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(port.name, 0)
                raise SessionError(
                    f"{self._file}: input {port.name} has shape {list(tensor.shape)}; the engine was built for"
                    f" {list(low)} to {list(high)}; compile with a larger max_batch_size or max_side_px"
                )
            self._context.set_tensor_address(port.name, (tensor if tensor.numel() else self._nothing).data_ptr())
            held.append(tensor)
        return held

    def _set_outputs(self) -> dict[str, Any]:
        """Give every output memory: at once where its shape is known, else when the engine says how much it takes."""
        if unknown := self._context.infer_shapes():
            raise SessionError(f"{self._file}: the engine cannot tell its shapes without {', '.join(unknown)}")
        allocators = {}
        for port in self.outputs:
            shape = tuple(self._context.get_tensor_shape(port.name))
            allocator = _allocator(self._trt, self._dtype(port.name), self._device, self._stream, self._nothing)
            if min(shape, default=0) >= 0:
                allocator.notify_shape(port.name, shape)
                allocator.memory = torch.empty(shape, dtype=allocator.dtype, device=self._device)
                address = allocator.memory if allocator.memory.numel() else self._nothing
                self._context.set_tensor_address(port.name, address.data_ptr())
            else:
                self._context.set_output_allocator(port.name, allocator)
            allocators[port.name] = allocator
        return allocators


def _require(file: Path) -> ModuleType:
    require_file(file)
    try:
        cuda_device.find()
    except cuda_device.NoCudaDeviceError as error:
        raise HardwareMissingError(f"{file}: TensorRT engines run on CUDA devices only: {error}") from None
    if not torch.cuda.is_available():
        raise HardwareMissingError(
            f"{file}: torch {torch.__version__} was built without CUDA; install the build for this device"
        )
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise HardwareMissingError(
            f"{file}: the Python package tensorrt cannot be imported: {error}; pip install tensorrt-cu12 or"
            f" tensorrt-cu13, for the CUDA {torch.version.cuda} of torch, of the version that built the engine"
        ) from error


def _require_same(file: Path, trt: ModuleType) -> None:
    """Refuses an engine of another version or device by the note beside it; without a note TensorRT itself decides."""
    require_same(file, str(trt.__version__), cuda_device.find().compute_capability)


def require_same(file: Path, version: str, compute_capability: str) -> None:
    """Raises SessionError if the note beside an engine names another TensorRT or another compute capability."""
    try:
        note = msgspec.json.decode(file.with_name(file.name + ".json").read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return
    except (OSError, msgspec.DecodeError) as error:
        raise SessionError(f"{file}.json: cannot be read: {error}; {_COMPILE_ANEW}") from error
    built = (note.get("tensorrt", ""), note.get("compute_capability", ""))
    if built != (version, compute_capability):
        raise SessionError(
            f"{file}: built by TensorRT {built[0]} for compute capability {built[1]}; here are {version} and"
            f" {compute_capability}, and engines run on nothing else; {_COMPILE_ANEW}"
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SessionError(f"{file}: cannot be read: {error}") from error


def _logger(trt: ModuleType) -> Any:
    """Keeps what TensorRT calls errors, for the messages of SessionError."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors = [*self.errors[-2:], message]

        def told(self) -> str:
            errors, self.errors = self.errors, []
            return "; ".join(errors) or "it gave no reason"

    return Logger()


def _allocator(
    trt: ModuleType, dtype: torch.dtype, device: torch.device, stream: torch.cuda.Stream, nothing: Tensor
) -> Any:
    """Holds an output's memory, and finds it where only the running engine knows the shape."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.dtype = dtype
            self.memory: Tensor | None = None
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, _stream: int) -> int:
            with torch.cuda.stream(stream):
                self.memory = torch.empty(size, dtype=torch.uint8, device=device)
            return self.memory.data_ptr() if size else nothing.data_ptr()

        def notify_shape(self, name: str, shape: Sequence[int]) -> None:
            self.shape = tuple(shape)

        def result(self) -> Tensor:
            if self.memory is None or self.memory.dtype is dtype and tuple(self.memory.shape) == self.shape:
                return self.memory if self.memory is not None else torch.empty(self.shape, dtype=dtype, device=device)
            byte_count = torch.Size(self.shape).numel() * dtype.itemsize
            return self.memory[:byte_count].view(dtype).view(self.shape)

    return Allocator()
