"""ONNX graphs with weights of 8 or 4 bits.

What each precision is in ONNX, all of it in operators that the standard has but MatMulNBits:

int8_weight_only  Weights are int8 with one scale a channel; Cast and Mul bring them back to float32. Runtimes do that
                  once, on loading.
int8_dynamic      Linear layers are DynamicQuantizeLinear and MatMulInteger: products of 8 bits, with the range of the
                  activations found anew in every run. Everything else as in int8_weight_only.
int8_static       Linear layers and convolutions stand between QuantizeLinear and DequantizeLinear, with the ranges of
                  the activations found on calibration inputs. Embeddings as in int8_weight_only.
int4_weight_only  Linear layers are MatMulNBits of onnxruntime (domain com.microsoft, which OpenVINO reads too): 4 bits,
                  one scale for 32 numbers. Everything else as in int8_weight_only.

Weights of 8-bit products are uint8 around 128, not int8: without VNNI, processors multiply uint8 by int8 in pairs that
overflow 16 bits, so that a graph would be right on one machine and wrong on the other. Widening uint8 is slower by a
quarter and always right.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from services.compiler.layers import BuildError, Layer, find_layers, rounded, save, weights_of
from services.runtimes.artifacts.manifest import ArtifactPrecision

# Numbers that share a scale at 4 bits. Smaller blocks than GPTQ's usual 128: small models need them, and 4.5 bits a
# weight is what they come to with float16 scales, 5 with the float32 ones here.
INT4_BLOCK = 32
_MICROSOFT = "com.microsoft"

Feeds = Sequence[Mapping[str, Tensor]]


def quantize(
    model: onnx.ModelProto, precision: ArtifactPrecision, layers: Sequence[Layer], calibration: Feeds = ()
) -> onnx.ModelProto:
    """A copy of the model in which these layers have the precision.

    layers: out of find_layers. calibration: inputs of the graph, for int8_static. Raises BuildError.
    """
    quantized = copy.deepcopy(model)
    if precision == "int8_weight_only":
        _pack(quantized, layers)
    elif precision == "int8_dynamic":
        linear = [layer for layer in layers if layer.operator in ("MatMul", "Gemm") and _is_plain(quantized, layer)]
        _multiply_dynamically(quantized, linear, {layer.name for layer in layers})
        _pack(quantized, [layer for layer in layers if layer not in linear])
    elif precision == "int8_static":
        if not calibration:
            raise BuildError("int8_static needs inputs to calibrate on, and there are none for this graph")
        computed = [layer for layer in layers if layer.operator in ("MatMul", "Gemm", "Conv")]
        quantized = _between_ranges(quantized, computed, calibration)
        _pack(quantized, [layer for layer in layers if layer not in computed])
    elif precision == "int4_weight_only":
        linear = [layer for layer in layers if layer.operator == "MatMul"]
        quantized = _four_bits(quantized, linear)
        _pack(quantized, [layer for layer in layers if layer not in linear])
    else:
        raise BuildError(f"{precision} is not a precision of integers")
    return quantized


# --- weights alone ---


def _pack(model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
    """Weights as int8, brought back to float32 by Cast and Mul. A weight that layers share is packed once."""
    tensors = weights_of(model)
    nodes = []
    for layer in _one_a_weight(model, layers):
        values, scale = rounded(numpy_helper.to_array(tensors[layer.weight]), layer.channel_axis)
        packed, scale_name, wide = (f"{layer.weight}_{suffix}" for suffix in ("int8", "scale", "cast"))
        _replace(model, layer.weight, [numpy_helper.from_array(values, packed)])
        model.graph.initializer.append(numpy_helper.from_array(scale, scale_name))
        nodes.append(helper.make_node("Cast", [packed], [wide], f"{layer.name}/cast", to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [wide, scale_name], [layer.weight], f"{layer.name}/scale"))
    _prepend(model, nodes)


def _one_a_weight(model: onnx.ModelProto, layers: Sequence[Layer]) -> Iterator[Layer]:
    """One layer for each weight all of whose layers are to be quantized."""
    chosen = {layer.name for layer in layers}
    kept = {layer.weight for layer in find_layers(model) if layer.name not in chosen}
    there = {tensor.name for tensor in model.graph.initializer}
    seen: set[str] = set()
    for layer in layers:
        if layer.weight in there and layer.weight not in seen | kept:
            seen.add(layer.weight)
            yield layer


def _replace(model: onnx.ModelProto, name: str, by: Sequence[TensorProto]) -> None:
    initializers = model.graph.initializer
    place = next(place for place, tensor in enumerate(initializers) if tensor.name == name)
    del initializers[place]
    initializers.extend(by)


def _prepend(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])


# --- products of 8 bits, ranges found in every run ---


def _is_plain(model: onnx.ModelProto, layer: Layer) -> bool:
    """Whether the node is nn.Linear and nothing more."""
    node = _node(model, layer)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return node.op_type == "MatMul" or (attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0)


def _node(model: onnx.ModelProto, layer: Layer) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == layer.name)


def _multiply_dynamically(model: onnx.ModelProto, layers: Sequence[Layer], quantized: Set[str]) -> None:
    """quantized: names of all layers that leave float32, these and others."""
    graph = model.graph
    chosen = {layer.name: layer for layer in layers}
    tensors = weights_of(model)
    packed: dict[str, tuple[str, str]] = {}  # weight -> uint8 [in, out], its scales [out]
    ranged: dict[str, list[str]] = {}  # activation -> its uint8, scale, zero point
    before: list[onnx.NodeProto] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer = chosen.get(node.name)
        if layer is None or layer.weight not in node.input:
            nodes.append(node)
            continue
        if layer.weight not in packed:
            values = numpy_helper.to_array(tensors[layer.weight])
            packed[layer.weight] = _pack_for_products(model, layer, values, quantized, before)
        weight, scale = packed[layer.weight]
        activation, name, output = node.input[0], node.name, node.output[0]
        if activation not in ranged:
            ranged[activation] = [f"{activation}_{part}" for part in ("uint8", "uint8_scale", "uint8_zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [activation], ranged[activation], f"{name}/range"))
        codes, factor, zero = ranged[activation]
        biased = node.op_type == "Gemm" and len(node.input) > 2 and bool(node.input[2])
        product = f"{output}_product" if biased else output
        # In this form, and no other, onnxruntime makes one operator of it.
        zeros = f"{layer.weight}_zero"
        nodes += [
            helper.make_node("MatMulInteger", [codes, weight, zero, zeros], [f"{output}_int32"], name),
            helper.make_node("Cast", [f"{output}_int32"], [f"{output}_cast"], f"{name}/cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [factor, scale], [f"{output}_scale"], f"{name}/scale"),
            helper.make_node("Mul", [f"{output}_cast", f"{output}_scale"], [product], f"{name}/product"),
        ]
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [output], f"{name}/bias"))
    del graph.node[:]
    graph.node.extend([*before, *nodes])


def _pack_for_products(
    model: onnx.ModelProto,
    layer: Layer,
    weight: NDArray[np.float32],
    quantized: Set[str],
    before: list[onnx.NodeProto],
) -> tuple[str, str]:
    values, scale = rounded(weight, layer.channel_axis)
    flat = scale.reshape(-1)
    packed, scale_name, zeros = (f"{layer.weight}_{suffix}" for suffix in ("uint8", "scale", "zero"))
    others = [one for one in find_layers(model) if one.weight == layer.weight and one.name != layer.name]
    new = [
        numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), packed),
        numpy_helper.from_array(flat, scale_name),
        numpy_helper.from_array(np.full(flat.shape, 128, np.uint8), zeros),
    ]
    if others:
        # Such as the embedding that the output layer shares: from the same bytes, unless it has to stay as it was.
        if any(one.channel_axis != layer.channel_axis or one.name not in quantized for one in others):
            model.graph.initializer.extend(new)
        else:
            _replace(model, layer.weight, new)
            wide, centred, column = (f"{layer.weight}_{suffix}" for suffix in ("cast", "centred", "scale_column"))
            shape = [1] * weight.ndim
            shape[layer.channel_axis] = -1
            model.graph.initializer.append(numpy_helper.from_array(np.array(128, np.float32), f"{layer.weight}_centre"))
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{column}_shape"))
            before += [
                helper.make_node("Cast", [packed], [wide], f"{layer.name}/unpack", to=TensorProto.FLOAT),
                helper.make_node("Sub", [wide, f"{layer.weight}_centre"], [centred], f"{layer.name}/centre"),
                helper.make_node("Reshape", [scale_name, f"{column}_shape"], [column], f"{layer.name}/column"),
                helper.make_node("Mul", [centred, column], [layer.weight], f"{layer.name}/unpacked"),
            ]
    else:
        _replace(model, layer.weight, new)
    if layer.channel_axis == 0:
        # A Gemm's weight is [out, in]. Runtimes turn it round once, on loading.
        turned = f"{packed}_turned"
        before.append(helper.make_node("Transpose", [packed], [turned], f"{layer.name}/turn", perm=[1, 0]))
        packed = turned
    return packed, scale_name


# --- products of 8 bits, ranges found before ---


def _between_ranges(model: onnx.ModelProto, layers: Sequence[Layer], calibration: Feeds) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    if not layers:
        return model
    feeds = [{name: tensor.numpy() for name, tensor in feed.items()} for feed in calibration]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, NDArray[np.generic]] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source.onnx", Path(scratch) / "target.onnx"
        # Inferred anew by the library; what an exporter noted of shapes only contradicts it.
        del model.graph.value_info[:]
        # Simplified already; without this mark the library asks for it.
        model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        save(model, source)
        try:
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=[layer.name for layer in layers],
                op_types_to_quantize=sorted({layer.operator for layer in layers}),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QUInt8,
                # As the source's: one message holds 2 GB at most.
                use_external_data_format=source.with_name(f"{source.name}.data").exists(),
                extra_options={
                    "WeightSymmetric": True,
                    # A linear layer's sums go on in float32, as nothing after them takes 8 bits.
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
        except Exception as error:  # the library raises whatever it met
            raise BuildError(f"int8_static: onnxruntime's quantizer failed: {error}") from error
        return onnx.load(target)


# --- 4 bits ---


def _four_bits(model: onnx.ModelProto, layers: Sequence[Layer]) -> onnx.ModelProto:
    tensors = weights_of(model)
    nodes = {node.name: node for node in model.graph.node}
    for layer in layers:
        node = nodes[layer.name]
        weight = numpy_helper.to_array(tensors[layer.weight])
        size_in, size_out = weight.shape
        packed, scale = _blocks(weight)
        names = [f"{layer.name}.weight_int4", f"{layer.name}.weight_int4_scale"]
        model.graph.initializer.append(numpy_helper.from_array(packed, names[0]))
        model.graph.initializer.append(numpy_helper.from_array(scale, names[1]))
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], *names],
                list(node.output),
                node.name,
                domain=_MICROSOFT,
                K=size_in,
                N=size_out,
                bits=4,
                block_size=INT4_BLOCK,
                # Activations may be rounded to 8 bits, a block at a time: twice as fast, and its error is a
                # hundredth of what the weights' 4 bits make.
                accuracy_level=4,
            )
        )
    if layers and not any(opset.domain == _MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _blocks(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """[in, out] as MatMulNBits has it: uint8 [out, blocks, block / 2], the first of two in the low bits, around 8; and
    scales [out, blocks]."""
    size_in, size_out = weight.shape
    count = -(-size_in // INT4_BLOCK)
    padded = np.zeros((size_out, count * INT4_BLOCK), np.float32)
    padded[:, :size_in] = weight.T
    blocks = padded.reshape(size_out, count, INT4_BLOCK)
    # The number that is largest becomes -8, of which there is no positive twin: one step more for it.
    places = np.abs(blocks).argmax(-1)
    largest = np.take_along_axis(blocks, places[..., None], -1)[..., 0]
    scale = np.where(largest != 0, largest / -8, 1.0).astype(np.float32)
    values = np.clip(np.rint(blocks / scale[..., None]) + 8, 0, 15).astype(np.uint8)
    return values[..., 0::2] | (values[..., 1::2] << 4), scale


def four_bit_values(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a weight [in, out] is after rounding to 4 bits."""
    packed, scale = _blocks(weight)
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], INT4_BLOCK)
    wide = (values.astype(np.float32) - 8) * scale[..., None]
    return np.ascontiguousarray(wide.reshape(weight.shape[1], -1)[:, : weight.shape[0]].T)
