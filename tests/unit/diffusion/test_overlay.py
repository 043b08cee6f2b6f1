"""What a picture lays over the shared modules is there in its turns, and in nobody else's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

from services.diffusion.domain import FreeU, ImagePrompt, Lora, Parameters, PerturbedAttention
from services.diffusion.engine.adapters import Held
from tests.support import tiny_adapters, tiny_diffusion
from tests.unit.diffusion.studio import Studio, call, open_studio, parameters

LORA_A = Lora("a", 0.8)
LORA_B = Lora("b", -1.5)
ORIGINAL = {"plain": parameters(), "plain, other seed": parameters(seed=8)}
ASKED: dict[str, Parameters] = {
    **ORIGINAL,
    "lora a": parameters(loras=(LORA_A,)),
    "lora a, other weight": parameters(loras=(Lora("a", 0.3),)),
    "lora b": parameters(loras=(LORA_B,)),
    "both": parameters(loras=(LORA_B, LORA_A)),
    "freeu": parameters(freeu=FreeU()),
    "freeu and lora": parameters(freeu=FreeU(s1=0.5), loras=(LORA_A,)),
    "image prompt": parameters(image_prompts=(ImagePrompt("faces", "", 0.7),)),
    "image prompt, other scale": parameters(image_prompts=(ImagePrompt("faces", "", 0.2),)),
    "image prompt and lora": parameters(image_prompts=(ImagePrompt("faces", "", 0.7),), loras=(LORA_B,)),
    "two image prompts": parameters(image_prompts=(ImagePrompt("faces", "", 0.7), ImagePrompt("styles", "", 0.4))),
    "perturbed attention": parameters(perturbed_attention=PerturbedAttention()),
    "perturbed attention, image prompt and lora": parameters(
        perturbed_attention=PerturbedAttention(), image_prompts=(ImagePrompt("styles", "", 1.0),), loras=(LORA_A,)
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.make_folder(tmp_path_factory.mktemp("overlay") / "tiny", preview=False)


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that name two LoRAs and two IP-Adapters."""
    root = tmp_path_factory.mktemp("adapters")
    encoder = str(tiny_adapters.make_image_encoder(root / "encoder"))
    return {
        "loras": {name: {"source": str(tiny_adapters.make_lora(base, root / name, i))} for i, name in enumerate("ab")},
        "image_prompt_adapters": {
            name: {"source": str(tiny_adapters.make_ip_adapter(base, root / f"{name}.safetensors", i))}
            | {"image_encoder": encoder}
            for i, name in enumerate(("faces", "styles"))
        },
    }


@pytest.fixture
def studio(base: Path, rows: dict[str, Any]) -> Studio:
    return open_studio(base, **rows)


def picture(i: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(90 * i).convert("RGB").resize((40, 24))


def begin(studio: Studio, asked: Parameters) -> Any:
    """A picture as the engine would paint it."""

    def paint(held: Held) -> torch.Tensor:
        pipeline = studio.pipeline
        more: dict[str, Any] = {}
        if asked.perturbed_attention is not None:
            pipeline = AutoPipelineForText2Image.from_pipe(pipeline, enable_pag=True)
            pipeline.set_progress_bar_config(disable=True)
            more["pag_scale"] = asked.perturbed_attention.scale
        images = [picture(i) for i in range(len(asked.image_prompts))]
        embeds = held.image_prompt_embeds(pipeline, images, guided=True)
        if embeds is not None:
            more["ip_adapter_image_embeds"] = embeds
        return call(pipeline, asked, **more)

    return studio.begin(asked, paint)


@pytest.fixture(scope="module")
def alone(base: Path, rows: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each picture painted by a model that never saw another."""
    found = {}
    for name, asked in ASKED.items():
        fresh = open_studio(base, **rows)
        (found[name],) = fresh.paint([begin(fresh, asked)])
    return found


class TestNeighbours:
    def test_every_picture_is_what_it_is_alone(self, studio: Studio, alone: dict[str, torch.Tensor]) -> None:
        painted = studio.paint([begin(studio, asked) for asked in ASKED.values()])
        for (name, expected), image in zip(alone.items(), painted, strict=True):
            assert torch.equal(image, expected), name

    def test_in_another_order_too(self, studio: Studio, alone: dict[str, torch.Tensor]) -> None:
        names = list(reversed(ASKED))
        painted = studio.paint([begin(studio, ASKED[name]) for name in names])
        for name, image in zip(names, painted, strict=True):
            assert torch.equal(image, alone[name]), name

    def test_all_these_pictures_are_different(self, alone: dict[str, torch.Tensor]) -> None:
        """Else nothing above would show anything."""
        names = list(alone)
        for i, name in enumerate(names):
            for other in names[:i]:
                assert not torch.equal(alone[name], alone[other]), (name, other)

    @pytest.mark.parametrize("name", [name for name in ASKED if name not in ORIGINAL])
    def test_a_picture_that_ends_in_the_middle_leaves_nothing(
        self, studio: Studio, alone: dict[str, torch.Tensor], name: str
    ) -> None:
        ending = begin(studio, ASKED[name])
        for _ in range(2):
            studio.turn(ending)
        ending.lane.stop()
        assert torch.equal(studio.paint([begin(studio, ASKED["plain"])])[0], alone["plain"])
        assert torch.equal(studio.paint([begin(studio, ASKED[name])])[0], alone[name])

    def test_a_model_with_everything_loaded_is_the_one_that_was_loaded(self, studio: Studio, base: Path) -> None:
        before = dict(tiny_adapters.open_pipeline(base).unet.named_modules())
        studio.paint([begin(studio, asked) for asked in ASKED.values()])
        studio.adapters.switch.to(None)
        after = dict(studio.denoiser.named_modules())
        assert {name: type(module) for name, module in after.items()} == {
            name: type(module) for name, module in before.items()
        }
        processors = {type(processor) for processor in studio.denoiser.attn_processors.values()}
        assert {processor.__name__ for processor in processors} == {"AttnProcessor2_0"}


class TestSameAsDiffusers:
    """A picture is what diffusers itself paints when the same is asked of it by hand."""

    def test_loras(self, base: Path, rows: dict[str, Any], alone: dict[str, torch.Tensor]) -> None:
        pipeline = tiny_adapters.open_pipeline(base)
        for name, row in rows["loras"].items():
            pipeline.load_lora_weights(row["source"], adapter_name=name)
        pipeline.set_adapters(["b", "a"], [LORA_B.weight, LORA_A.weight])
        assert torch.equal(call(pipeline, ASKED["both"]), alone["both"])

    def test_plain(self, base: Path, alone: dict[str, torch.Tensor]) -> None:
        assert torch.equal(call(tiny_adapters.open_pipeline(base), ASKED["plain"]), alone["plain"])

    def test_freeu(self, base: Path, alone: dict[str, torch.Tensor]) -> None:
        pipeline = tiny_adapters.open_pipeline(base)
        pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        assert torch.equal(call(pipeline, ASKED["freeu"]), alone["freeu"])

    def test_image_prompts(self, base: Path, rows: dict[str, Any], alone: dict[str, torch.Tensor]) -> None:
        pipeline = tiny_adapters.open_pipeline(base)
        files = [Path(row["source"]) for row in rows["image_prompt_adapters"].values()]
        overlay = open_studio(base, **rows).adapters.hold(ASKED["image prompt"]).overlay
        assert overlay is not None
        assert overlay.image_prompts is not None
        encoder = overlay.image_prompts.encoders[0]
        pipeline.image_encoder, pipeline.feature_extractor = encoder.model, encoder.processor
        pipeline.load_ip_adapter(
            str(files[0].parent),
            subfolder="",
            weight_name=[file.name for file in files],
            image_encoder_folder=None,
        )
        pipeline.set_ip_adapter_scale([0.7, 0.4])
        painted = call(pipeline, ASKED["two image prompts"], ip_adapter_image=[picture(0), picture(1)])
        assert torch.equal(painted, alone["two image prompts"])


class TestFreeU:
    def test_a_factor_of_nought_is_not_freeu_switched_off(self, studio: Studio, base: Path) -> None:
        pipeline = tiny_adapters.open_pipeline(base)
        pipeline.enable_freeu(s1=1e-30, s2=1e-30, b1=1.5, b2=1.6)
        asked = parameters(freeu=FreeU(s1=0, s2=0))
        assert torch.equal(studio.paint_one(asked), call(pipeline, asked))
        assert not torch.equal(studio.paint_one(asked), studio.paint_one(parameters()))
