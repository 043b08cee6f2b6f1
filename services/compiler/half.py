"""ONNX graphs that compute in 16 bits, with inputs and outputs in float32, so that no engine has to care."""

import copy
from collections.abc import Set

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from services.compiler.layers import BuildError, initializer_bytes

_FLOAT16_MOST = 65504.0  # the largest finite number
# Stay in float32: sums over many numbers and exponentials lose or overflow in 16 bits. Matrix products and
# convolutions, which the time goes into, accumulate in float32 inside every runtime's kernels.
BLOCKED = frozenset(
    {
        "BatchNormalization",
        "CumSum",
        "Exp",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "Pow",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Softmax",
        "Sqrt",
        # No runtime's CPU provider resizes in 16 bits.
        "Resize",
    }
)
# Inputs that the standard wants in float32 whatever the others are.
_FIXED_INPUTS = {"Resize": {1, 2}}
# Larger weights are left out of the copy that types are inferred on.
_SHAPE_SIZE_MOST = 1024


def to_16_bits(model: onnx.ModelProto, dtype: int, kept_in_float: Set[str] = frozenset()) -> onnx.ModelProto:
    """A copy of a float32 model that computes in TensorProto.FLOAT16 or BFLOAT16 between its inputs and outputs.

    kept_in_float: names of nodes that stay in float32, besides the operators that always do. Finite numbers beyond what
    float16 holds become its largest. Raises BuildError for a model with branches or loops.
    """
    model = copy.deepcopy(model)
    graph = model.graph
    floats = _float_values(model)
    initializers = {tensor.name for tensor in graph.initializer}
    stay = {node.name for node in graph.node if _stays(node)} | set(kept_in_float) | _before_angles(graph)
    in_float = {
        name
        for node in graph.node
        for place, name in enumerate(node.input)
        if name in initializers and (node.name in stay or place in _FIXED_INPUTS.get(node.op_type, ()))
    }
    casts: dict[tuple[str, bool], str] = {}
    nodes: list[NodeProto] = []
    answered: set[str] = set()  # values in 16 bits
    weights: set[str] = set()  # initializers that are taken in 16 bits alone
    for node in graph.node:
        stays, fixed = node.name in stay, _FIXED_INPUTS.get(node.op_type, ())
        for place, name in enumerate(node.input):
            half = not stays and place not in fixed
            if name not in floats:
                continue
            if half and name in initializers and name not in in_float:
                weights.add(name)
            elif half != (name in answered):
                if (name, half) not in casts:
                    casts[name, half] = cast = f"{name}_{'half' if half else 'float'}"
                    to = dtype if half else TensorProto.FLOAT
                    nodes.append(helper.make_node("Cast", [name], [cast], f"{cast}/cast", to=to))
                node.input[place] = casts[name, half]
        if not stays:
            _convert_attributes(node, dtype)
            answered.update(name for name in node.output if name in floats)
        nodes.append(node)
    for output in graph.output:
        if output.name in answered:
            _answer_in_float(nodes, output.name)
    tensors = [_converted(tensor, dtype) if tensor.name in weights else tensor for tensor in graph.initializer]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    del graph.node[:]
    graph.node.extend(nodes)
    # It says float32 of what no longer is.
    del graph.value_info[:]
    return model


def _stays(node: NodeProto) -> bool:
    if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
        raise BuildError(f"{node.name} ({node.op_type}) holds a graph of its own, which is not converted to 16 bits")
    return node.op_type in BLOCKED or node.domain not in ("", "ai.onnx")


def _before_angles(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes that compute what sines and cosines are taken of, such as a time step by its frequencies.

    float16 knows 999 to half a unit, which is a good part of a period.
    """
    producers = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    waiting = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node.name in found or node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
            continue
        found.add(node.name)
        waiting += [producers[name] for name in node.input if name in producers]
    return found


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors."""
    # Types do not depend on weights, and a message with large ones cannot be handed to the inference.
    light = onnx.ModelProto()
    light.CopyFrom(model)
    del light.graph.initializer[:]
    del light.graph.value_info[:]
    for tensor in model.graph.initializer:
        if initializer_bytes(tensor) <= _SHAPE_SIZE_MOST:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(light).graph
    floats = {
        value.name
        for value in [*inferred.input, *inferred.value_info, *inferred.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    floats |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    typed = {value.name for value in [*inferred.input, *inferred.value_info, *inferred.output]}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in typed:
                raise BuildError(f"the type of {name}, which {node.name} ({node.op_type}) answers, cannot be inferred")
    return floats


def _convert_attributes(node: NodeProto, dtype: int) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = dtype
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_converted(attribute.t, dtype))


def _answer_in_float(nodes: list[NodeProto], name: str) -> None:
    """Keep the output's name for its float32 form."""
    inside = f"{name}_half"
    taken = {output for node in nodes for output in node.output}
    while inside in taken:
        inside += "_"
    for node in nodes:
        for names in (node.input, node.output):
            for place, value in enumerate(names):
                if value == name:
                    names[place] = inside
    nodes.append(helper.make_node("Cast", [inside], [name], f"{name}/cast", to=TensorProto.FLOAT))


def _converted(tensor: TensorProto, dtype: int) -> TensorProto:
    values = numpy_helper.to_array(tensor).astype(np.float32)
    if dtype == TensorProto.FLOAT16:
        clipped = np.clip(values, -_FLOAT16_MOST, _FLOAT16_MOST)
        # An infinity masks, and has to stay one.
        return numpy_helper.from_array(np.where(np.isinf(values), values, clipped).astype(np.float16), tensor.name)
    import ml_dtypes

    return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), tensor.name)
