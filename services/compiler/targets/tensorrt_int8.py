"""8-bit graphs as TensorRT wants them: signed, around 0, and with float biases.

The compiler's int8_static rounds inputs to unsigned bytes around any zero point, which processors are fast with.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_MOST = 127


def to_signed(source: Path, target: Path) -> None:
    """Write the graph anew with int8 in place of uint8 and every zero point 0.

    Weights around their middle keep their values exactly. An input's range is widened to the same distance on both
    sides of 0: one that holds no negative numbers loses one of its 8 bits. Biases become float32 again, as TensorRT has
    no DequantizeLinear of int32.
    """
    model = onnx.load(str(source))
    _Rewrite(model).run()
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)


class _Rewrite:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.added: dict[str, TensorProto] = {}

    def run(self) -> None:
        nodes = []
        for node in self.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.tensors:
                if not self._constant(node):
                    nodes.append(node)
            else:
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    nodes += self._cut(node)
                    self._range(node)
                nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | {output.name for output in self.graph.output}
        kept = [tensor for tensor in (*self.tensors.values(), *self.added.values()) if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        # It says uint8 of what no longer is.
        del self.graph.value_info[:]

    def _constant(self, node: NodeProto) -> bool:
        """Convert a weight; answers True for a bias, which takes the node's place as a float."""
        values = numpy_helper.to_array(self.tensors[node.input[0]])
        scale, zero = self._scale_and_zero(node)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        around = values.astype(np.int64) - _along(zero, values, axis)
        if values.dtype == np.int32:
            floats = (around * _along(scale, values, axis)).astype(np.float32)
            self.added[node.output[0]] = numpy_helper.from_array(floats, node.output[0])
            return True
        others = tuple(place for place in range(values.ndim) if zero.ndim and place != axis % values.ndim)
        furthest = np.abs(around).max(axis=others if zero.ndim else None, initial=1)
        factor = np.maximum(furthest / _MOST, 1.0)
        signed = np.clip(np.round(around / _along(factor, values, axis)), -_MOST, _MOST).astype(np.int8)
        self._replace(node, 0, signed)
        self._replace(node, 1, (scale * factor.reshape(scale.shape)).astype(scale.dtype))
        self._replace(node, 2, np.zeros(scale.shape, np.int8))
        return False

    def _cut(self, node: NodeProto) -> list[NodeProto]:
        """A Relu where unsigned bytes cut off negative numbers: onnxruntime's quantizer drops those before them."""
        _, zero = self._scale_and_zero(node)
        if node.op_type != "QuantizeLinear" or zero.dtype != np.uint8 or np.any(zero):
            return []
        name = f"{node.input[0]}/signed/relu/{node.name or node.output[0]}"
        relu = helper.make_node("Relu", [node.input[0]], [name], name=name)
        node.input[0] = name
        return [relu]

    def _range(self, node: NodeProto) -> None:
        scale, zero = self._scale_and_zero(node)
        low, high = (0, 255) if zero.dtype == np.uint8 else (-128, 127)
        furthest = np.maximum(high - zero.astype(np.int64), zero.astype(np.int64) - low)
        self._replace(node, 1, (scale * furthest / _MOST).astype(scale.dtype))
        self._replace(node, 2, np.zeros(scale.shape, np.int8))

    def _scale_and_zero(self, node: NodeProto) -> tuple[np.ndarray, np.ndarray]:
        scale = numpy_helper.to_array(self.tensors[node.input[1]])
        has_zero = len(node.input) > 2 and node.input[2]
        return scale, numpy_helper.to_array(self.tensors[node.input[2]]) if has_zero else np.zeros(
            scale.shape, np.uint8
        )

    def _replace(self, node: NodeProto, place: int, values: np.ndarray) -> None:
        """Give the node an initializer of its own: others may share the old one."""
        name = f"{node.input[0]}/signed/{('values', 'scale', 'zero')[place]}/{node.name or node.output[0]}"
        self.added[name] = numpy_helper.from_array(np.asarray(values), name)
        if place == len(node.input):
            node.input.append(name)
        else:
            node.input[place] = name


def _along(values: np.ndarray, like: np.ndarray, axis: int) -> np.ndarray:
    """Values per slice of an axis, shaped to be broadcast over the whole tensor."""
    if not values.ndim or not like.ndim:
        return values
    return values.reshape([-1 if place == axis % like.ndim else 1 for place in range(like.ndim)])
