"""How much rounding harms each layer, found one layer at a time on calibration inputs."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

from services.compiler.layers import Layer, rounded, save, weights_of
from services.compiler.quantize_onnx import four_bit_values
from services.runtimes.artifacts.manifest import ArtifactPrecision

# Inputs that a layer's error is taken over; more change the order little.
_FEEDS_MOST = 4


def rank(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    precision: ArtifactPrecision,
    calibration: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Error of each layer's output when it alone is rounded, by the layer's name: root mean square over that of the
    output in float32. Without calibration inputs, that of its weight.

    The error of a layer is that of its linear map, so that its inputs are computed once and no graph is built anew.
    """
    import onnxruntime

    tensors = weights_of(model)
    nodes = {node.name: node for node in model.graph.node}
    weights = {layer.name: numpy_helper.to_array(tensors[layer.weight]) for layer in layers}
    sums: dict[str, list[float]] = {layer.name: [0.0, 0.0] for layer in layers}
    mapped = [layer for layer in layers if layer.operator in ("MatMul", "Gemm", "Conv")] if calibration else []
    if mapped:
        activations = sorted({nodes[layer.name].input[0] for layer in mapped})
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "watched.onnx"
            save(_answering(model, activations), file)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for feed in _evenly(calibration, _FEEDS_MOST):
            values = {name: tensor.numpy() for name, tensor in feed.items()}
            known = {name: values[name] for name in activations if name in values}
            asked = [name for name in activations if name not in values]
            known |= dict(zip(asked, session.run(asked, values), strict=True)) if asked else {}
            for layer in mapped:
                weight = weights[layer.name]
                harmed, whole = _output_error(
                    nodes[layer.name], known[nodes[layer.name].input[0]], weight, layer, precision
                )
                sums[layer.name][0] += harmed
                sums[layer.name][1] += whole
    for layer in layers:
        if layer not in mapped:
            weight = weights[layer.name]
            difference = _rounded_weight(weight, layer, precision) - weight
            sums[layer.name] = [float(np.square(difference).sum()), float(np.square(weight).sum())]
    return {name: float(np.sqrt(harmed / whole)) if whole > 0 else 0.0 for name, (harmed, whole) in sums.items()}


def _answering(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {value.name for value in [*model.graph.input, *model.graph.output]}
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    return watched


def _evenly(feeds: Sequence[Mapping[str, Tensor]], count: int) -> list[Mapping[str, Tensor]]:
    if len(feeds) <= count:
        return list(feeds)
    return [feeds[number * len(feeds) // count] for number in range(count)]


def _rounded_weight(weight: NDArray[np.float32], layer: Layer, precision: ArtifactPrecision) -> NDArray[np.float32]:
    if precision == "int4_weight_only" and layer.operator == "MatMul":
        return four_bit_values(weight)
    values, scale = rounded(weight, layer.channel_axis)
    return values.astype(np.float32) * scale


def _output_error(
    node: onnx.NodeProto,
    activation: NDArray[np.float32],
    weight: NDArray[np.float32],
    layer: Layer,
    precision: ArtifactPrecision,
) -> tuple[float, float]:
    """Sums of squares: of the error, and of the output in float32."""
    given = torch.from_numpy(np.ascontiguousarray(activation))
    seen = _rounded_activation(given) if precision in ("int8_static", "int8_dynamic") else given
    forward = _map(node, layer)
    exact = forward(given, torch.from_numpy(weight.copy()))
    harmed = forward(seen, torch.from_numpy(_rounded_weight(weight, layer, precision))) - exact
    return float(harmed.double().square().sum()), float(exact.double().square().sum())


def _rounded_activation(tensor: Tensor) -> Tensor:
    """To 8 bits over its whole range, as DynamicQuantizeLinear does."""
    low, high = min(float(tensor.min()), 0.0), max(float(tensor.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return ((tensor / scale).round().add(zero).clamp(0, 255) - zero) * scale


def _map(node: onnx.NodeProto, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if layer.operator == "MatMul":
        return torch.matmul
    if layer.operator == "Gemm":
        return lambda x, w: x @ (w.t() if attributes.get("transB", 0) else w)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        rank = w.dim() - 2
        pads = attributes.get("pads", [0] * (2 * rank))
        # onnx names all beginnings and then all ends; torch goes from the last dimension to the first.
        around = [size for place in reversed(range(rank)) for size in (pads[place], pads[place + rank])]
        forward = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        return forward(
            functional.pad(x, around),
            w,
            stride=tuple(attributes.get("strides", [1] * rank)),
            dilation=tuple(attributes.get("dilations", [1] * rank)),
            groups=attributes.get("group", 1),
        )

    return convolve
