"""Loading: what a folder must be, and what is said when it is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file

from services.diffusion.engine.models import LoadedModel, choose_dtype, needed_bytes
from services.diffusion.settings import ModelSettings
from services.runtimes import diffusion_sources as sources
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.hardware import Hardware
from tests.support import tiny_diffusion

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CPU = Hardware("cpu", "cpu", "CPU", 1 << 30, 1)


def load(source: str | Path, **row: object) -> LoadedModel:
    return LoadedModel("mine", ModelSettings(source=str(source), **row), CPU, torch.float32)


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folders["zero-snr"], tmp_path / "copy"))


def test_says_what_the_folder_holds(folders: dict[str, Path]) -> None:
    info = load(folders["zero-snr"]).info
    assert (info.pipeline, info.dtype, info.default_scheduler) == ("StableDiffusionPipeline", "float32", "ddim")
    assert (info.default_width, info.default_height, info.size_multiple) == (32, 32, 8)
    assert info.prompt_token_limit == tiny_diffusion.TOKENS_MOST - 2
    held = sum(
        tensor.numel()
        for part in ("unet", "vae", "text_encoder")
        for file in (folders["zero-snr"] / part).glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert info.parameter_count == held


def test_half_precision_files_load_as_what_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["zero-snr"])
    model.pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    loaded = load(tmp_path / "half")
    assert {weight.dtype for weight in loaded.denoiser.parameters()} == {torch.float32}


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model_index.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match="is not "):
        load(tmp_path)


def test_pickled_weights_are_refused_by_part(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"unet has only pickled weights \(diffusion_pytorch_model.bin\)"):
        load(folder)


def test_a_truncated_file_is_said_to_be_unloadable(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="model mine: unet: .* is not a whole safetensors file"):
        load(folder)


def test_custom_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["evil", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    ran = folder / "ran"
    (folder / "unet" / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(ModelError):
        load(folder)
    assert not ran.exists()


class TestPreviewAutoencoder:
    def test_is_found_inside_the_folder(self, folders: dict[str, Path]) -> None:
        assert load(folders["zero-snr"]).info.has_preview_autoencoder
        assert not load(folders["plain"]).info.has_preview_autoencoder

    def test_may_stand_elsewhere(self, folders: dict[str, Path]) -> None:
        elsewhere = str(folders["zero-snr"] / "preview_autoencoder")
        assert load(folders["plain"], preview_autoencoder=elsewhere).info.has_preview_autoencoder

    def test_elsewhere_must_exist(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="not a diffusers model folder"):
            load(folders["plain"], preview_autoencoder=str(tmp_path))

    def test_must_decode_the_models_latents(self, folders: dict[str, Path], tmp_path: Path) -> None:
        AutoencoderTiny(latent_channels=7).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="decodes 7 latent channels, the model has 4"):
            load(folders["plain"], preview_autoencoder=str(tmp_path))

    def test_must_decode_at_all(self, folders: dict[str, Path], tmp_path: Path) -> None:
        uneven = AutoencoderTiny(latent_channels=4, decoder_block_out_channels=(16, 8, 8, 8))
        uneven.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="does not decode"):
            load(folders["plain"], preview_autoencoder=str(tmp_path))


def test_dtype_follows_the_hardware() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16


class TestOtherVaes:
    @pytest.fixture
    def other(self, folders: dict[str, Path], tmp_path: Path) -> Path:
        """The model's own VAE with other weights."""
        vae = AutoencoderKL.from_pretrained(folders["plain"], subfolder="vae")
        with torch.no_grad():
            vae.decoder.conv_out.bias += 1.0
        vae.save_pretrained(tmp_path / "other")
        return tmp_path / "other"

    def test_are_loaded_by_name_once(self, folders: dict[str, Path], other: Path) -> None:
        model = load(folders["plain"], vaes={"bright": str(other)})
        assert model.info.vaes == ("bright",)
        vae = model.vae("bright")
        assert vae is model.vae("bright")
        own = model.pipeline.vae
        assert torch.equal(vae.decoder.conv_out.bias, own.decoder.conv_out.bias + 1.0)
        assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
        with pytest.raises(KeyError):
            model.vae("dark")

    def test_count_before_they_are_loaded(self, folders: dict[str, Path], other: Path) -> None:
        plain, more = ModelSettings(source=str(folders["plain"])), {"bright": str(other)}
        source = sources.find(plain.source, plain.config)
        row = ModelSettings(source=str(folders["plain"]), vaes=more)
        numbers = sum(weight.numel() for weight in AutoencoderKL.from_pretrained(other).parameters())
        difference = needed_bytes(row, source, torch.bfloat16) - needed_bytes(plain, source, torch.bfloat16)
        assert difference == 2 * numbers

    def test_that_are_not_there_stop_the_model(self, folders: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="model mine: vaes.bright: .* is not a diffusers model folder"):
            load(folders["plain"], vaes={"bright": str(tmp_path)})

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"latent_channels": 7}, "vaes.bright decodes 7 latent channels, the model has 4"),
            (
                {
                    "block_out_channels": (8, 8, 16),
                    "down_block_types": ("DownEncoderBlock2D",) * 3,
                    "up_block_types": ("UpDecoderBlock2D",) * 3,
                },
                "vaes.bright makes 4 pixels of a latent, the model's own VAE 8",
            ),
        ],
    )
    def test_must_fit_the_models_latents(
        self, folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], says: str
    ) -> None:
        config = AutoencoderKL.load_config(folders["plain"], subfolder="vae")
        AutoencoderKL.from_config({**config, **change}).save_pretrained(tmp_path / "odd")
        model = load(folders["plain"], vaes={"bright": str(tmp_path / "odd")})
        with pytest.raises(ModelError, match=says):
            model.vae("bright")


def test_what_loading_will_take_is_what_it_takes(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        row = ModelSettings(source=str(folder))
        needed = needed_bytes(row, sources.find(row.source, row.config), torch.float32)
        held = load(folder).info.memory_bytes
        assert 0.99 * held <= needed <= 1.01 * held, name  # position numbers are in no file
