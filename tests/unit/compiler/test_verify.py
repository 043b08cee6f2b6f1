"""Graphs that are wrong are refused, with what is wrong of them; sizes that do not fit are left out and said."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from services.compiler import layers, quantize_onnx, verify
from services.compiler.export.exported import ExportedGraph
from services.compiler.verify import VerificationError, check_onnx, error_of, require, verify_graph
from services.runtimes.artifacts.manifest import ArtifactPrecision, Axis, Check
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import Session, SessionOptions
from services.runtimes.sessions.opening import open_session
from tests.support import graph_to_build

OPTIONS = SessionOptions(Hardware("cpu", "cpu", "CPU", 0, 1))


@pytest.fixture(scope="module")
def graph() -> ExportedGraph:
    return graph_to_build.exported()


def quiet(note: str) -> None:
    """Nobody listens."""


def sabotaged(graph: ExportedGraph, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Session:
    model = layers.load(graph.file)
    change(model)
    file = folder / "sabotaged.onnx"
    layers.save(model, file)
    return open_session(file, "onnxruntime", OPTIONS)


def change_weight(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = layers.weights_of(model)[name]
        values = onnx.numpy_helper.to_array(tensor) * factor
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), name))

    return change


def test_the_exported_graph_passes_at_every_corner(graph: ExportedGraph) -> None:
    checks, axes = verify_graph(graph, open_session(graph.file, "onnxruntime", OPTIONS), "float32", quiet)
    error, corners = checks
    assert error.name == "small: largest error of its outputs"
    assert (error.limit, error.passed, error.value < 1e-5) == (1e-3, True, True)
    assert (corners.value, corners.unit) == (4, "of 4")
    assert axes == graph.axes


def test_a_sabotaged_graph_is_refused_naming_output_value_and_limit(graph: ExportedGraph, tmp_path: Path) -> None:
    session = sabotaged(graph, tmp_path, change_weight("second.weight", 1.05))
    with pytest.raises(
        VerificationError,
        match=r"^small: largest error of scores at batch=1, length=1 is 0\.0\d+ of its size; at most 0\.001 is allowed"
        r" for float32$",
    ):
        verify_graph(graph, session, "float32", quiet)


@pytest.mark.parametrize("precision", ["int8_weight_only", "int8_dynamic", "int8_static", "int4_weight_only"])
def test_wrong_scales_are_told_from_rounding(
    graph: ExportedGraph, tmp_path: Path, precision: ArtifactPrecision
) -> None:
    model = layers.prepare(layers.load(graph.file))
    feeds = [graph.example({"batch": 3, "length": 7})]
    built = quantize_onnx.quantize(model, precision, layers.find_layers(model), feeds)
    file = tmp_path / "built.onnx"
    layers.save(built, file)
    verify_graph(graph, open_session(file, "onnxruntime", OPTIONS), precision, quiet)
    for tensor in built.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and "scale" in tensor.name:
            values = onnx.numpy_helper.to_array(tensor)
            flat = values.reshape(-1)[::-1] if values.ndim else values * 2
            tensor.CopyFrom(onnx.numpy_helper.from_array(flat.reshape(values.shape).copy() * 1.7, tensor.name))
    layers.save(built, file)
    with pytest.raises(VerificationError, match=f"root mean square error of .* is allowed for {precision}"):
        verify_graph(graph, open_session(file, "onnxruntime", OPTIONS), precision, quiet)


def test_a_graph_that_fails_at_one_corner_only_is_found(graph: ExportedGraph) -> None:
    class Wrong:
        runtime = "onnxruntime"
        inputs, outputs = graph.inputs, graph.outputs

        def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
            answer = graph.reference(feeds)
            if feeds["tokens"].shape[0] == 8:
                answer["scores"] = answer["scores"].roll(1, 0)
            return answer

        def close(self) -> None: ...

    with pytest.raises(VerificationError, match="of scores at batch=8, length=1 is"):
        verify_graph(graph, Wrong(), "float32", quiet)  # type: ignore[arg-type]


def test_sizes_beyond_memory_are_lowered_and_said(graph: ExportedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    # A convolution of 8 pictures takes some 0.2 MB; the memory that is free is pretended to be less.
    monkeypatch.setattr(verify, "free_memory", lambda device: 300_000)
    told: list[str] = []
    checks, axes = verify_graph(graph, open_session(graph.file, "onnxruntime", OPTIONS), "float32", told.append)
    batch = next(axis for axis in axes if axis.name == "batch")
    assert 1 <= batch.high < 8
    assert next(axis for axis in axes if axis.name == "length") == Axis("length", 1, 32)
    assert told[0].startswith(f"small: batch is verified up to {batch.high} of 8: more does not fit into 0.0 GB")
    assert checks[0].passed


def test_an_axis_that_the_graph_does_not_allow_is_found(graph: ExportedGraph) -> None:
    session = open_session(graph.file, "onnxruntime", OPTIONS)
    longer = dataclasses.replace(graph, example=lambda sizes: {"image": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(VerificationError, match="small does not run at batch=1, length=1: .*tokens"):
        verify_graph(dataclasses.replace(longer, reference=lambda inputs: {}), session, "float32", quiet)


def test_onnx_checker_refuses_a_broken_file(tmp_path: Path, graph: ExportedGraph) -> None:
    assert check_onnx("small", graph.file).passed
    model = layers.load(graph.file)
    model.graph.node[0].op_type = "Nonsense"
    broken = tmp_path / "broken.onnx"
    onnx.save(model, broken)
    with pytest.raises(VerificationError, match=r"small: onnx\.checker refuses broken\.onnx: .*Nonsense"):
        check_onnx("small", broken)


def test_errors_are_relative_and_never_pass_for_what_is_not_finite() -> None:
    right = torch.tensor([100.0, 1.0])
    assert error_of(right, torch.tensor([101.0, 1.0]), "largest") == pytest.approx(0.01)
    assert error_of(right, torch.tensor([101.0, 1.0]), "root mean square") == pytest.approx(1 / math.sqrt(10001))
    assert error_of(right, torch.tensor([torch.nan, 1.0]), "largest") == math.inf
    assert error_of(right, torch.tensor([100.0]), "largest") == math.inf
    masked = torch.tensor([-torch.inf, 1.0])
    assert error_of(masked, masked, "largest") == 0
    assert error_of(masked, torch.tensor([torch.inf, 1.0]), "largest") == math.inf
    assert error_of(torch.zeros(2), torch.zeros(2), "largest") == 0
    assert error_of(torch.zeros(2), torch.ones(2), "largest") == math.inf


def test_a_check_that_failed_is_named_with_value_and_limit() -> None:
    require([Check("a", 1, 2, False), Check("b", 2, 1, True)])
    with pytest.raises(VerificationError, match=r"^PSNR is 28\.4 dB; at least 30 dB is asked for$"):
        require([Check("PSNR", 28.4, 30, True, "dB")])
