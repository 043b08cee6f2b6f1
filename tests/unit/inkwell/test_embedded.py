"""The parameters inside a picture's file."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import inkwell

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
