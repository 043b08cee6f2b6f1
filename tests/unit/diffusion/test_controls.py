"""ControlNets and T2I-Adapters: those that fit steer, the others are refused with what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, StableDiffusionAdapterPipeline
from PIL import Image

from services.diffusion.domain import Control
from services.diffusion.engine.adapters import Held
from services.kit.faults import Fault, FaultData, Kind
from tests.support import tiny_adapters, tiny_diffusion
from tests.unit.diffusion.studio import MODEL, Studio, call, open_studio, parameters

CONDITION = Image.linear_gradient("L").convert("RGB").resize((32, 32))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.make_folder(tmp_path_factory.mktemp("controls") / "tiny", preview=False)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("controls")
    return {
        "edges": tiny_adapters.make_controlnet(base, root / "edges", 1),
        "depth": tiny_adapters.make_controlnet(base, root / "depth", 2),
        "sketch": tiny_adapters.make_t2i_adapter(root / "sketch", 3),
    }


def studio_of(base: Path, **sources: Path) -> Studio:
    return open_studio(base, controls={name: {"source": str(source)} for name, source in sources.items()})


def refusal(base: Path, folder: Path) -> FaultData:
    studio = studio_of(base, it=folder)
    with pytest.raises(Fault) as raised:
        studio.adapters.hold(parameters(controls=(Control("it", ""),)))
    assert studio.adapters.kept == ()
    return raised.value.data


class TestSteering:
    def test_controlnets_steer_as_diffusers_has_them(self, base: Path, folders: dict[str, Path]) -> None:
        studio = studio_of(base, **folders)
        asked = parameters(controls=(Control("edges", ""), Control("depth", "")))

        def paint(held: Held) -> torch.Tensor:
            pipeline = AutoPipelineForText2Image.from_pipe(studio.pipeline, controlnet=held.controlnets)
            pipeline.set_progress_bar_config(disable=True)
            return call(pipeline, asked, image=[CONDITION] * 2)

        steered, plain = studio.paint([studio.begin(asked, paint), studio.begin(parameters())])
        by_hand = AutoPipelineForText2Image.from_pipe(
            tiny_adapters.open_pipeline(base),
            controlnet=[ControlNetModel.from_pretrained(folders[name]) for name in ("edges", "depth")],
        )
        assert torch.equal(steered, call(by_hand, asked, image=[CONDITION] * 2))
        assert torch.equal(plain, call(tiny_adapters.open_pipeline(base), parameters()))
        assert not torch.equal(steered, plain)

    def test_t2i_adapters_steer(self, base: Path, folders: dict[str, Path]) -> None:
        studio = studio_of(base, **folders)
        held = studio.adapters.hold(parameters(controls=(Control("sketch", ""),)))
        (adapter,) = held.t2i_adapters
        parts = {name: part for name, part in studio.pipeline.components.items() if name != "image_encoder"}
        pipeline = StableDiffusionAdapterPipeline(adapter=adapter, requires_safety_checker=False, **parts)
        pipeline.set_progress_bar_config(disable=True)
        steered = call(pipeline, parameters(), image=CONDITION, output_type="latent")
        assert not torch.equal(steered, call(studio.pipeline, parameters(), output_type="latent"))
        assert held.controls[0].condition_mode == "RGB"
        assert held.controlnets == []

    def test_one_is_read_once(self, base: Path, folders: dict[str, Path]) -> None:
        studio = studio_of(base, **folders)
        asked = parameters(controls=(Control("edges", ""),))
        assert studio.adapters.hold(asked).controls[0] is studio.adapters.hold(asked).controls[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"cross_attention_dim": 768}, "its cross_attention_dim is 768, this model's 32"),
            ({"block_out_channels": (16, 64)}, "its block_out_channels is [16, 64], this model's [16, 32]"),
            ({"in_channels": 16}, "it looks at 16 latent channels, this model has 4"),
            ({"conditioning_embedding_out_channels": (8, 16)}, "it shrinks the condition by 2"),
        ],
    )
    def test_a_controlnet_of_another_architecture(
        self, base: Path, tmp_path: Path, changes: dict[str, Any], says: str
    ) -> None:
        folder = tiny_adapters.make_controlnet(base, tmp_path / "it", 1, **changes)
        fault = refusal(base, folder)
        assert (fault.kind, fault.reason) == (Kind.INVALID_ARGUMENT, "CONTROL_UNFIT")
        assert fault.fields[0].field == "controls[0].model"
        assert says in fault.message
        assert MODEL in fault.message

    def test_a_t2i_adapter_whose_features_have_other_shapes(self, base: Path, tmp_path: Path) -> None:
        for channels, kind in (((16, 64), "xl"), ((16, 32), "full")):
            folder = tiny_adapters.make_t2i_adapter(tmp_path / f"{channels}{kind}", 1, channels=channels, kind=kind)
            assert "it makes features of channels x side" in refusal(base, folder).message

    def test_a_control_for_another_kind_of_model(self, base: Path, tmp_path: Path) -> None:
        folder = tiny_adapters.write_config(tmp_path / "it", _class_name="FluxControlNetModel")
        (folder / "model.safetensors").write_bytes(b"")
        assert "for models with a FluxTransformer2DModel" in refusal(base, folder).message

    def test_another_class_is_no_control(self, base: Path) -> None:
        fault = refusal(base, base / "vae")
        assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "CONTROL_UNUSABLE")
        assert "vae is a AutoencoderKL; these steer: ControlNetModel" in fault.message

    def test_truncated_weights(self, base: Path, tmp_path: Path) -> None:
        folder = tiny_adapters.make_controlnet(base, tmp_path / "it", 1)
        tiny_adapters.damage(next(folder.glob("*.safetensors")))
        fault = refusal(base, folder)
        assert fault.reason == "CONTROL_UNUSABLE"
        assert "not a whole safetensors file" in fault.message

    def test_missing_weights_are_not_made_up(self, base: Path, tmp_path: Path) -> None:
        folder = tiny_adapters.make_controlnet(base, tmp_path / "it", 1)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_class_embeds": 4}))
        assert "lacks weights: class_embedding" in refusal(base, folder).message

    def test_pickled_weights(self, base: Path, tmp_path: Path) -> None:
        folder = tiny_adapters.write_config(tmp_path / "it", _class_name="ControlNetModel")
        torch.save({}, folder / "diffusion_pytorch_model.bin")
        assert "only pickled weights (diffusion_pytorch_model.bin), which can run code" in refusal(base, folder).message
