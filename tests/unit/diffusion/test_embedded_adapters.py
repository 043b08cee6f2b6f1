"""The adapters that ship with emoji-tiny do what their cards say, in diffusers itself and on a few names."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image, ImageOps

ROOT = Path(__file__).parents[3]
MODELS, DRAWINGS = ROOT / "models", ROOT / "tests" / "data" / "emoji"
NAMES = ["grinning face", "red apple", "cat face", "soccer ball", "rocket", "mushroom"]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    """The base model; no test leaves an adapter on it."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODELS / "emoji-tiny", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing(style: str, name: str) -> Image.Image:
    return Image.open(DRAWINGS / f"{style}-{name.replace(' ', '-')}.png")


def edges(picture: Image.Image) -> np.ndarray:
    return cv2.Canny(np.asarray(picture.convert("L")), 100, 200) > 0


def overlap(drawn: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union, edges being met within one pixel (see the card of emoji-tiny-edges)."""
    near_drawn, near_wanted = (cv2.dilate(m.astype(np.uint8), np.ones((3, 3))) > 0 for m in (drawn, wanted))
    hits = ((drawn & near_wanted).sum() + (wanted & near_drawn).sum()) / 2
    return float(hits / (drawn.sum() + wanted.sum() - hits))


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + number) for number in range(len(NAMES))]


def paint(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """One picture per name, float RGB in 0..1, (n, 64, 64, 3)."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "np"}
    return np.asarray(pipeline(NAMES, generator=seeds(), **options).images)


def test_the_painted_emoji_follows_given_edges(base: StableDiffusionPipeline) -> None:
    conditions = []
    for name in NAMES:
        # Smaller, mirrored and in a corner: nothing that the name alone would paint.
        paper = Image.new("RGB", (64, 64), "white")
        paper.paste(ImageOps.mirror(drawing("noto", name)).resize((42, 42), Image.Resampling.LANCZOS), (2, 20))
        conditions.append(edges(paper))
    control = ControlNetModel.from_pretrained(MODELS / "emoji-tiny-edges", dtype=torch.float32)
    controlled = StableDiffusionControlNetPipeline(**base.components, controlnet=control, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    images = [Image.fromarray(condition.astype(np.uint8) * 255).convert("RGB") for condition in conditions]

    without = base(NAMES, num_inference_steps=STEPS, guidance_scale=1.0, generator=seeds()).images
    following = controlled(NAMES, image=images, num_inference_steps=STEPS, guidance_scale=1.0, generator=seeds()).images

    free = np.mean([overlap(edges(p), c) for p, c in zip(without, conditions, strict=True)])
    held = np.mean([overlap(edges(p), c) for p, c in zip(following, conditions, strict=True)])
    assert held >= 2 * free, f"{held:.2f} with control, {free:.2f} without"


def test_the_lora_paints_nearer_the_fluent_drawings(base: StableDiffusionPipeline) -> None:
    wanted = np.stack([np.asarray(drawing("fluent", name)) for name in NAMES]) / 255

    def distances(pictures: np.ndarray) -> np.ndarray:
        """Root mean square at 32x32."""
        small = (pictures - wanted).reshape(len(NAMES), 32, 2, 32, 2, 3).mean(axis=(2, 4))
        return np.asarray(np.sqrt(np.square(small).mean(axis=(1, 2, 3))))

    without = paint(base)
    base.load_lora_weights(MODELS / "emoji-tiny-fluent", adapter_name="fluent")
    try:
        full = paint(base)
        base.set_adapters("fluent", 0.5)
        half = paint(base)
        base.set_adapters("fluent", 0.0)
        off = paint(base)
    finally:
        base.unload_lora_weights()

    assert (distances(full) < distances(without)).mean() >= 0.7
    assert distances(full).mean() < distances(half).mean() < distances(without).mean()
    assert np.array_equal(off, without), "at weight 0 the adapter must not be felt"
    assert np.array_equal(paint(base), without), "an unloaded adapter must leave nothing behind"


@pytest.mark.parametrize(("folder", "limit"), [("emoji-tiny-edges", 10_000_000), ("emoji-tiny-fluent", 8_000_000)])
def test_the_adapters_stay_small(folder: str, limit: int) -> None:
    assert 100_000 < sum(file.stat().st_size for file in (MODELS / folder).rglob("*") if file.is_file()) <= limit
