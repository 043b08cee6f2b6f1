"""The exported graphs: their form, their names, what they compute at the ends of their axes, and what cannot be one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from services.compiler import layers
from services.compiler.export.exported import ExportedGraph, ExportError
from services.compiler.export.onnx_files import export_module, untie
from services.runtimes import torch_trocr
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware
from tests.support.compiled_trocr import FAMILIES, Compiled, beit, compiled, exported, tied, untied

CPU = Hardware("cpu", "cpu", "CPU", 0, 1)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def family(request: pytest.FixtureRequest) -> Compiled:
    return compiled(request.param)


def run(graph: ExportedGraph, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(graph.file)
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return {port.name: torch.from_numpy(value) for port, value in zip(graph.outputs, outputs, strict=True)}


def test_beit_is_exported_as_torch_computes_it(tmp_path: Path) -> None:
    made = exported(beit(tmp_path / "checkpoint"), tmp_path / "graphs")
    for graph, sizes in (
        (made.graph("encoder"), {"images": 3}),
        (made.graph("decoder"), {"rows": 3, "past": 5, "images": 2, "width": 2}),
    ):
        feeds = graph.example(sizes)
        wanted = graph.reference(feeds)
        for name, value in run(graph, feeds).items():
            torch.testing.assert_close(value, wanted[name], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("end", ["low", "between", "high"])
def test_it_computes_what_torch_computes_at_the_ends_of_every_axis(family: Compiled, end: str) -> None:
    for graph in family.made.graphs:
        highs = {axis.name: min(axis.high, 40) for axis in graph.axes}
        ends = {"low": dict.fromkeys(highs, 1), "between": {n: high // 2 for n, high in highs.items()}, "high": highs}
        sizes = ends[end]
        feeds = graph.example(sizes)
        assert {name: tuple(tensor.shape) for name, tensor in feeds.items()} == {
            port.name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in port.shape)
            for port in graph.inputs
        }
        wanted = graph.reference(feeds)
        for name, value in run(graph, feeds).items():
            torch.testing.assert_close(value, wanted[name], atol=2e-4, rtol=1e-4)


def test_what_lies_beyond_a_rows_position_is_of_no_effect(family: Compiled) -> None:
    graph = family.made.graph("decoder")
    feeds = graph.example({"rows": 5, "past": 12, "images": 2, "width": 3})
    assert len(set(feeds["positions"].tolist())) > 1
    before = run(graph, feeds)
    beyond = torch.arange(12)[None, :] >= feeds["positions"][:, None]
    for name in [name for name in feeds if name.startswith("past_")]:
        feeds[name] = feeds[name].masked_fill(beyond[:, None, :, None], 123.0)
    for name, value in run(graph, feeds).items():
        assert torch.equal(value, before[name])


def test_weights_have_the_checkpoints_names_and_values(family: Compiled) -> None:
    model = torch_trocr.load(family.folder, device="cpu", precision="float32", hardware=CPU)
    state = model.state_dict()
    found = set()
    for graph in family.made.graphs:
        for weight in onnx.load(graph.file).graph.initializer:
            if weight.name in state:
                value, wanted = numpy_helper.to_array(weight), state[weight.name].numpy()
                # The weight of a linear layer is written the way MatMul takes it.
                assert np.array_equal(value, wanted) or np.array_equal(value, wanted.T)
                found.add(weight.name)
    matrices = {name for name, tensor in state.items() if tensor.dim() == 2 and "pooler" not in name}
    shared = {"decoder.model.decoder.embed_tokens.weight", "decoder.output_projection.weight"}
    assert matrices - found <= shared
    assert found & shared


def test_linear_layers_are_named_products_with_weights_of_their_own(family: Compiled) -> None:
    graph = onnx.load(family.made.graph("decoder").file).graph
    weights = {weight.name for weight in graph.initializer}
    products = {node.name: node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights}
    for part in ("self_attn.q_proj", "encoder_attn.out_proj", "fc1", "fc2"):
        name = f"decoder.model.decoder.layers.0.{part}"
        assert products[name].input[1] == f"{name}.weight"
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_a_shared_output_layer_is_in_the_file_once_until_it_is_untied() -> None:
    file = compiled(tied).made.graph("decoder").file
    model = onnx.load(file)
    embedding = Counter(weight.name for weight in model.graph.initializer if sorted(weight.dims) == [32, 34])
    assert len(embedding) == 1
    (head,) = [node for node in model.graph.node if node.name == "decoder.output_projection"]
    assert head.op_type == "Gemm"
    apart = untie(onnx.load(file))
    onnx.checker.check_model(apart, full_check=True)
    (head,) = [node for node in apart.graph.node if node.name == "decoder.output_projection"]
    assert head.op_type == "MatMul"
    assert sum(head.input[1] in node.input for node in apart.graph.node) == 1
    feeds = {
        name: tensor.numpy()
        for name, tensor in compiled(tied)
        .made.graph("decoder")
        .example({"rows": 2, "past": 3, "images": 1, "width": 2})
        .items()
    }
    ours = onnxruntime.InferenceSession(apart.SerializeToString()).run(["logits"], feeds)[0]
    theirs = onnxruntime.InferenceSession(file).run(["logits"], feeds)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_untied_output_layer_is_a_plain_product() -> None:
    graph = onnx.load(compiled(untied).made.graph("decoder").file).graph
    assert not [node for node in graph.node if node.op_type == "Gemm"]


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "INLINE_BYTES_MOST", 1000)
    file = tmp_path / "linear.onnx"
    layer = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    rows = {"input": torch.randn(3, 64)}
    export_module(layer, rows, {"input": {0: Dim("rows", min=1, max=8)}}, file, output_names=["out"])
    assert (tmp_path / "linear.onnx.data").stat().st_size >= 64 * 32 * 4
    assert file.stat().st_size < 4000
    (out,) = onnxruntime.InferenceSession(file).run(None, {"input": rows["input"].numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer(rows["input"]).detach())


class Branching(nn.Module):
    """Decides by a number that is only known at run time."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows * 2 if rows.sum() > 0 else rows


class Unwritable(nn.Module):
    """Has an operator that ONNX has not."""

    def forward(self, rows: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvals(rows).real
        return values


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (Branching, r"layer 1 \(Branching\) cannot be traced: .*data-dependent"),
        (Unwritable, r"linalg_eig\w*.*layer 1\b"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, inner: Callable[[], nn.Module], says: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), inner())
    with pytest.raises(ExportError, match=f"(?i){says}"):
        export_module(module, {"input": torch.randn(4, 4)}, {"input": {}}, tmp_path / "x.onnx", output_names=["out"])
    assert not list(tmp_path.iterdir())


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="vision-encoder-decoder"):
        exported(tmp_path, tmp_path / "out")
