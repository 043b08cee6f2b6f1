"""Previews: what they show, how large they are, and when they are painted."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

from services.diffusion.engine import pipelines, previews
from services.diffusion.engine.previews import COST_SHARE, PreviewBudget, Previews

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji-tiny"


def small_vae(channels: int, **options: Any) -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **options,
    ).eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(EMOJI, subfolder="vae").eval()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoencoderTiny.from_pretrained(EMOJI, subfolder="preview_autoencoder").eval()


def drawing() -> Tensor:
    """A red disc and a blue bar on white, [1, 3, 64, 64] in 0 to 1."""
    pixels = torch.ones(1, 3, 64, 64)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (rows - 24) ** 2 + (columns - 24) ** 2 < 18**2
    pixels[0, :, disc] = torch.tensor([0.9, 0.1, 0.1])[:, None]
    pixels[0, :, 48:60, 8:56] = torch.tensor([0.1, 0.2, 0.8])[:, None, None]
    return pixels


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """The latents as a denoising loop holds them."""
    with torch.no_grad():
        latents: Tensor = vae.encode(pixels * 2 - 1).latent_dist.mode()
    return (latents - float(vae.config.shift_factor or 0.0)) * float(vae.config.scaling_factor)


def opened(content: bytes) -> Tensor:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def factor_of(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@pytest.mark.parametrize("method", ["linear", "tiny_autoencoder"])
def test_a_preview_resembles_the_picture(vae: Any, tiny: Any, method: Any) -> None:
    painter = Previews(vae, tiny, factor_of(vae))
    shown = opened(painter.paint(encoded(vae, drawing()), method, max_side_px=512, quality=90))
    assert shown.shape == (1, 3, 64, 64)
    # By cells of a latent's size: finer than that the linear one knows nothing.
    coarse, wanted = (functional.avg_pool2d(pixels, factor_of(vae)) for pixels in (shown, drawing()))
    error = float((coarse - wanted).abs().mean())
    uniform = float((wanted - wanted.mean((2, 3), keepdim=True)).abs().mean())
    assert error < uniform / 2


def test_the_default_method_is_the_small_autoencoder_where_there_is_one(vae: Any, tiny: Any) -> None:
    assert Previews(vae, tiny, 8).default_method == "tiny_autoencoder"
    assert Previews(vae, None, 8).default_method == "linear"


@pytest.mark.parametrize("options", [{}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}])
@pytest.mark.parametrize("channels", [4, 16])
def test_the_linear_map_is_fitted_to_the_latents_of_the_loop(channels: int, options: dict[str, float]) -> None:
    """Latents that depend linearly on the colours are turned back into them, whatever channels, scale and shift."""
    vae = small_vae(channels, **options)
    mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(1))

    def encode(pixels: Tensor, return_dict: bool = True) -> Any:
        cells = functional.avg_pool2d(pixels, 4)
        return (torch.einsum("dc,bchw->bdhw", mix, cells),)

    vae.encode = encode
    wanted = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    latents = encode(functional.interpolate(wanted, scale_factor=4) * 2 - 1)[0]
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    image = previews.fit_linear(vae, 4).image(latents, 1, 512)
    shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    assert float((shown - wanted).abs().max()) < 0.05


def test_fitting_leaves_the_global_generator_alone() -> None:
    vae = small_vae(4)
    before = torch.get_rng_state()
    previews.fit_linear(vae, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", ["linear", "tiny_autoencoder"])
@pytest.mark.parametrize(
    ("rows", "columns", "most", "size"),
    [(8, 8, 512, (64, 64)), (8, 16, 512, (128, 64)), (16, 8, 32, (16, 32)), (8, 8, 64, (64, 64)), (1, 40, 8, (8, 1))],
)
def test_previews_have_the_pictures_size_within_the_bound(
    method: Any, rows: int, columns: int, most: int, size: tuple[int, int]
) -> None:
    painter = Previews(small_vae(4), TinyOfEight(), 8)
    shown = opened(painter.paint(torch.zeros(1, 4, rows, columns), method, max_side_px=most, quality=80))
    assert (shown.shape[3], shown.shape[2]) == size


class TinyOfEight:
    """Decodes to grey, 8 pixels a latent."""

    dtype = torch.float32
    device = torch.device("cpu")

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros(1, 3, latents.shape[2] * 8, latents.shape[3] * 8),)


@pytest.mark.parametrize("method", ["linear", "tiny_autoencoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_latents_that_are_no_numbers_make_a_preview_all_the_same(
    vae: Any, tiny: Any, method: Any, value: float
) -> None:
    latents = encoded(vae, drawing())
    latents[..., 0, 0] = value
    painter = Previews(vae, tiny, factor_of(vae))
    assert opened(painter.paint(latents, method, max_side_px=512, quality=80)).shape == (1, 3, 64, 64)


def test_packed_latents_of_flux_are_shown_in_their_places() -> None:
    vae = small_vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    pipeline = FluxPipeline(
        transformer=None,
        vae=vae,
        scheduler=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    packed = FluxPipeline._pack_latents(latents, 1, 16, 8, 12)
    assert packed.shape == (1, 24, 64)
    unpacked = pipelines.unpack(pipeline, packed, 48, 32)
    assert torch.equal(unpacked, latents)
    painter = Previews(vae, None, pipeline.vae_scale_factor)
    assert opened(painter.paint(unpacked, None, max_side_px=512, quality=80)).shape == (1, 3, 32, 48)


# --- when ---


def due_steps(budget: PreviewBudget, count: int, *, step_s: float, preview_s: float) -> list[int]:
    """The steps after which previews come, with steps and previews that take this long."""
    due, known = [], None
    for step in range(1, count + 1):
        budget.note_steps(step_s)
        if budget.due(step, known):
            budget.note_previews(preview_s)
            known = preview_s
            due.append(step)
    return due


def test_an_interval_is_kept_whatever_it_costs() -> None:
    assert due_steps(PreviewBudget(2, 7), 7, step_s=0.001, preview_s=9) == [2, 4, 6]
    assert due_steps(PreviewBudget(1, 3), 3, step_s=0.001, preview_s=9) == [1, 2]
    assert due_steps(PreviewBudget(2, 6), 6, step_s=1, preview_s=0) == [2, 4]  # after the last comes the result
    assert due_steps(PreviewBudget(0, 6), 6, step_s=1, preview_s=0) == []
    assert due_steps(PreviewBudget(9, 6), 6, step_s=1, preview_s=0) == []


def test_an_interval_is_kept_by_schedulers_that_do_two_steps_at_once() -> None:
    budget = PreviewBudget(2, 9)
    assert [step for step in (1, 3, 3, 4, 7, 9) if budget.due(step, 0.0)] == [3, 4, 7]


def test_free_previews_come_after_every_step_but_the_last() -> None:
    assert due_steps(PreviewBudget(None, 5), 5, step_s=1, preview_s=0.01) == [1, 2, 3, 4]


def test_by_itself_it_spends_a_small_share_of_the_time() -> None:
    # The first is painted to learn what it costs; then both have to be paid for.
    steps = due_steps(PreviewBudget(None, 100), 100, step_s=1, preview_s=0.29)
    assert steps[:2] == [1, 20]
    assert 0.29 * len(steps) <= COST_SHARE * 100 < 0.29 * (len(steps) + 1)
    # One that costs ten steps is never painted again.
    assert due_steps(PreviewBudget(None, 100), 100, step_s=1, preview_s=10) == [1]


@pytest.mark.parametrize("preview_s", [0.02, 0.3, 0.7, 2.0])
def test_once_the_cost_is_known_it_never_spends_more(preview_s: float) -> None:
    budget, spent = PreviewBudget(None, 200), 0.0
    for step in range(1, 200):
        budget.note_steps(1.0)
        if budget.due(step, preview_s):
            budget.note_previews(preview_s)
            spent += preview_s
        assert spent <= COST_SHARE * step + 1e-9
    affordable = min(COST_SHARE * 199, 199 * preview_s)
    assert spent > affordable - 2 * preview_s  # and uses what it has


def test_the_cost_is_learnt_from_the_clock_for_each_method(vae: Any, tiny: Any) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5  # every look at it
        return now

    painter = Previews(vae, tiny, factor_of(vae), clock=clock)
    assert painter.expected_s("linear", 64, 64) is None
    painter.paint(encoded(vae, drawing()), "linear", max_side_px=64, quality=80)
    assert painter.expected_s("linear", 64, 64) == pytest.approx(0.5)
    assert painter.expected_s("linear", 128, 64) == pytest.approx(1.0)
    assert painter.expected_s("tiny_autoencoder", 64, 64) is None
    assert painter.expected_s(None, 64, 64) is None
