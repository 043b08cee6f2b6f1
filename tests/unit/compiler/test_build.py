"""What each precision makes of a graph, run by plain onnxruntime and openvino with none of the project's code."""

from pathlib import Path
from typing import get_args

import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor

from services.compiler import layers, verify
from services.compiler.build import refuse_precision, write_graph
from services.compiler.domain import CompileRequest
from services.compiler.export.exported import ExportedGraph
from services.compiler.layers import BuildError
from services.runtimes.artifacts.manifest import ArtifactPrecision, Target
from tests.support import graph_to_build

SIZES = {"batch": 3, "length": 7}
# Of the float32 weights' bytes. An eighth of this network is layers too small for integers, and scales.
SHARE: dict[ArtifactPrecision, float] = {
    "float32": 1.001,
    "float16": 0.51,
    "bfloat16": 0.51,
    "int8_dynamic": 0.30,
    "int8_weight_only": 0.30,
    "int8_static": 0.30,
    "int4_weight_only": 0.25,
}


@pytest.fixture(scope="module")
def graph() -> ExportedGraph:
    return graph_to_build.exported()


def written(
    graph: ExportedGraph, folder: Path, target: Target, precision: ArtifactPrecision, kept: frozenset[str] = frozenset()
) -> Path:
    model = layers.prepare(layers.load(graph.file))
    chosen = [layer for layer in layers.find_layers(model) if layer.name not in kept]
    file = folder / ("small.onnx" if target == "onnx" else "small.xml")
    write_graph(
        model, precision, target, chosen, kept, file, [graph.example(SIZES), graph.example({**SIZES, "batch": 5})]
    )
    return file


def run(file: Path, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return {name: torch.from_numpy(array) for name, array in zip(names, session.run(None, arrays), strict=True)}
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled.create_infer_request().infer(arrays)
    return {output.get_any_name(): torch.from_numpy(results[output].copy()) for output in compiled.outputs}


def size_of(file: Path) -> int:
    return file.with_suffix(".bin").stat().st_size if file.suffix == ".xml" else layers.weight_bytes(file)


@pytest.mark.parametrize("precision", get_args(ArtifactPrecision))
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_every_precision_is_as_small_and_as_right_as_it_says(
    graph: ExportedGraph, tmp_path: Path, target: Target, precision: ArtifactPrecision
) -> None:
    if target == "onnx" and precision == "bfloat16":
        pytest.skip("ONNX Runtime has no such kernels on processors; refused, as the test below shows")
    file = written(graph, tmp_path, target, precision)
    if target == "onnx":
        onnx.checker.check_model(str(file))
    feeds = graph.example(SIZES)
    right, found = graph.reference(feeds), run(file, feeds)
    tolerance = verify.TOLERANCES[precision]
    errors = [verify.error_of(right[name], found[name], tolerance.measure) for name in right]
    assert max(errors) <= tolerance.limit
    if precision.startswith("int"):
        # It was rounded indeed.
        assert min(errors) > 1e-4
    assert size_of(file) <= SHARE[precision] * layers.weight_bytes(graph.file)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("precision", ["int8_weight_only", "int8_dynamic", "int8_static", "int4_weight_only"])
def test_layers_that_are_kept_stay_in_float(
    graph: ExportedGraph, tmp_path: Path, target: Target, precision: ArtifactPrecision
) -> None:
    every = frozenset(layer.name for layer in layers.find_layers(layers.prepare(layers.load(graph.file))))
    feeds = graph.example(SIZES)
    right = graph.reference(feeds)
    convolutions = frozenset(name for name in every if "conv" in name or "up" in name)
    assert len(convolutions) == 2

    found = run(written(graph, tmp_path, target, precision, convolutions), feeds)

    # They alone make the features; the scores come from the others.
    assert verify.error_of(right["features"], found["features"], "largest") < 1e-5
    assert verify.error_of(right["scores"], found["scores"], "largest") > 1e-4

    (tmp_path / "all").mkdir()
    found = run(written(graph, tmp_path / "all", target, precision, every), feeds)
    assert max(verify.error_of(right[name], found[name], "largest") for name in right) < 1e-5


def test_two_builds_are_the_same_bytes(graph: ExportedGraph, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (written(graph, folder, "onnx", "int8_weight_only") for folder in folders)
    assert one.read_bytes() == two.read_bytes()
    # OpenVINO numbers the nodes that it adds on through the life of a process, so that *.xml differs within one.
    one, two = (written(graph, folder, "openvino", "int8_weight_only") for folder in folders)
    assert one.with_suffix(".bin").read_bytes() == two.with_suffix(".bin").read_bytes()


@pytest.mark.parametrize("precision", [p for p in get_args(ArtifactPrecision) if p != "bfloat16"])
def test_weights_beside_the_graph_are_the_same_and_leave_with_it(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: ArtifactPrecision
) -> None:
    feeds = graph.example(SIZES)
    file = written(graph, tmp_path, "onnx", precision)
    whole, size = run(file, feeds), file.stat().st_size
    data = tmp_path / "small.onnx.data"
    assert not data.exists()

    monkeypatch.setattr(layers, "INLINE_BYTES_MOST", 1000)
    written(graph, tmp_path, "onnx", precision)
    assert data.stat().st_size > size / 2
    assert file.stat().st_size < size / 2
    onnx.checker.check_model(str(file), full_check=precision != "int4_weight_only")
    for name, value in run(file, feeds).items():
        assert torch.equal(value, whole[name])

    monkeypatch.undo()
    written(graph, tmp_path, "onnx", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_a_model_that_was_saved_has_its_weights_still(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "INLINE_BYTES_MOST", 1000)
    model = layers.load(graph.file)
    before = model.SerializeToString(deterministic=True)
    layers.save(model, tmp_path / "small.onnx")
    assert model.SerializeToString(deterministic=True) == before


def test_inputs_and_outputs_stay_in_float32(graph: ExportedGraph, tmp_path: Path) -> None:
    model = onnx.load(written(graph, tmp_path, "onnx", "float16"))
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert types == {
        "image": onnx.TensorProto.FLOAT,
        "tokens": onnx.TensorProto.INT64,
        "features": onnx.TensorProto.FLOAT,
        "scores": onnx.TensorProto.FLOAT,
    }


def test_numbers_beyond_float16_become_its_largest_and_infinities_stay() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[3] x) => (float[3] y)
        <float[3] big = {1e6, -1e6, 1.0}> { y = Add (x, big) }"""
    )
    from services.compiler.half import to_16_bits

    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(torch.tensor([1e6, -torch.inf, 1.0]).numpy(), "big")
    )
    model.graph.node[0].name = "add"
    built = to_16_bits(model, onnx.TensorProto.FLOAT16)
    assert onnx.numpy_helper.to_array(built.graph.initializer[0]).tolist() == [65504.0, float("-inf"), 1.0]


def test_angles_are_computed_in_float32() -> None:
    from services.compiler.half import to_16_bits

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[1] time) => (float[1] y)
        <float[1] rate = {0.7}> { angle = Mul (time, rate)
          y = Sin (angle) }"""
    )
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    built = to_16_bits(model, onnx.TensorProto.FLOAT16)
    session = onnxruntime.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    time = torch.tensor([997.0])
    (found,) = session.run(None, {"time": time.numpy()})
    assert torch.allclose(torch.from_numpy(found), torch.sin(time * 0.7), atol=1e-3)


def test_bfloat16_for_onnx_on_a_processor_is_refused_with_what_is_accepted() -> None:
    request = CompileRequest("m", "m", "onnx", "bfloat16", hardware="cpu")
    with pytest.raises(BuildError, match="bfloat16 for onnx: .* accepted there are float32, float16, .* for openvino"):
        refuse_precision(request)
    refuse_precision(CompileRequest("m", "m", "openvino", "bfloat16", hardware="cpu"))


def test_static_quantization_without_inputs_is_refused(graph: ExportedGraph, tmp_path: Path) -> None:
    model = layers.prepare(layers.load(graph.file))
    targets: tuple[Target, ...] = ("onnx", "openvino")
    for target in targets:
        with pytest.raises(BuildError, match="int8_static needs inputs to calibrate on"):
            write_graph(
                model,
                "int8_static",
                target,
                layers.find_layers(model),
                frozenset(),
                tmp_path / "small.xml",
            )


def test_shell_patterns_exclude_layers(graph: ExportedGraph) -> None:
    found = layers.find_layers(layers.prepare(layers.load(graph.file)))
    assert layers.excluded_by(("small/fi*", "other/*"), "small", found) == {"first"}
    assert layers.excluded_by(("small/*",), "small", found) == {layer.name for layer in found}
    assert layers.excluded_by((), "small", found) == set()
