"""What is wrong with a checkpoint is said with the file and the part, and nothing that is missing is made up."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.diffusion.engine.models import LoadedModel
from services.diffusion.settings import ModelSettings
from services.runtimes import diffusion_sources as sources
from services.runtimes.diffusion_sources import ModelError, ModelMissingError
from services.runtimes.hardware import Hardware
from tests.unit.diffusion.conftest import Families

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CPU = Hardware("cpu", "cpu", "CPU", 1 << 30, 1)
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def load(source: Path | str, **row: Any) -> LoadedModel:
    return LoadedModel("mine", ModelSettings(source=str(source), **row), CPU, torch.float32)


def refusal(source: Path | str, **row: Any) -> str:
    with pytest.raises(ModelError, match="^model mine: ") as caught:
        load(source, **row)
    return str(caught.value)


@pytest.fixture
def folder(families: Families, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(families.folder("sd15"), tmp_path / "copy"))


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_a_weight(file: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})


class TestSources:
    def test_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelMissingError, match="there is no such folder"):
            load("/no/such/folder")
        with pytest.raises(ModelMissingError, match="there is no file"):
            load(tmp_path / "gone.safetensors")

    def test_of_the_hub_are_pinned(self) -> None:
        assert "write stable-diffusion-v1-5/sd@<commit or tag>" in refusal("stable-diffusion-v1-5/sd")
        assert "write owner/name@<commit or tag>" in refusal("owner/name@")

    @pytest.mark.parametrize("ending", sources.PICKLES)
    def test_that_are_pickles_are_refused_unopened(self, tmp_path: Path, ending: str) -> None:
        file = tmp_path / f"model{ending}"
        file.write_bytes(pickle.dumps({"a": 1}))
        assert "is a pickle, which can run code when loaded; convert them to safetensors" in refusal(file)


class TestFolders:
    def test_weights_that_are_missing_are_not_made_up(self, folder: Path) -> None:
        without_a_weight(folder / UNET, "conv_in.weight")
        assert "unet: the weights in" in (said := refusal(folder))
        assert "lack conv_in.weight, which config.json asks for" in said

    def test_nor_those_of_a_text_encoder(self, folder: Path) -> None:
        key = next(key for key in load_file(folder / TEXT) if key.endswith("final_layer_norm.weight"))
        without_a_weight(folder / TEXT, key)
        assert "text_encoder: the weights in" in (said := refusal(folder))
        assert "final_layer_norm.weight" in said

    @pytest.mark.parametrize(
        ("part", "key", "weight"),
        [("unet", "in_channels", "conv_in.weight"), ("text_encoder", "hidden_size", "final_layer_norm.weight")],
    )
    def test_weights_of_another_shape(self, folder: Path, part: str, key: str, weight: str) -> None:
        edit_json(folder / part / "config.json", lambda config: config.update({key: 2 * config[key]}))
        said = refusal(folder)
        assert said.startswith(f"model mine: {part}: ")
        assert "shape" in said
        assert weight in said or "more" in said
        assert "ignore_mismatched" not in said

    @pytest.mark.parametrize("file", [UNET, TEXT, "vae/diffusion_pytorch_model.safetensors"])
    @pytest.mark.parametrize("length", [0, 5, 1000, -10])
    def test_files_that_are_not_whole(self, folder: Path, file: str, length: int) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:length])
        part, name = file.split("/")
        assert f"{part}: {name} is not a whole safetensors file" in refusal(folder)

    def test_files_that_are_something_else(self, folder: Path) -> None:
        (folder / UNET).write_bytes(b"\xff" * 5000)
        assert "unet: diffusion_pytorch_model.safetensors is not a whole safetensors file" in refusal(folder)

    def test_parts_that_are_missing(self, folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        assert f"vae: {folder / 'vae'} is missing, and model_index.json names it" in refusal(folder)

    @pytest.mark.parametrize(
        ("part", "says"), [("tokenizer", "has no vocabulary"), ("scheduler", "cannot be put together")]
    )
    def test_parts_without_weights_that_are_missing(self, folder: Path, part: str, says: str) -> None:
        for file in (folder / part).iterdir():
            file.unlink()
        assert says in refusal(folder)
        (folder / part).rmdir()
        assert f"{part}: {folder / part} is missing" in refusal(folder)

    def test_parts_that_are_empty(self, folder: Path) -> None:
        (folder / UNET).unlink()
        assert f"unet: {folder / 'unet'} has no weights" in refusal(folder)
        (folder / "unet/config.json").unlink()
        assert f"unet: {folder / 'unet'} has no config.json" in refusal(folder)

    def test_shards_that_are_missing(self, folder: Path) -> None:
        (folder / UNET).unlink()
        index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
        (folder / f"{UNET}.index.json").write_text(json.dumps(index))
        assert "unet: diffusion_pytorch_model-00001-of-00002.safetensors is missing" in refusal(folder)

    def test_classes_that_the_libraries_do_not_have(self, folder: Path) -> None:
        index = folder / "model_index.json"
        edit_json(index, lambda content: content.update(unet=["diffusers", "UNet9DModel"]))
        assert "unet: diffusers has no class UNet9DModel" in refusal(folder)
        edit_json(index, lambda content: content.update(unet=["their_code", "TheirUNet"]))
        assert "unet: its class is their_code.TheirUNet" in refusal(folder)
        edit_json(index, lambda content: content.update(unet=["diffusers"]))
        assert "unet: model_index.json should name its library and class" in refusal(folder)

    def test_pipelines_that_the_libraries_do_not_have(self, folder: Path) -> None:
        edit_json(folder / "model_index.json", lambda content: content.update(_class_name="TheirPipeline"))
        assert "cannot be put together" in refusal(folder)

    def test_with_weights_in_shards(self, families: Families, folder: Path) -> None:
        whole: Any = load(folder).denoiser
        whole.save_pretrained(folder / "unet", max_shard_size="1MB")
        (folder / UNET).unlink()
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
        sharded = load(folder)
        assert sharded.info.file_bytes > sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
        theirs = whole.state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in sharded.denoiser.state_dict().items())

    def test_with_a_variant_alone(self, families: Families, folder: Path) -> None:
        for file in folder.glob("*/*.safetensors"):
            file.rename(file.with_suffix("").with_suffix(".fp16.safetensors"))
        theirs = load(families.folder("sd15")).denoiser.state_dict()
        ours = load(folder).denoiser.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestSingleFiles:
    @pytest.fixture
    def file(self, families: Families, tmp_path: Path) -> Path:
        """A copy to spoil."""
        return Path(shutil.copy(families.file("sd15"), tmp_path / "mine.safetensors"))

    @pytest.fixture
    def config(self, families: Families, tmp_path: Path) -> Path:
        """The folder without its weights."""
        ignore = shutil.ignore_patterns("*.safetensors")
        return Path(shutil.copytree(families.folder("sd15"), tmp_path / "config", ignore=ignore))

    def test_need_no_weights_in_their_configuration(self, file: Path, config: Path) -> None:
        assert load(file, config=str(config)).info.pipeline == "StableDiffusionPipeline"

    def test_need_a_configuration(self, file: Path) -> None:
        assert "mine.safetensors is a single file and needs `config`" in refusal(file)

    def test_take_parts_that_they_do_not_hold_from_the_folder(
        self, families: Families, file: Path, config: Path
    ) -> None:
        tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("first_stage_model.")}
        save_file(tensors, file)
        assert "vae: mine.safetensors does not hold it" in refusal(file, config=str(config))
        folder = families.folder("sd15")
        own = load(file, config=str(folder)).pipeline.vae.state_dict()
        theirs = load(folder).pipeline.vae.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs)

    @pytest.mark.parametrize(
        ("prefix", "part"),
        [
            ("model.diffusion_model.middle_block.1.", "unet"),
            ("model.diffusion_model.time_embed.0.weight", "unet"),
            ("first_stage_model.decoder.mid.block_1.norm1.weight", "vae"),
            ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder"),
        ],
    )
    def test_that_lack_weights(self, file: Path, config: Path, prefix: str, part: str) -> None:
        save_file({key: tensor for key, tensor in load_file(file).items() if not key.startswith(prefix)}, file)
        assert f"{part}: mine.safetensors lacks" in refusal(file, config=str(config))

    def test_of_another_width_than_their_configuration(self, families: Families, file: Path) -> None:
        assert "mine.safetensors" in refusal(file, config=str(families.folder("sdxl")))

    def test_without_a_diffusion_model(self, file: Path, config: Path) -> None:
        save_file({"something": torch.zeros(3)}, file)
        assert "holds no diffusion model" in refusal(file, config=str(config))

    @pytest.mark.parametrize("length", [0, 7, 100_000])
    def test_that_are_not_whole(self, file: Path, config: Path, length: int) -> None:
        file.write_bytes(file.read_bytes()[:length])
        assert "mine.safetensors is not a whole safetensors file" in refusal(file, config=str(config))

    def test_configurations_that_are_none(self, file: Path, tmp_path: Path) -> None:
        assert "has no model_index.json" in refusal(file, config=str(tmp_path))
        assert "there is no such folder" in refusal(file, config="/no/such/folder")


class TestPrecision:
    def test_torchs_default_type_is_never_another(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is one for all threads, and others paint while a model is loaded."""
        seen: list[torch.dtype] = []
        monkeypatch.setattr(torch, "set_default_dtype", seen.append)
        model = LoadedModel("mine", ModelSettings(source=str(folder)), CPU, torch.bfloat16)
        assert set(seen) <= {torch.float32}
        assert {weight.dtype for weight in model.denoiser.parameters()} == {torch.bfloat16}
        assert model.info.memory_bytes == pytest.approx(2 * model.info.parameter_count, rel=0.01)

    def test_what_overflows_in_float16_stays_float32(self, families: Families) -> None:
        model = LoadedModel("mine", ModelSettings(source=str(families.folder("sd3"))), CPU, torch.float16)
        kept = {
            name.rsplit(".", 2)[-2]
            for name, weight in model.pipeline.text_encoder_3.named_parameters()
            if weight.dtype == torch.float32
        }
        assert kept == {"wo"}
