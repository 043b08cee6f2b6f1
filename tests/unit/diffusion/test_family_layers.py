"""LoRAs and ControlNets on every family: what is laid on changes the picture, and the next is as if it never was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from services.diffusion.domain import Control, Lora, Painted, PaintJob, Pixels
from services.diffusion.engine.main import create_engine
from services.diffusion.settings import Settings
from services.kit.engine_api import Failed, Finished
from tests.unit.diffusion.conftest import Driver, Families, paint_job

SIDE = 64
FAMILIES = ("sd15", "sdxl", "sd3", "flux")
PROJECTIONS = ["to_q", "to_v"]


def lora_of(folder: Path, target: Path) -> str:
    """A random LoRA of the denoiser, as the family's pipeline saves it."""
    torch.manual_seed(1)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, part)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=PROJECTIONS))
    state = get_peft_model_state_dict(denoiser)
    layers = convert_state_dict_to_diffusers(state) if part == "unet" else state
    type(pipeline).save_lora_weights(target, **{f"{part}_lora_layers": layers})
    return str(target)


def controlnet_of(folder: Path, target: Path) -> str:
    """A ControlNet made of the denoiser, its last layers random so that it steers."""
    torch.manual_seed(2)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    if hasattr(pipeline, "unet"):
        net: Any = diffusers.ControlNetModel.from_unet(
            pipeline.unet, conditioning_channels=3, load_weights_from_unet=True
        )
    elif type(pipeline).__name__.startswith("StableDiffusion3"):
        net = diffusers.SD3ControlNetModel.from_transformer(
            pipeline.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    else:
        config = pipeline.transformer.config
        net = diffusers.FluxControlNetModel.from_transformer(
            pipeline.transformer,
            num_layers=1,
            num_single_layers=0,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
        )
    for name, weight in net.named_parameters():
        if "controlnet" in name or name.startswith("pos_embed_input"):
            weight.data = torch.randn_like(weight) * 0.2
    net.save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, families: Families) -> Iterator[Driver]:
    root = tmp_path_factory.mktemp("layers")
    folders = {name: families.folder(name) for name in FAMILIES}
    settings = Settings.model_validate(
        {
            "models": {name: {"source": str(folder)} for name, folder in folders.items()},
            "load_at_start": [],
            "loras": {
                f"{name}-lora": {"source": lora_of(folder, root / f"{name}-lora")} for name, folder in folders.items()
            },
            "controls": {
                f"{name}-net": {"source": controlnet_of(folder, root / f"{name}-net")}
                for name, folder in folders.items()
            },
            "threads": 1,
        }
    )
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield Driver(create_engine(settings.model_dump_json()))
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def paint(driver: Driver, model: str, **fields: Any) -> bytes:
    scheduler = "flow_euler" if model in ("sd3", "flux") else "ddim"
    job = paint_job(model=model, width=SIDE, height=SIDE, step_count=2, scheduler=scheduler, **fields)
    if job.parameters.controls:
        photo = Image.effect_noise((SIDE, SIDE), 80).convert("RGB")
        job = msgspec.structs.replace(job, control_images=(Pixels(SIDE, SIDE, "RGB", photo.tobytes()),))
    return finished(driver, job).images[0]


def finished(driver: Driver, job: PaintJob) -> Painted:
    driver.submit("job", job)
    while not any(isinstance(event, Finished | Failed) for event in driver.events["job"]):
        driver.step()  # the model may have to be loaded first
    return driver.painted("job")


@pytest.mark.parametrize("model", FAMILIES)
def test_a_lora(driver: Driver, model: str) -> None:
    plain = paint(driver, model)
    full, half = (paint(driver, model, loras=(Lora(f"{model}-lora", weight),)) for weight in (1.0, 0.5))
    assert len({plain, full, half}) == 3
    assert paint(driver, model) == plain


@pytest.mark.parametrize("model", FAMILIES)
def test_a_controlnet(driver: Driver, model: str) -> None:
    plain = paint(driver, model)
    steered = paint(driver, model, controls=(Control(f"{model}-net", "x"),))
    assert steered != plain
    assert paint(driver, model) == plain
