"""Every family's networks as ONNX graphs, in plain onnxruntime against the torch modules they were made of."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from services.compiler.export import diffusion
from services.compiler.export.exported import Exported, ExportedGraph, ExportError
from services.runtimes import diffusion_graphs as names
from services.runtimes.artifacts.manifest import Axis
from tests.support import compiled_diffusion, diffusion_families

# Of the largest number of an output.
TOLERANCE = 1e-4
# Each kind of network once: exporting takes seconds, and the tiny model below is a Stable Diffusion 1.
NETWORKS = {
    "sdxl": ("text_encoder_2", "unet"),
    "sd3": ("text_encoder_3", "transformer"),
    "flux": ("transformer",),
}


def export(family: str, folder: Path, only: tuple[str, ...]) -> dict[str, ExportedGraph]:
    checkpoint = diffusion_families.MAKERS[family](folder / "checkpoint")
    out = folder / "out"
    out.mkdir()
    made = diffusion.export(checkpoint, out, lambda note: None, only=only)
    return {graph.component: graph for graph in made.graphs}


def assert_right(graph: ExportedGraph) -> None:
    """At the smallest and largest sizes that are told, and at some that are neither."""
    session = onnxruntime.InferenceSession(str(graph.file), providers=["CPUExecutionProvider"])
    chosen = [axis for axis in graph.axes if not axis.follows]
    for pick in (low, high, between):
        feeds = graph.example({axis.name: pick(axis) for axis in chosen})
        assert {port.name for port in graph.inputs} == feeds.keys()
        right = graph.reference(feeds)
        found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        for port, value in zip(graph.outputs, found, strict=True):
            expected = right[port.name].numpy()
            assert value.shape == expected.shape
            assert np.abs(value - expected).max() <= TOLERANCE * np.abs(expected).max(), (graph.component, port.name)


def low(axis: Axis) -> int:
    return axis.low


def high(axis: Axis) -> int:
    return axis.high


def between(axis: Axis) -> int:
    step = 8 if axis.name.startswith("pixel") else 2
    return min(axis.low + step, axis.high)


@pytest.mark.parametrize("family", NETWORKS)
def test_every_familys_networks_are_those_of_torch(tmp_path: Path, family: str) -> None:
    graphs = export(family, tmp_path, NETWORKS[family])
    assert tuple(graphs) == NETWORKS[family]
    for graph in graphs.values():
        onnx.checker.check_model(str(graph.file), full_check=True)
        assert_right(graph)


class TestTheTinyModel:
    def made(self) -> Exported:
        return compiled_diffusion.compiled(compiled_diffusion.tiny).made

    def test_has_a_graph_a_network(self) -> None:
        made = self.made()
        assert [graph.component for graph in made.graphs] == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
        for graph in made.graphs:
            assert_right(graph)

    def test_takes_sides_that_are_no_multiple_of_what_it_shrinks_by(self) -> None:
        unet = self.made().graph("unet")
        session = onnxruntime.InferenceSession(str(unet.file), providers=["CPUExecutionProvider"])
        feeds = unet.example({"batch": 3, "tokens": 16, "height": 7, "width": 5})
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        assert np.allclose(found, unet.reference(feeds)["prediction"].numpy(), atol=1e-5)

    def test_is_the_network_that_diffusers_runs(self) -> None:
        """The written-out forward against the library's own, with residuals and without."""
        unet = self.made().graph("unet")
        own = UNet2DConditionModel.from_pretrained(compiled_diffusion.compiled(compiled_diffusion.tiny).folder / "unet")
        feeds = unet.example({"batch": 2, "tokens": 16, "height": 6, "width": 4})
        down = [feeds[port.name] for port in unet.inputs if port.name.startswith("down_residual")]
        for factor in (1.0, 0.0):
            given = {name: tensor * factor if "residual" in name else tensor for name, tensor in feeds.items()}
            residuals: Mapping[str, object] = {
                "down_block_additional_residuals": tuple(each.clone() for each in down),
                "mid_block_additional_residual": feeds[names.MID_RESIDUAL],
            }
            with torch.no_grad():
                expected = own(
                    feeds[names.SAMPLE],
                    feeds[names.TIMESTEP],
                    feeds[names.ENCODER_HIDDEN_STATES],
                    **(residuals if factor else {}),
                ).sample
            assert torch.allclose(unet.reference(given)[names.PREDICTION], expected, atol=1e-6)

    def test_brings_all_that_an_engine_needs_but_the_weights(self) -> None:
        files = {path.as_posix() for path in self.made().helper_files}
        assert {"model_index.json", "unet/config.json", "vae/config.json", "tokenizer/tokenizer.json"} <= files
        assert "scheduler/scheduler_config.json" in files
        assert "preview_autoencoder/diffusion_pytorch_model.safetensors" in files
        assert not any(name.startswith(("unet/d", "vae/d", "text_encoder/m")) for name in files)

    def test_layers_keep_the_names_of_the_checkpoint(self) -> None:
        graph = onnx.load(self.made().graph("unet").file).graph
        assert any("down_blocks.1.attentions.0" in node.name for node in graph.node)
        assert any(weight.name.endswith("conv_in.weight") for weight in graph.initializer)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="UNet2DModel cannot be exported; ControlNetModel can"):
        diffusion.export(tmp_path, tmp_path, lambda note: None)
