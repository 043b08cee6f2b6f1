"""Modes and layers of a request: each wrong field is named, with what would be accepted, before any compute."""

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from services.diffusion import limits
from services.diffusion.domain import (
    Asked,
    AskedControl,
    AskedFreeU,
    AskedHires,
    AskedInpaint,
    AskedLora,
    AskedOutpaint,
    AskedPerturbedAttention,
    AskedRefiner,
    Sampling,
    Vae,
    Variation,
)
from services.diffusion.settings import AdapterSettings, ModelSettings, Settings
from services.kit.faults import Fault, Kind
from tests.unit.diffusion.test_limits import MODEL


def png(width: int = 64, height: int = 64, colour: int = 255, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour if mode == "L" else (colour,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def settings(**more: Any) -> Settings:
    return Settings(models={"small": ModelSettings(source="/models/small")}, max_side_px=500, **more)


def refusal(asked: Asked, **more: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        limits.resolve(asked, MODEL, settings(**more))
    return caught.value


def inpaint(mask: bytes = png(mode="L"), **more: Any) -> AskedInpaint:
    given: dict[str, Any] = {"blur_px": None, "inverted": False, "crop_padding_px": None, "fill": None, **more}
    return AskedInpaint(mask=mask, **given)


def hires(**given: Any) -> AskedHires:
    empty: dict[str, Any] = dict.fromkeys(("scale", "width", "height", "step_count", "strength"))
    return AskedHires(**{**empty, "upscaler": "", **given})


def control(**given: Any) -> AskedControl:
    empty: dict[str, Any] = dict.fromkeys(("scale", "start", "end"))
    return AskedControl(**{**empty, "model": "", "image": png(), "preprocessor": "", **given})


IMAGE = png()
NOBODY = AskedPerturbedAttention(None, None)

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"strength": 0.5}, "strength", "set image"),
    ({"image": IMAGE, "strength": 0.0}, "strength", "above 0 to 1"),
    ({"image": IMAGE, "strength": 1.5}, "strength", "above 0 to 1"),
    ({"image": IMAGE, "strength": 0.01}, "strength", "0.05 or more, or a step_count of 100 or more"),
    ({"inpaint": inpaint()}, "inpaint", "set image"),
    ({"image": IMAGE, "inpaint": inpaint(blur_px=65)}, "inpaint.blur_px", "0 to 64"),
    ({"image": IMAGE, "inpaint": inpaint(crop_padding_px=-1)}, "inpaint.crop_padding_px", "0 to 512"),
    ({"image": IMAGE, "inpaint": inpaint(png(32, 32, mode="L"))}, "inpaint.mask", "32x32 pixels and the image 64x64"),
    ({"image": IMAGE, "inpaint": inpaint(png(colour=0, mode="L"))}, "inpaint.mask", "nothing to repaint"),
    ({"image": b"GIF89a"}, "image.content", "accepted: PNG"),
    ({"image": IMAGE, "outpaint": AskedOutpaint(0, 0, 0, 0, None, None)}, "outpaint", "all four sides are 0"),
    ({"image": IMAGE, "outpaint": AskedOutpaint(-8, 0, 16, 0, None, None)}, "outpaint.left_px", "0 or more"),
    (
        {"image": IMAGE, "outpaint": AskedOutpaint(16, 0, 0, 0, None, "original")},
        "outpaint.fill",
        "SURROUNDINGS, NOISE or GREY",
    ),
    (
        {"image": IMAGE, "inpaint": inpaint(), "outpaint": AskedOutpaint(16, 0, 0, 0, None, None)},
        "outpaint",
        "leave inpaint out",
    ),
    ({"image": IMAGE, "width": 64, "outpaint": AskedOutpaint(64, 0, 0, 0, None, None)}, "outpaint", "leave none"),
    ({"hires": hires(scale=9.0)}, "hires.scale", "above 1 to 4"),
    ({"hires": hires(width=128)}, "hires.width, hires.height", "both or none"),
    ({"hires": hires(width=100, height=128)}, "hires.width", "multiple of 16"),
    ({"hires": hires(width=64, height=64)}, "hires", "not larger than the first pass, 64x64"),
    ({"hires": hires(scale=4.0), "width": 256, "height": 256}, "hires", "exceeds the limits"),
    ({"hires": hires(upscaler="magic")}, "hires.upscaler", "lanczos, bicubic, nearest, latent, latent_nearest"),
    ({"hires": hires(upscaler="latent", strength=0.3)}, "hires.strength", "0.5 to 1"),
    ({"image": IMAGE, "inpaint": inpaint(), "hires": hires()}, "hires", "does not go with inpaint"),
    ({"refiner": AskedRefiner("small", None)}, "refiner.model", "name another"),
    ({"refiner": AskedRefiner("", None)}, "refiner.model", "it is empty"),
    ({"refiner": AskedRefiner("other", 1.0)}, "refiner.switch_at", "between 0 and 1"),
    ({"clip_skip": 12}, "clip_skip", "0 to 11"),
    ({"variation": Variation(-1, 0.5)}, "variation.seed", "0 to"),
    ({"variation": Variation(1, 1.5)}, "variation.strength", "0 to 1"),
    ({"guidance_rescale": 0.5}, "guidance_rescale", "does not have it"),
    ({"perturbed_attention": NOBODY}, "perturbed_attention", "does not have it"),
    ({"freeu": AskedFreeU(9.0, None, None, None)}, "freeu.s1", "0 to 4"),
    ({"vae": Vae(name="other")}, "vae.name", "it has: soft"),
    ({"preview_max_side_px": 4}, "preview.max_side_px", "8 to 512"),
    ({"batch_count": 9}, "batch_count", "1 to 8"),
    ({"seed": 2**32 - 3, "image_count": 2, "batch_count": 2}, "seed", "0 to 4294967292"),
    ({"wildcard_seed": -1}, "wildcard_seed", "0 to"),
    ({"unknown_enums": ("inpaint.fill",)}, "inpaint.fill", "does not know that value"),
    ({"controls": (control(),) * 12}, "controls", "12 are more than the limit of 4"),
    ({"controls": (control(scale=3.0),)}, "controls[0].scale", "0 to 2"),
    ({"controls": (control(start=0.5, end=0.5),)}, "controls[0].end", "start must be below end"),
    ({"controls": (control(),)}, "controls[0].model", "name one of those that fit small: none"),
    ({"loras": (AskedLora("x", 5.0),)}, "loras[0].weight", "-4 to 4"),
    ({"loras": (AskedLora("x", None),) * 9}, "loras", "9 are more than the limit of 8"),
    ({"loras": (AskedLora("x", None),)}, "loras[0].name", "one of: "),
    ({"prompt": "a cat <lora:nobody:0.8>"}, "prompt", "one of: "),
    ({"prompt": "(((("}, "prompt", "never closed"),
    ({"prompt": "a cat", "guidance_scale": 1.0, "negative_prompt": "[x"}, "negative_prompt", "never closed"),
    ({"prompt": "cat AND dog", "guidance_scale": 1.0}, "prompt", "guidance_scale above 1"),
    ({"sampling": Sampling(sigmas=(0.5, 0.7))}, "sampling.sigmas", "does not take it"),
    ({"scheduler": "euler", "sampling": Sampling(sigmas=(0.5, 0.7))}, "sampling.sigmas[1]", "falling"),
]


@pytest.mark.parametrize(("fields", "field", "says"), REFUSED, ids=[f"{row[1]}-{row[2]}" for row in REFUSED])
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str, says: str) -> None:
    fault = refusal(Asked(**fields))
    assert fault.data.kind in (Kind.INVALID_ARGUMENT, Kind.NOT_FOUND)
    named = {violation.field: violation.description for violation in fault.data.fields}
    assert field in named, named
    assert says in named[field]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    fault = refusal(Asked(strength=2.0, clip_skip=99, width=7, batch_count=0))
    assert {violation.field for violation in fault.data.fields} >= {"strength", "clip_skip", "width", "batch_count"}


def test_a_feature_that_the_model_lacks_is_refused_by_name() -> None:
    bare = msgspec.structs.replace(MODEL, features=("text",))
    with pytest.raises(Fault) as caught:
        limits.resolve(Asked(image=IMAGE, variation=Variation(1, 0.5)), bare, settings())
    assert {violation.field for violation in caught.value.data.fields} == {"image", "variation"}


def test_a_refiner_of_another_family_is_refused() -> None:
    other = msgspec.structs.replace(MODEL, name="other", family="sdxl", pipeline="StableDiffusionXLPipeline")
    asked = Asked(refiner=AskedRefiner("other", None))
    with pytest.raises(Fault, match="one of the same family"):
        limits.resolve(asked, MODEL, settings(), other)
    same = msgspec.structs.replace(MODEL, name="other")
    assert limits.resolve(asked, MODEL, settings(), same).models == ("small", "other")


def test_a_picture_is_painted_at_its_own_size_as_nearly_as_the_model_can() -> None:
    parameters = limits.resolve(Asked(image=png(100, 50)), MODEL, settings()).parameters
    assert (parameters.width, parameters.height) == (96, 48)
    assert parameters.strength == 0.75


def test_outpainting_grows_the_picture_and_repaints_in_full() -> None:
    asked = Asked(image=png(64, 64), outpaint=AskedOutpaint(16, 0, 16, 32, None, None))
    parameters = limits.resolve(asked, MODEL, settings()).parameters
    assert (parameters.width, parameters.height, parameters.strength) == (96, 96, 1.0)


def test_inpainting_in_detail_paints_at_the_models_size() -> None:
    asked = Asked(image=png(300, 200), inpaint=inpaint(png(300, 200, mode="L"), crop_padding_px=8))
    parameters = limits.resolve(asked, MODEL, settings()).parameters
    assert (parameters.width, parameters.height) == (64, 64)


def test_hires_doubles_when_nothing_is_said() -> None:
    wanted = limits.resolve(Asked(hires=hires()), MODEL, settings()).parameters.hires
    assert wanted is not None
    assert (wanted.width, wanted.height, wanted.upscaler, wanted.step_count) == (128, 128, "lanczos", 20)


def test_an_alias_means_its_scheduler() -> None:
    assert limits.resolve(Asked(scheduler="EulerDiscreteScheduler"), MODEL, settings()).parameters.scheduler == "euler"
    assert limits.resolve(Asked(scheduler="DDIM"), MODEL, settings()).parameters.scheduler == "ddim"


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    file = tmp_path / "soft.safetensors"
    file.write_bytes(b"")
    return file


def test_loras_of_field_and_prompt_add_up(lora_file: Path) -> None:
    known = {"soft": AdapterSettings(source=str(lora_file))}
    asked = Asked(prompt="a cat <lora:soft:0.5>", loras=(AskedLora("soft", 0.25),))
    parameters = limits.resolve(asked, MODEL, settings(loras=known)).parameters
    assert [(lora.name, lora.weight) for lora in parameters.loras] == [("soft", 0.75)]
    assert "<lora" not in parameters.prompt


def test_a_lora_of_another_model_says_whose_it_is(lora_file: Path) -> None:
    known = {"soft": AdapterSettings(source=str(lora_file), models=["large"])}
    assert "is for large, not for small" in str(refusal(Asked(loras=(AskedLora("soft", None),)), loras=known))


def test_a_pickled_lora_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"")
    known = {"old": AdapterSettings(source=str(tmp_path / "old.ckpt"))}
    fault = refusal(Asked(loras=(AskedLora("old", None),)), loras=known)
    assert fault.data.kind is Kind.FAILED_PRECONDITION
    assert "pickled" in fault.data.message


def test_each_picture_draws_its_own_wildcards_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "animal.txt").write_text("\n".join(f"animal{i}" for i in range(50)))
    folder = {"wildcard_folder": str(tmp_path)}
    job = limits.resolve(Asked(prompt="a __animal__", seed=5, image_count=4), MODEL, settings(**folder))
    prompts = [picture.prompt for picture in job.pictures]
    assert len(set(prompts)) > 1
    third = job.pictures[2]
    assert (third.prompt_template, third.wildcard_seed) == ("a __animal__", 7)
    alone = limits.resolve(Asked(prompt="a __animal__", seed=7), MODEL, settings(**folder))
    assert alone.parameters == third
