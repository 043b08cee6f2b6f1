"""The compiler's 8-bit graphs become what TensorRT takes, and compute nearly what they computed."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from services.compiler.targets.tensorrt_int8 import to_signed
from services.compiler.targets.tensorrt_operators import check

RANDOM = np.random.default_rng(3)
INPUTS = [RANDOM.normal(size=(2, 3, 8, 8)).astype(np.float32) for _ in range(4)]


def quantized(folder: Path) -> tuple[Path, Path]:
    """A convolution with bias, a relu and a linear layer, in float and as int8_static quantizes them."""
    weights = {
        "conv": RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bias": RANDOM.normal(size=4).astype(np.float32),
        "linear": RANDOM.normal(size=(8, 5)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv", "bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "linear"], ["y"], name="linear"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    source, target = folder / "float.onnx", folder / "bytes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(source))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter({"x": value} for value in INPUTS)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
        extra_options={"WeightSymmetric": True},
    )
    return source, target


@pytest.mark.parametrize("sample", INPUTS[:2], ids=["first", "second"])
def test_signed_graphs_pass_the_check_and_stay_close(tmp_path: Path, sample: np.ndarray) -> None:
    source, unsigned = quantized(tmp_path)
    assert any("zero point must be 0" in problem.why for problem in check(unsigned).refusals)
    to_signed(unsigned, tmp_path / "signed.onnx")
    assert check(tmp_path / "signed.onnx").problems == ()
    # Unfused: processors without VNNI saturate sums of signed bytes, which says nothing of the graph.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact, before, after = (
        onnxruntime.InferenceSession(str(file), options).run(None, {"x": sample})[0]
        for file in (source, unsigned, tmp_path / "signed.onnx")
    )
    size = np.sqrt(np.square(exact).mean())
    assert np.sqrt(np.square(before - exact).mean()) < 0.02 * size
    # Ranges without negative numbers lose one of their 8 bits.
    assert np.sqrt(np.square(after - exact).mean()) < 0.03 * size


def test_biases_are_float_and_weights_signed_bytes(tmp_path: Path) -> None:
    _, unsigned = quantized(tmp_path)
    to_signed(unsigned, tmp_path / "signed.onnx")
    graph = onnx.load(str(tmp_path / "signed.onnx")).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert kinds == {TensorProto.INT8, TensorProto.FLOAT}
