"""The layers of an ONNX graph that hold weights, and which of them stay in float."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

# Smaller weights gain nothing: their scales and the nodes that unpack them take as much.
SMALLEST_WEIGHT = 1024
# Beyond it weights lie in "<file>.data" beside the graph, which runtimes map into memory instead of reading it through
# protobuf: ONNX Runtime opened the 913 MB of the decoder of TrOCR-base in 1.8 s instead of 4.7, and took 0.6 GB less
# memory of its own. Smaller graphs gain little and are easier to handle as one file.
INLINE_BYTES_MOST = 64 << 20
# Smaller tensors stay in the graph, whose shapes are computed from some of them.
_APART_BYTES_LEAST = 1024
# Where each begins in the file, so that pages of it are mapped as they lie and no number is read unaligned.
_APART_ALIGNMENT = 4096

Operator = Literal["MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"]


class BuildError(Exception):
    """A graph that cannot be brought to the target and precision; the message says which, why, and what would be."""


@dataclass(frozen=True)
class Layer:
    """A node with a float32 weight of its own, or one that it shares with another layer."""

    name: str  # of the node, which is the layer's name in the checkpoint
    operator: Operator
    weight: str  # the initializer
    # The dimension of the weight along which every output channel (of an embedding: every token) has its own scale.
    channel_axis: int
    size: int  # numbers in the weight


def load(file: Path) -> onnx.ModelProto:
    """A graph with its weights; raises BuildError."""
    try:
        return onnx.load(file)
    except Exception as error:  # protobuf and onnx raise whatever they met
        raise BuildError(f"{file.name} cannot be read as ONNX: {error}") from error


def save(model: onnx.ModelProto | ir.Model, file: Path) -> None:
    """Write a graph, its weights beyond INLINE_BYTES_MOST to "<file>.data" beside it. The model stays as it is.

    Raises OSError.
    """
    if isinstance(model, onnx.ModelProto):
        size = sum(initializer_bytes(tensor) for tensor in model.graph.initializer)
    else:
        weights = (value.const_value for value in model.graph.initializers.values())
        size = sum(weight.nbytes for weight in weights if weight is not None)
    # A session may have mapped what an earlier call wrote here, and a graph that became smaller must not leave it.
    for old in (file, file.with_name(f"{file.name}.data")):
        old.unlink(missing_ok=True)
    if size > INLINE_BYTES_MOST:
        # Not onnx.save, which takes the weights out of the model that it is given.
        apart = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
        ir.save(
            apart,
            file,
            external_data=f"{file.name}.data",
            size_threshold_bytes=_APART_BYTES_LEAST,
            alignment=_APART_ALIGNMENT,
            align_threshold=_APART_BYTES_LEAST,
        )
    elif isinstance(model, onnx.ModelProto):
        onnx.save(model, str(file))
    else:
        ir.save(model, file)


def initializer_bytes(tensor: TensorProto) -> int:
    """What a tensor takes in a file."""
    count = int(np.prod(tensor.dims)) if tensor.dims else 1
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    if tensor.data_type == TensorProto.BFLOAT16:
        return 2 * count
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def weight_bytes(file: Path) -> int:
    """Bytes of all initializers of an ONNX file."""
    graph = onnx.load(file, load_external_data=False).graph
    return sum(initializer_bytes(tensor) for tensor in graph.initializer)


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """All layers with weights worth quantizing, in the order of the graph."""
    floats = {
        tensor.name: tuple(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= SMALLEST_WEIGHT
    }
    layers = []
    for node in model.graph.node:
        place = 0 if node.op_type == "Gather" else 1
        name = node.input[place] if len(node.input) > place else ""
        shape = floats.get(name)
        if shape is None or node.domain not in ("", "ai.onnx"):
            continue
        axis = _channel_axis(node, len(shape))
        if axis is not None:
            layers.append(Layer(node.name, cast(Operator, node.op_type), name, axis, int(np.prod(shape))))
    return layers


def _channel_axis(node: onnx.NodeProto, rank: int) -> int | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMul" and rank == 2:
        return 1
    if node.op_type == "Gemm" and rank == 2 and not attributes.get("transA", 0):
        return 0 if attributes.get("transB", 0) else 1
    if node.op_type == "Conv" and rank >= 3:
        return 0
    # Of a transposed convolution in groups, the second dimension holds the outputs of one group only.
    if node.op_type == "ConvTranspose" and rank >= 3 and attributes.get("group", 1) == 1:
        return 1
    if node.op_type == "Gather" and rank == 2 and attributes.get("axis", 0) == 0:
        return 0
    return None


def excluded_by(patterns: Sequence[str], component: str, layers: Iterable[Layer]) -> set[str]:
    """Names of the layers that a pattern takes out: shell patterns over "component/layer"."""
    return {
        layer.name
        for layer in layers
        if any(fnmatch.fnmatchcase(f"{component}/{layer.name}", pattern) for pattern in patterns)
    }


def weights_of(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def scales(weight: NDArray[np.float32], axis: int, levels: int = 127) -> NDArray[np.float32]:
    """Symmetric scales, one a channel, of the weight's rank: its largest number becomes `levels`."""
    others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    # A channel of zeros may have any scale but 0.
    return (np.where(largest > 0, largest, 1.0) / levels).astype(np.float32)


def rounded(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The weight as int8 from -127 to 127, and its scales."""
    scale = scales(weight, axis)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed in place, with every batch normalization folded into the convolution before it.

    Runtimes do so on loading, but not once the convolution's weight is unpacked from int8; and the layer's name would
    be lost.
    """
    graph = model.graph
    tensors = weights_of(model)
    producers = {output: node for node in graph.node for output in node.output}
    uses: dict[str, int] = {}
    for name in [*(name for node in graph.node for name in node.input), *(output.name for output in graph.output)]:
        uses[name] = uses.get(name, 0) + 1
    gone = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or len([name for name in node.output if name]) > 1:
            continue
        conv = producers.get(node.input[0])
        if conv is None or conv.op_type != "Conv" or uses[node.input[0]] > 1:
            continue
        biased = len(conv.input) > 2 and bool(conv.input[2])
        needed = [*node.input[1:], conv.input[1], *([conv.input[2]] if biased else [])]
        if any(name not in tensors for name in needed) or uses[conv.input[1]] > 1:
            continue
        _fold(model, conv, node, tensors, biased)
        gone.append(node)
    for node in gone:
        graph.node.remove(node)
    if gone:
        # Shapes that were noted for values which are no more.
        del graph.value_info[:]
        _drop_unused(model)
    return model


def _fold(
    model: onnx.ModelProto,
    conv: onnx.NodeProto,
    norm: onnx.NodeProto,
    tensors: Mapping[str, TensorProto],
    biased: bool,
) -> None:
    gamma, beta, mean, variance = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in norm.input[1:])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight = tensors[conv.input[1]]
    values = numpy_helper.to_array(weight)
    folded = (values * factor.reshape(-1, *[1] * (values.ndim - 1))).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(folded, weight.name))
    bias = numpy_helper.to_array(tensors[conv.input[2]]).astype(np.float64) if biased else 0.0
    name = f"{norm.input[1]}_folded_bias"
    model.graph.initializer.append(numpy_helper.from_array((beta + (bias - mean) * factor).astype(np.float32), name))
    inputs = [conv.input[0], conv.input[1], name]
    del conv.input[:]
    conv.input.extend(inputs)
    conv.output[0] = norm.output[0]


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    used |= {output.name for output in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
