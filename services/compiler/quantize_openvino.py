"""OpenVINO IR of an ONNX graph, at each precision.

float32           Weights as they are.
float16           Weights as float16; computed in what the device computes in, float32 on most CPUs.
bfloat16          Weights as float16, which holds them at least as exactly; that it may be computed in bfloat16 is the
                  session's hint, by the manifest's precision.
int8_weight_only  The ONNX graph's own int8 weights (quantize_onnx.py), which OpenVINO unpacks as it computes.
int8_dynamic      The same, and the IR asks for dynamic quantization of the activations, in groups of 32: plain OpenVINO
                  reads it from the file. Processors without 8-bit products leave the activations in float32.
int8_static       nncf.quantize on calibration inputs; what that leaves in float32 of the chosen layers, such as
                  embeddings, as in int8_weight_only.
int4_weight_only  nncf.compress_weights of linear layers, symmetric; everything else as in int8_weight_only.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from services.compiler import quantize_onnx
from services.compiler.layers import BuildError, Layer, save
from services.runtimes.artifacts.manifest import ArtifactPrecision

if TYPE_CHECKING:
    import openvino

# What OpenVINO's CPU plugin takes for its own default where it quantizes activations at all.
_ACTIVATION_GROUP = 32
_INT4_GROUP = 64
# A Gemm that shares its weight with an embedding keeps that one copy.
_COMPUTED = ("MatMul", "Conv")


def write(
    model: onnx.ModelProto,
    precision: ArtifactPrecision,
    layers: Sequence[Layer],
    file: Path,
    calibration: quantize_onnx.Feeds = (),
) -> None:
    """Write the graph as *.xml, with its weights beside it as *.bin.

    model: in float32. layers: those that integers are for. calibration: inputs of the graph, for int8_static. Raises
    BuildError, OSError.
    """
    import openvino

    compress = precision in ("float16", "bfloat16")
    if precision in ("float32", "float16", "bfloat16"):
        converted = _converted(model)
    elif precision in ("int8_weight_only", "int8_dynamic"):
        converted = _converted(quantize_onnx.quantize(model, "int8_weight_only", layers))
        group = _ACTIVATION_GROUP if precision == "int8_dynamic" else 0
        converted.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    elif precision == "int8_static":
        computed = [layer for layer in layers if layer.operator in _COMPUTED]
        rest = [layer for layer in layers if layer not in computed]
        if not calibration:
            raise BuildError("int8_static needs inputs to calibrate on, and there are none for this graph")
        converted = _converted(quantize_onnx.quantize(model, "int8_weight_only", rest))
        converted = _between_ranges(converted, _names(converted, model, computed), calibration)
    else:
        linear = [layer for layer in layers if layer.operator == "MatMul"]
        rest = [layer for layer in layers if layer not in linear]
        converted = _converted(quantize_onnx.quantize(model, "int8_weight_only", rest))
        converted = _four_bits(converted, _names(converted, model, linear))
    try:
        openvino.save_model(converted, file, compress_to_fp16=compress)
    except RuntimeError as error:
        raise BuildError(f"OpenVINO cannot write {file.name}: {error}") from error


def _converted(model: onnx.ModelProto) -> "openvino.Model":
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model.onnx"
        save(model, source)
        try:
            converted = openvino.convert_model(source)
        except Exception as error:  # the converter raises whatever it met
            raise BuildError(f"OpenVINO cannot convert the graph: {_first_line(error)}") from error
        # The weights are mapped from the file that is about to go.
        return converted.clone()


def _between_ranges(model: "openvino.Model", names: set[str], calibration: quantize_onnx.Feeds) -> "openvino.Model":
    if not names:
        return model
    import nncf

    others = _others(model, names)
    data = nncf.Dataset([{name: tensor.numpy() for name, tensor in feed.items()} for feed in calibration])
    try:
        with _silent():
            return nncf.quantize(
                model,
                data,
                subset_size=len(calibration),
                # Attention is kept from being computed in 8 bits, and activations are asymmetric.
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            )
    except Exception as error:  # the library raises whatever it met
        raise BuildError(f"int8_static: nncf.quantize failed: {_first_line(error)}") from error


def _four_bits(model: "openvino.Model", names: set[str]) -> "openvino.Model":
    if not names:
        return model
    import nncf

    try:
        with _silent():
            return nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=_INT4_GROUP,
                ratio=1.0,
                all_layers=True,
                ignored_scope=nncf.IgnoredScope(names=_others(model, names), validate=False),
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
                ),
            )
    except Exception as error:  # the library raises whatever it met
        raise BuildError(f"int4_weight_only: nncf.compress_weights failed: {_first_line(error)}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars and tables that nncf prints: standard output is the process's own to write to."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _names(model: "openvino.Model", source: onnx.ModelProto, layers: Sequence[Layer]) -> set[str]:
    """What OpenVINO calls the nodes of these layers of the ONNX graph.

    As ONNX does, but for convolutions with a bias, and nodes that make an output of the graph, called after it.
    """
    there = {operation.get_friendly_name() for operation in model.get_ops()}
    outputs = {output.name for output in source.graph.output}
    answers = {node.name: set(node.output) & outputs for node in source.graph.node}
    found: set[str] = set()
    missing = []
    for layer in layers:
        names = {layer.name, f"{layer.name}/WithoutBiases", *answers[layer.name]} & there
        if not names:
            missing.append(layer.name)
        found |= names
    if missing:
        raise BuildError(f"OpenVINO's graph has lost the names of {len(missing)} layers, such as {missing[0]}")
    return found


def _others(model: "openvino.Model", names: set[str]) -> list[str]:
    return sorted(
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name()
        in ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "Gather")
        and operation.get_friendly_name() not in names
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]
