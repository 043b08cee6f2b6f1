"""The checkpoint families that people serve, at reduced width: loaded by our code, painted by the engine, equal to
diffusers itself."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image

from services.diffusion.engine.main import create_engine
from services.diffusion.engine.models import LoadedModel
from services.diffusion.settings import ModelSettings, Settings
from services.runtimes.hardware import Hardware
from tests.support.diffusion_families import SIDE
from tests.unit.diffusion.conftest import Driver, Families, paint_job

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CPU = Hardware("cpu", "cpu", "CPU", 1 << 30, 1)
PAINTING = ("sd15", "sdxl", "sd3", "flux")
IN_ONE_FILE = ("sd15", "sdxl", "sd3")
GUIDANCE = {"sd15": 7.5, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5}


@pytest.fixture(scope="module")
def driver(families: Families) -> Iterator[Driver]:
    """An engine with every family, from its folder and from its single file."""
    rows = {name: ModelSettings(source=str(families.folder(name))) for name in PAINTING}
    for name in IN_ONE_FILE:
        rows[f"{name}-file"] = ModelSettings(source=str(families.file(name)), config=str(families.folder(name)))
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    engine = create_engine(Settings(models=rows, threads=1).model_dump_json())
    yield Driver(engine)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def diffusers_pipeline(families: Families, model: str) -> Any:
    """diffusers' own, from the same source: the last bit depends on where weights begin in memory, as in their file."""
    family = model.removesuffix("-file")
    pipeline = AutoPipelineForText2Image.from_pretrained(families.folder(family))
    if model != family:
        config = str(families.folder(family))
        pipeline = type(pipeline).from_single_file(str(families.file(family)), config=config, local_files_only=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # diffusers leaves a T5 out of a single file in training mode, with dropout
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("model", [*PAINTING, *(f"{name}-file" for name in IN_ONE_FILE)])
def test_a_picture_is_what_diffusers_itself_paints(driver: Driver, families: Families, model: str) -> None:
    family = model.removesuffix("-file")
    info = driver.engine.shelf.model(model).info
    job = paint_job(
        model=model,
        prompt="a red panda",
        step_count=2,
        guidance_scale=GUIDANCE[family],
        scheduler=info.default_scheduler,
        width=info.default_width,
        height=info.default_height,
        seed=5,
    )
    painted = pixels(driver.paint(job).images[0])
    expected = diffusers_pipeline(families, model)(
        prompt="a red panda",
        num_inference_steps=2,
        guidance_scale=GUIDANCE[family],
        width=info.default_width,
        height=info.default_height,
        generator=torch.Generator().manual_seed(5),
    )
    assert np.array_equal(painted, np.asarray(expected.images[0]))


def test_families_do_not_disturb_each_other(driver: Driver) -> None:
    jobs = {
        name: paint_job(model=name, width=SIDE, height=SIDE, scheduler=own_scheduler(driver, name)) for name in PAINTING
    }
    alone = {name: driver.paint(job) for name, job in jobs.items()}
    for name, job in jobs.items():
        driver.submit(name, job)
    driver.finish()
    assert {name: driver.painted(name) for name in PAINTING} == alone


def own_scheduler(driver: Driver, name: str) -> str:
    return driver.engine.shelf.model(name).info.default_scheduler


@pytest.mark.parametrize("family", [*PAINTING, "sdxl-refiner"])
def test_every_weight_is_the_checkpoints(families: Families, family: str) -> None:
    folder = families.folder(family)
    loaded = LoadedModel(family, ModelSettings(source=str(folder)), CPU, torch.float32).pipeline
    expected = DiffusionPipeline.from_pretrained(folder)
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = getattr(loaded, name).state_dict(), part.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("family", IN_ONE_FILE)
def test_a_single_file_is_the_same_model_as_the_folder_it_was_written_from(families: Families, family: str) -> None:
    row = ModelSettings(source=str(families.file(family)), config=str(families.folder(family)))
    from_file = LoadedModel("file", row, CPU, torch.float32)
    from_folder = LoadedModel("folder", ModelSettings(source=str(families.folder(family))), CPU, torch.float32)
    assert from_file.info.parameter_count == from_folder.info.parameter_count
    for name, part in from_folder.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = getattr(from_file.pipeline, name).state_dict(), part.state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


class TestWhatAModelSaysOfItself:
    def info(self, families: Families, family: str) -> Any:
        return LoadedModel(family, ModelSettings(source=str(families.folder(family))), CPU, torch.float32).info

    @pytest.mark.parametrize(
        ("name", "family", "pipeline", "scheduler", "tokens"),
        [
            ("sd15", "sd", "StableDiffusionPipeline", "pndm", 75),
            ("sdxl", "sdxl", "StableDiffusionXLPipeline", "euler", 75),
            ("sd3", "sd3", "StableDiffusion3Pipeline", "flow_euler", 255),
            ("flux", "flux", "FluxPipeline", "flow_euler", 511),
        ],
    )
    def test_family_size_and_defaults(
        self, families: Families, name: str, family: str, pipeline: str, scheduler: str, tokens: int
    ) -> None:
        info = self.info(families, name)
        assert (info.family, info.pipeline, info.default_scheduler) == (family, pipeline, scheduler)
        assert info.prompt_token_limit == tokens
        assert info.size_multiple == (8 if family in ("sd", "sdxl") else 16)
        assert 4 * info.parameter_count <= info.memory_bytes <= info.file_bytes
        folder = families.folder(name)
        assert info.file_bytes == sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))

    def test_features_are_those_that_diffusers_has_for_the_family(self, families: Families) -> None:
        features = {name: set(self.info(families, name).features) for name in (*PAINTING, "sdxl-refiner")}
        for name in PAINTING:
            assert {"text", "image", "inpaint", "outpaint", "controls", "loras", "hires"} <= features[name]
        assert {"freeu", "perturbed_attention", "clip_skip", "guidance_rescale"} <= features["sd15"] & features["sdxl"]
        assert "freeu" not in features["sd3"] | features["flux"]
        assert not {"perturbed_attention", "clip_skip", "guidance_rescale"} & features["flux"]
        assert features["sdxl-refiner"] == {"image"}

    def test_a_refiner_keeps_what_its_index_says(self, families: Families) -> None:
        row = ModelSettings(source=str(families.folder("sdxl-refiner")))
        model = LoadedModel("refiner", row, CPU, torch.float32)
        assert model.index["requires_aesthetics_score"] is True
        assert model.pipeline.config.requires_aesthetics_score is True
        assert model.info.pipeline == "StableDiffusionXLImg2ImgPipeline"
