"""What is refused by a checkpoint's small files, before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.compiler.checkpoint import components_of, kind_of, refuse
from services.compiler.domain import CompileRequest
from services.kit.faults import Fault, Kind
from services.runtimes.artifacts.manifest import ArtifactPrecision
from tests.support import diffusion_families

TROCR = {"config.json": {"model_type": "vision-encoder-decoder"}}
CONTROLNET = {"config.json": {"_class_name": "ControlNetModel"}}


def folder_of(files: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def request(source: Path | str, **precisions: ArtifactPrecision) -> CompileRequest:
    return CompileRequest("m", str(source), "onnx", "float32", component_precisions=precisions)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sdxl", ("text_encoder", "text_encoder_2", "unet", "vae_encoder", "vae_decoder")),
        ("sd3", ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_encoder", "vae_decoder")),
        ("flux", ("text_encoder", "text_encoder_2", "transformer", "vae_encoder", "vae_decoder")),
    ],
)
def test_components_of_diffusion_models_are_told_by_their_index(
    tmp_path: Path, family: str, expected: tuple[str, ...]
) -> None:
    assert components_of(diffusion_families.MAKERS[family](tmp_path / family)) == expected


@pytest.mark.parametrize(
    ("files", "kind", "components"),
    [
        (TROCR, "trocr", ("encoder", "decoder")),
        (CONTROLNET, "diffusion", ("controlnet",)),
        ({"config.json": {"model_type": "bert"}}, None, ()),
        ({"config.json": []}, None, ()),
        ({}, None, ()),
    ],
)
def test_kinds_and_components(tmp_path: Path, files: dict[str, Any], kind: str | None, components: tuple[str]) -> None:
    folder = folder_of(files, tmp_path / "checkpoint")
    assert (kind_of(folder), components_of(folder)) == (kind, components)


def test_a_precision_of_no_component_is_refused_with_those_there_are(tmp_path: Path) -> None:
    folder = folder_of(TROCR, tmp_path / "checkpoint")
    refuse(request(folder, encoder="float16", decoder="int8_dynamic"))
    with pytest.raises(Fault) as refused:
        refuse(request(folder, encoder="float16", unet="float16", vae="float16"))
    data = refused.value.data
    assert data.kind is Kind.INVALID_ARGUMENT
    assert [field.field for field in data.fields] == ["component_precisions['unet']", "component_precisions['vae']"]
    assert "accepted: encoder, decoder" in data.message


def test_what_only_fetching_tells_is_refused_then(tmp_path: Path) -> None:
    wanted = request("owner/name@main", unet="float16")
    refuse(wanted)
    with pytest.raises(Fault, match="accepted: encoder, decoder"):
        refuse(wanted, folder_of(TROCR, tmp_path / "fetched"))


def test_a_single_file_is_refused_with_how_to_make_a_folder_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(Fault, match=r"single file.*from_single_file.*save_pretrained") as refused:
        refuse(request(file))
    assert (refused.value.data.kind, refused.value.data.reason) == (Kind.FAILED_PRECONDITION, "MODEL_UNUSABLE")
