"""The parameters inside a picture's file."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image, PngImagePlugin

import inkwell
from inkwell.converters import paint
from services.diffusion import converters, domain, metadata

VALUES: dict[str, Any] = {
    "model": "brush", "prompt": "ein Käse 🧀", "negative_prompt": "", "width": 16, "height": 8, "step_count": 20,
    "guidance_scale": 2.5, "scheduler": "euler", "seed": 4294967295,
}  # fmt: skip


def png(chunks: dict[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp"])
def test_they_survive_every_format(client: inkwell.Client, tmp_path: Path, media_type: str) -> None:
    (picture,) = client.paint(VALUES["prompt"], seed=VALUES["seed"], media_type=media_type)
    path = picture.save(tmp_path / "picture")
    assert inkwell.embedded_parameters(path) == picture.parameters
    assert inkwell.embedded_parameters(picture.content).prompt == VALUES["prompt"]


def test_whole_numbers_do_for_guidance_and_keys_of_later_versions_are_ignored() -> None:
    parameters = inkwell.embedded_parameters(png({"inkwell": json.dumps(VALUES | {"guidance_scale": 3, "later": 1})}))
    assert parameters.guidance_scale == 3.0
    assert isinstance(parameters.guidance_scale, float)


def test_a_picture_of_an_earlier_version_has_the_defaults_of_what_it_did_not_know() -> None:
    parameters = inkwell.embedded_parameters(png({"inkwell": json.dumps(VALUES)}))
    assert parameters == inkwell.GenerationParameters(**VALUES)
    assert (parameters.prompt_syntax, parameters.hires, parameters.loras) == ("plain", None, ())


def test_what_the_service_embeds_is_read() -> None:
    full = domain.Parameters(
        **VALUES, prompt_syntax="weighted", prompt_template="t", negative_prompt_template="nt", styles=("ink",),
        wildcard_seed=3, image_sha256="1a", strength=0.5,
        inpaint=domain.Inpaint("2b", 4, True, 32, "noise"), outpaint=domain.Outpaint(1, 2, 3, 4),
        controls=(domain.Control("edges", "3c", "canny", 0.5, 0.25, 0.75), domain.Control("pose", "4d")),
        image_prompts=(domain.ImagePrompt("ip", "5e", 0.5),), loras=(domain.Lora("flat", -0.5),),
        hires=domain.Hires(32, 16, "latent", 9, 0.75), refiner=domain.Refiner("fine"),
        sampling=domain.Sampling("karras", "trailing", "sample", 0.0, (999, 1), (14.5, 1.0)), guidance_rescale=0.5,
        perturbed_attention=domain.PerturbedAttention(), freeu=domain.FreeU(), clip_skip=2,
        variation=domain.Variation(7, 0.5), vae=domain.Vae("sharp", True, True),
    )  # fmt: skip
    assert all(getattr(full, each.name) != each.default for each in msgspec.structs.fields(full))
    for parameters in (full, domain.Parameters(**VALUES)):
        content = metadata.encode(Image.new("RGB", (16, 8)), parameters, "image/png", 95)
        embedded = inkwell.embedded_parameters(content)
        assert_same(embedded, parameters)
        # The same over the wire.
        assert paint.parameters(converters.to_parameters(parameters)) == embedded


def assert_same(ours: Any, theirs: Any) -> None:
    """Field by field; None here where nothing was asked for there, and None there where the dataclass has no more."""
    for field in msgspec.structs.fields(theirs):
        mine, its = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(its, msgspec.Struct):
            assert mine is None if its == field.default else mine is not None, field.name
            if mine is not None:
                assert_same(mine, its)
        elif isinstance(its, tuple) and its and isinstance(its[0], msgspec.Struct):
            assert len(mine) == len(its)
            for one, other in zip(mine, its, strict=True):
                assert_same(one, other)
        else:
            assert mine == its, field.name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a PNG, JPEG or WebP"),
        (b"GIF89a", "not a PNG, JPEG or WebP"),
        (png({})[:40], "not a PNG, JPEG or WebP"),
        (png({"parameters": "Steps: 20"}), "no parameters of Inkwell"),
        (png({"inkwell": "{"}), "make no sense"),
        (png({"inkwell": "[]"}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"seed": "7"})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"seed": True})}), "make no sense"),
        (png({"inkwell": json.dumps({"seed": 7})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"loras": {"name": "a"}})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"loras": ["a"]})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"hires": {"width": "64"}})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"prompt_syntax": "sdnext"})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"variation": {"seed": 1}})}), "make no sense"),
        (png({"inkwell": json.dumps(VALUES | {"vae": {"tiled": 1}})}), "make no sense"),
        (png({"inkwell": "[" * 200_000}), "make no sense"),
    ],
)
def test_other_files_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        inkwell.embedded_parameters(content)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inkwell.embedded_parameters(tmp_path / "missing.png")


def test_importing_inkwell_loads_nothing_heavy() -> None:
    code = "import inkwell, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"PIL", "PIL.Image", "rich", "typer", "numpy", "torch", "services", "click"}
