"""A model repository that NVIDIA Triton serves as it is: a folder a graph, with config.pbtxt, version and warmup."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from google.protobuf import text_format
from torch import Tensor
from tritonclient.grpc import model_config_pb2

from services.compiler.targets.axes import sizes
from services.compiler.targets.onnx_parts import has_scalars, onnx_parts, widen_scalars
from services.kit.faults import failed_precondition
from services.runtimes.artifacts.manifest import ArtifactPrecision, Axis, Graph, Port
from services.runtimes.sessions.triton_ports import IDENTITY_PARAMETER, PORTS_PARAMETER, Ports, triton_dtype

# Within the artifact: Triton takes every folder of its repository for a model.
REPOSITORY = "repository"
VERSION = "1"
CONFIG_FILE = "config.pbtxt"
WARMUP_FOLDER = "warmup"
# Warmup tensors up to this size are realistic and stand in files; larger ones, such as caches, are zeros.
WARMUP_FILE_BYTES = 4 * 1024 * 1024
_BACKENDS = {".onnx": "onnxruntime", ".xml": "openvino", ".plan": "tensorrt"}
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}  # openvino has none, only its backend
_ACCELERATORS = {"tensorrt": ("onnxruntime", "KIND_GPU"), "openvino": ("onnxruntime", "KIND_CPU")}


@dataclass(frozen=True)
class BuiltGraph:
    """A finished graph. file: *.onnx, *.xml or *.plan, with its weights beside it."""

    graph: Graph  # with the ports and axes that the file has
    file: Path
    example: Callable[[Mapping[str, int]], dict[str, Tensor]]  # as ExportedGraph.example; converted to the ports' types


@dataclass(frozen=True)
class RepositoryOptions:
    """How Triton is to serve the graphs."""

    prefix: str  # before the component in the models' names, such as "handwriting-tiny-"
    precision: ArtifactPrecision
    max_batch_size: int = 64
    instance_count: int = 1  # copies of each graph, a GPU or on the CPU
    threads: int = 0  # of one instance on the CPU; 0 for all cores
    # How long a request may wait for others to share its batch, microseconds; for a decoder's steps always 0.
    queue_delay_us: int = 1000
    # What runs the graph within onnxruntime; "tensorrt" builds engines while Triton loads the model, for minutes.
    accelerator: Literal["", "tensorrt", "openvino"] = ""


def write_repository(
    graphs: Sequence[BuiltGraph], folder: Path, hardware: str, options: RepositoryOptions
) -> tuple[Graph, ...]:
    """Write a model a graph into the folder's subfolder REPOSITORY. The result's files are relative to the folder.

    hardware: label that Triton will run on. Raises Fault (FAILED_PRECONDITION) for a graph that Triton's backend cannot
    serve; the message names the tensor.
    """
    return tuple(_write_model(built, folder, hardware, options) for built in graphs)


def model_name(graph: Graph, options: RepositoryOptions) -> str:
    """What the graph is called in Triton."""
    return f"{options.prefix}{graph.component}"


def batch_axis(graph: Graph, backend: str, precision: ArtifactPrecision) -> Axis | None:
    """The axis that Triton may put requests together on; None if it must leave them alone.

    It has to lead every input and output and stand nowhere else. Dynamic 8-bit ranges span the whole batch, so that a
    stranger's rows would change one's own results. OpenVINO's backend takes full batches only.
    """
    leading = {port.shape[0] if port.shape else None for port in (*graph.inputs, *graph.outputs)}
    name = leading.pop() if len(leading) == 1 else None
    inner = {size for port in (*graph.inputs, *graph.outputs) for size in port.shape[1:]}
    axis = next((axis for axis in graph.axes if axis.name == name), None)
    if axis is None or name in inner or axis.low > 1 or backend == "openvino" or precision == "int8_dynamic":
        return None
    return axis


def _write_model(built: BuiltGraph, folder: Path, hardware: str, options: RepositoryOptions) -> Graph:
    backend = _BACKENDS[built.file.suffix]
    name = model_name(built.graph, options)
    model = folder / REPOSITORY / name
    target = model / VERSION / f"model{built.file.suffix}"
    placed = _place(built.file, target)
    config = _config(built.graph, name, backend, hardware, options)
    config.default_model_filename = target.name
    config.parameters[IDENTITY_PARAMETER].string_value = _digest(placed)
    batch = config.max_batch_size > 0
    for sample, sizes_of_axes in _warmup_sizes(built.graph, batch):
        warmup = config.model_warmup.add(name=sample, batch_size=1 if batch else 0, count=1)
        _add_inputs(warmup, built, sizes_of_axes, model / WARMUP_FOLDER, batch)
    (model / CONFIG_FILE).write_text(text_format.MessageToString(config))
    return msgspec.structs.replace(built.graph, file=target.relative_to(folder).as_posix())


def _config(
    graph: Graph, name: str, backend: str, hardware: str, options: RepositoryOptions
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend=backend, platform=_PLATFORMS.get(backend, ""))
    axis = batch_axis(graph, backend, options.precision)
    config.max_batch_size = 0 if axis is None else min(axis.high, options.max_batch_size)
    for port in graph.inputs:
        _describe(config.input.add(name=port.name), port, backend, axis)
    for port in graph.outputs:
        _describe(config.output.add(name=port.name), port, backend, axis)
    config.version_policy.latest.num_versions = 1
    config.model_transaction_policy.decoupled = False
    if axis is not None and config.max_batch_size > 1:
        # A decoder's next step waits for the one before: a pause would be paid for every token.
        delay = 0 if graph.component == "decoder" else options.queue_delay_us
        config.dynamic_batching.max_queue_delay_microseconds = delay
    on_gpu = hardware in ("cuda", "rocm")
    group = config.instance_group.add(count=options.instance_count)
    group.kind = group.KIND_GPU if on_gpu else group.KIND_CPU
    _accelerate(config, graph, on_gpu, options)
    if options.threads and not on_gpu and backend != "tensorrt":
        key = {"onnxruntime": "intra_op_thread_count", "openvino": "INFERENCE_NUM_THREADS"}[backend]
        config.parameters[key].string_value = str(options.threads)
    ports = Ports(graph.inputs, graph.outputs, graph.axes)
    config.parameters[PORTS_PARAMETER].string_value = msgspec.json.encode(ports).decode()
    return config


def _describe(
    described: model_config_pb2.ModelInput | model_config_pb2.ModelOutput, port: Port, backend: str, axis: Axis | None
) -> None:
    dtype = triton_dtype(port.dtype)
    if dtype is None or (dtype == "BF16" and backend != "tensorrt"):
        raise failed_precondition(
            "TENSOR_NOT_SERVED",
            f"Triton's {backend} backend has no {port.dtype} tensors, and {port.name} is one; compile to float16, or to"
            " bfloat16 with float32 inputs and outputs",
        )
    if not port.shape and backend != "onnxruntime":
        raise failed_precondition(
            "TENSOR_NOT_SERVED", f"Triton takes no scalars, and {port.name} is one; compile to onnx, which is rewritten"
        )
    described.data_type = model_config_pb2.DataType.Value(f"TYPE_{dtype}")
    shape = port.shape if axis is None else port.shape[1:]
    described.dims.extend([-1 if isinstance(size, str) else size for size in shape] or [1])
    if axis is not None and not shape:
        # Triton knows no tensors without dimensions; it takes one element a row, and hands the backend the row.
        described.reshape.SetInParent()


def _accelerate(config: model_config_pb2.ModelConfig, graph: Graph, on_gpu: bool, options: RepositoryOptions) -> None:
    if not options.accelerator:
        return
    backend, kind = _ACCELERATORS[options.accelerator]
    here = "KIND_GPU" if on_gpu else "KIND_CPU"
    if (config.backend, here) != (backend, kind):
        raise failed_precondition(
            "ACCELERATOR_NOT_FIT",
            f"the accelerator {options.accelerator} works within {backend} on {kind}; {config.name} runs by"
            f" {config.backend} on {here}",
        )
    accelerators = config.optimization.execution_accelerators
    if options.accelerator == "openvino":
        accelerators.cpu_execution_accelerator.add(name="openvino")
        return
    bounds = {axis.name: sizes(axis) for axis in graph.axes}
    parameters = accelerators.gpu_execution_accelerator.add(name="tensorrt").parameters
    parameters["precision_mode"] = "FP16" if options.precision == "float16" else "FP32"
    parameters["trt_engine_cache_enable"] = "1"
    parameters["trt_timing_cache_enable"] = "1"
    for which, key in enumerate(("min", "opt", "max")):
        shapes = (
            f"{port.name}:{'x'.join(str(bounds[s][which] if isinstance(s, str) else s) for s in port.shape)}"
            for port in graph.inputs
            if any(isinstance(size, str) for size in port.shape)
        )
        parameters[f"trt_profile_{key}_shapes"] = ",".join(shapes)


def _warmup_sizes(graph: Graph, batch: bool) -> list[tuple[str, dict[str, int]]]:
    """The sizes that Triton runs once before it calls the model ready: a small request and a usual one."""
    bounds = {axis.name: sizes(axis) for axis in graph.axes}
    # A warmup tensor of no elements is not one that Triton can hold.
    small = {name: max(1, low) for name, (low, _, _) in bounds.items()}
    usual = {name: max(1, optimal) for name, (_, optimal, _) in bounds.items()}
    if batch:
        usual[str(graph.inputs[0].shape[0])] = 1
    return [("small", small)] if small == usual else [("small", small), ("usual", usual)]


def _add_inputs(
    warmup: model_config_pb2.ModelWarmup, built: BuiltGraph, axes: Mapping[str, int], folder: Path, batch: bool
) -> None:
    example = built.example(axes)
    for port in built.graph.inputs:
        tensor = example[port.name].to(getattr(torch, port.dtype)).contiguous()
        shape = tuple(tensor.shape)[1 if batch else 0 :]
        entry = warmup.inputs[port.name]
        entry.data_type = model_config_pb2.DataType.Value(f"TYPE_{triton_dtype(port.dtype)}")
        entry.dims.extend(shape or (1,))
        if tensor.is_floating_point() and tensor.nbytes > WARMUP_FILE_BYTES:
            entry.zero_data = True
            continue
        folder.mkdir(exist_ok=True)
        entry.input_data_file = f"{warmup.name}-{hashlib.sha256(port.name.encode()).hexdigest()[:16]}"
        (folder / entry.input_data_file).write_bytes(tensor.view(-1).view(torch.uint8).numpy().tobytes())


def _place(source: Path, target: Path) -> list[Path]:
    """Put a graph and the weights beside it where Triton looks for them; by a hard link where that is possible.

    Answers all files that it put there, the graph's first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".onnx" and has_scalars(source):
        widen_scalars(source, target)
    else:
        _link(source, target)
    beside: dict[Path, Path] = {}
    if source.suffix == ".xml":
        beside = {source.with_suffix(".bin"): target.with_suffix(".bin")}
    elif source.suffix == ".onnx":
        # The graph names them, so that they keep their names.
        beside = {weights: target.parent / weights.name for weights in onnx_parts(source)[1:]}
    for weights, place in beside.items():
        _link(weights, place)
    return [target, *beside.values()]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _digest(files: Sequence[Path]) -> str:
    """sha-256 over the files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while piece := content.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
