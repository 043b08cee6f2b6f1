"""Stage 5: an AutoencoderTiny that turns the pipeline's latents into quick previews."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from . import common, data, vae

BATCH = 32


def build() -> AutoencoderTiny:
    """A quarter of a megabyte or so; it takes the scaled latents of the denoising loop as they are, like taesd."""
    return AutoencoderTiny(
        latent_channels=vae.LATENT_CHANNELS,
        # Equal widths throughout: AutoencoderTiny has no layers that change them.
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
        scaling_factor=1.0,
    )


@torch.no_grad()
def quality(model: AutoencoderTiny, latents: Tensor, images: Tensor) -> float:
    """Mean PSNR of decoded latents."""
    drawn = torch.cat([model.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
    error = (drawn - vae.to_tensor(images.numpy())).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()


def train(work: Path, minutes: float) -> None:
    """Train decoder and encoder on cached latents of all styles; resumes from and writes `preview.pt`."""
    checkpoint = work / "preview.pt"
    torch.manual_seed(0)
    pictures = torch.from_numpy(data.load(work).images.reshape(-1, data.SIZE, data.SIZE, 3))
    latents, _ = vae.latents(work, list(data.STYLES))
    model = build()
    average = common.Average(model, 0.99)
    optimizer = common.Optimizer(model.named_parameters(), (), 0.01, 2e-3)
    spent = 0.0
    if state := common.restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.steps, spent = state["steps"], state["spent"]
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    while clock.progress < 1:
        chosen = torch.randint(len(pictures), (BATCH,))
        z, wanted = latents[chosen], vae.to_tensor(pictures[chosen].numpy())
        # Previews are asked for half-way through denoising too, so some latents are still a little noisy.
        noisy = z + 0.3 * torch.rand(BATCH, 1, 1, 1).square() * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decode(noisy).sample
            coded = model.encode(wanted[:8]).latents
        loss = vae.picture_loss(drawn.float(), wanted) + 0.2 * F.mse_loss(coded.float(), z[:8])
        loss.backward()
        optimizer.step(clock.rate())
        average.update(model)
        if time.monotonic() - saved > 90 or clock.progress >= 1:
            common.log(
                work,
                "preview",
                minutes=clock.spent / 60,
                steps=average.steps,
                loss=loss.item(),
                psnr=quality(average.module, latents[::20], pictures[::20]),
            )
            common.save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "average": average.module.state_dict(),
                    "steps": average.steps,
                    "optimizer": optimizer.state_dict(),
                    "spent": clock.spent,
                },
            )
            saved = time.monotonic()
