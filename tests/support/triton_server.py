"""A server that speaks Triton's protocol over onnxruntime: what the `triton` runtime meets, without NVIDIA's server.

It reads a model repository as Triton does, and refuses what Triton refuses: unknown models, shapes outside the
configuration's, batches above max_batch_size, tensors whose bytes do not fit their shape.
"""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import torch
from google.protobuf import text_format
from onnxruntime.capi import _pybind_state
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from services.runtimes.sessions.triton_ports import port_dtype

_TYPES = dict(model_config_pb2.DataType.items())
_NAMES = {number: name.removeprefix("TYPE_") for name, number in _TYPES.items()}


class TritonRefusal(Exception):
    """What Triton would answer with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class _Model:
    folder: Path
    config: Any
    calls: int = 0

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """The graph, opened and warmed up on first use."""
        return _opened(self)


class TritonServer:
    """Serves a repository on a free port of this machine, or on `port`."""

    def __init__(self, repository: Path, port: int = 0, *, ready: bool = True) -> None:
        self.ready = ready
        self.models = {folder.parent.name: _load(folder.parent) for folder in repository.glob("*/config.pbtxt")}
        self.regions: dict[str, mmap.mmap] = {}
        # Statuses that the next inferences are answered with, before any work.
        self.refuse: list[grpc.StatusCode] = []
        # Set to let inferences go on; a test clears it to make the server slow.
        self.go = threading.Event()
        self.go.set()
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(
            self._pool, options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.go.set()
        self._server.stop(None).wait()
        self._pool.shutdown()
        for region in self.regions.values():
            region.close()

    def __enter__(self) -> "TritonServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _load(folder: Path) -> _Model:
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.backend == "onnxruntime", f"{folder.name}: this server runs onnxruntime only"
    return _Model(folder, config)


def _opened(model: _Model) -> onnxruntime.InferenceSession:
    folder, config = model.folder, model.config
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "1" / config.default_model_filename), options)
    types = {entry.name: entry.data_type for entry in config.input}
    for warmup in config.model_warmup:
        tensors = {}
        for name, entry in warmup.inputs.items():
            assert entry.data_type == types[name], f"{folder.name}: {name} is warmed with another type"
            shape = ([1] if config.max_batch_size else []) + list(entry.dims)
            size = int(np.prod(shape)) * _dtype(_NAMES[types[name]]).itemsize
            content = bytes(size) if entry.zero_data else (folder / "warmup" / entry.input_data_file).read_bytes()
            assert len(content) >= size, f"{folder.name}: {entry.input_data_file} is too short"
            tensors[name] = _tensor(content[:size], shape, _NAMES[types[name]])
        _run(session, config, tensors, [output.name for output in config.output])
    return session


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, server: TritonServer) -> None:
        self._server = server

    def __getattribute__(self, name: str) -> Any:
        method = object.__getattribute__(self, name)
        return _refusing(method) if name[0].isupper() else method

    def _model(self, name: str, version: str) -> _Model:
        if name not in self._server.models or version not in ("", "1"):
            raise TritonRefusal(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        return self._server.models[name]

    def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._server.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        there = request.name in self._server.models and request.version in ("", "1")
        return service_pb2.ModelReadyResponse(ready=there)

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        models = [{"name": name, "version": "1", "state": "READY"} for name in self._server.models]
        return service_pb2.RepositoryIndexResponse(models=models)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self._model(request.name, request.version).config)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        config = self._model(request.name, request.version).config
        lead = [-1] if config.max_batch_size else []

        def tensors(entries: Any) -> list[Any]:
            return [
                {"name": entry.name, "datatype": _NAMES[entry.data_type], "shape": [*lead, *entry.dims]}
                for entry in entries
            ]

        return service_pb2.ModelMetadataResponse(
            name=config.name,
            versions=["1"],
            platform=config.platform,
            inputs=[service_pb2.ModelMetadataResponse.TensorMetadata(**t) for t in tensors(config.input)],
            outputs=[service_pb2.ModelMetadataResponse.TensorMetadata(**t) for t in tensors(config.output)],
        )

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        try:
            with open(f"/dev/shm{request.key}", "r+b") as file:
                self._server.regions[request.name] = mmap.mmap(file.fileno(), request.byte_size)
        except OSError as error:
            raise TritonRefusal(grpc.StatusCode.INTERNAL, f"Unable to open shared memory region: {error}") from error
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self._server.regions.pop(request.name).close()
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self._server.go.wait()
        if self._server.refuse:
            raise TritonRefusal(self._server.refuse.pop(0), "refused for the test")
        model = self._model(request.model_name, request.model_version)
        tensors = self._inputs(model, request)
        wanted = [output.name for output in request.outputs] or [output.name for output in model.config.output]
        results = _run(model.session, model.config, tensors, wanted)
        model.calls += 1
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        asked = {output.name: output for output in request.outputs}
        described = {output.name: output for output in model.config.output}
        for name, tensor in results.items():
            shape = _wire_shape(described[name], list(tensor.shape))
            response.outputs.add(name=name, datatype=_NAMES[described[name].data_type], shape=shape)
            content = _bytes(tensor)
            place = asked[name].parameters if name in asked else {}
            if "shared_memory_region" in place:
                self._memory(place, len(content))[:] = content
                content = b""
            response.raw_output_contents.append(content)
        return response

    def _inputs(self, model: _Model, request: Any) -> dict[str, torch.Tensor]:
        described = {entry.name: entry for entry in model.config.input}
        if {entry.name for entry in request.inputs} != set(described):
            raise TritonRefusal(grpc.StatusCode.INVALID_ARGUMENT, f"expected {len(described)} inputs")
        raw = iter(request.raw_input_contents)
        tensors = {}
        for entry in request.inputs:
            config = described[entry.name]
            shape = list(entry.shape)
            _require_shape(model.config, config, shape)
            size = int(np.prod(shape)) * _dtype(entry.datatype).itemsize
            if "shared_memory_region" in entry.parameters:
                content = bytes(self._memory(entry.parameters, size))
            else:
                content = next(raw)
            if len(content) != size or entry.datatype != _NAMES[config.data_type]:
                raise TritonRefusal(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"input byte size mismatch for input '{entry.name}': expected {size}, got {len(content)}",
                )
            tensors[entry.name] = _tensor(content, shape, entry.datatype)
        return tensors

    def _memory(self, parameters: Any, size: int) -> memoryview:
        name = parameters["shared_memory_region"].string_param
        if name not in self._server.regions:
            raise TritonRefusal(grpc.StatusCode.INVALID_ARGUMENT, f"Unable to find shared memory region: '{name}'")
        offset = parameters["shared_memory_offset"].int64_param if "shared_memory_offset" in parameters else 0
        given = parameters["shared_memory_byte_size"].int64_param
        if given < size:
            raise TritonRefusal(grpc.StatusCode.INVALID_ARGUMENT, f"shared memory size {given} is less than {size}")
        return memoryview(self._server.regions[name])[offset : offset + size]


def _refusing(method: Any) -> Any:
    def answer(request: Any, context: Any) -> Any:
        try:
            return method(request, context)
        except TritonRefusal as refusal:
            context.abort(refusal.code, str(refusal))

    return answer


def _require_shape(config: Any, described: Any, shape: list[int]) -> None:
    rows = shape[:1] if config.max_batch_size else []
    fits = len(shape) - len(rows) == len(described.dims) and all(
        wanted in (-1, size) for wanted, size in zip(described.dims, shape[len(rows) :], strict=True)
    )
    if not fits or (rows and not 1 <= rows[0] <= config.max_batch_size):
        raise TritonRefusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"unexpected shape for input '{described.name}': expected {list(described.dims)}, got {shape},"
            f" batch of at most {config.max_batch_size}",
        )


def _run(
    session: onnxruntime.InferenceSession, config: Any, tensors: dict[str, torch.Tensor], wanted: list[str]
) -> dict[str, torch.Tensor]:
    described = {entry.name: entry for entry in config.input}
    feeds = {}
    for name, tensor in tensors.items():
        shaped = tensor.reshape(tensor.shape[:-1]) if described[name].HasField("reshape") else tensor
        # By DLPack, because numpy has no bfloat16.
        feeds[name] = onnxruntime.OrtValue(_pybind_state.OrtValue.from_dlpack(shaped.__dlpack__()))
    results = session.run_with_ort_values(wanted, feeds)
    return {
        name: torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
        for name, value in zip(wanted, results, strict=True)
    }


def _wire_shape(described: Any, shape: list[int]) -> list[int]:
    return [*shape, 1] if described.HasField("reshape") else shape


def _dtype(triton: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, str(port_dtype(triton)))
    return dtype


def _tensor(content: bytes, shape: list[int], triton: str) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=_dtype(triton))
    return torch.frombuffer(bytearray(content), dtype=_dtype(triton)).reshape(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
