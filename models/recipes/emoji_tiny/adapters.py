"""What the two adapters' recipes share: the base model as it ships, its latents and its time steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from . import evaluate, text, unet, vae

#: every twentieth name, from this one, is left out of the ControlNet's training, to see what it makes of others
HELD_OUT_EVERY, HELD_OUT_FIRST = 20, 7


@dataclass(frozen=True)
class Base:
    """The frozen base model, every prompt it knows, and the share of picture in its latents at each time step."""

    pipeline: StableDiffusionPipeline
    prompts: text.Prompts
    signal: Tensor


def load(model: Path, work: Path) -> Base:
    """The exported base model in float32, with nothing left to train."""
    pipeline = evaluate.load(model)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False).eval()
    prompts = text.Prompts(work, ["noto", "twemoji"], pipeline.tokenizer)
    return Base(pipeline, prompts, pipeline.scheduler.alphas_cumprod.sqrt())


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, images: np.ndarray) -> Tensor:
    """Scaled latents (n, 16, 8, 8) of uint8 RGB pictures (n, 64, 64, 3)."""
    parts = [
        pipeline.vae.encode(vae.to_tensor(images[start : start + 64])).latent_dist.mean
        for start in range(0, len(images), 64)
    ]
    return torch.cat(parts) * pipeline.vae.config.scaling_factor


def channel_weights(latents: Tensor) -> Tensor:
    """How much each channel's squared error counts, (16, 1, 1).

    The base model's calibration evened out the spreads of the channels half-way, so what is left of a channel's spread
    tells how much it matters in the picture: its variance, scaled as the base model's own weights are.
    """
    spread = latents.var(dim=(0, 2, 3))
    return (spread / spread.square().mean())[:, None, None]


def noised(clean: Tensor, believed: Tensor, signal: Tensor, pure: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """As `unet.noised` does for the base model, but a share of `pure` is pure noise, where the picture is decided.

    The base model knows already how to clean up the last steps; new are only the pictures.
    """
    x, steps, velocity = unet.noised(clean, believed, signal)
    first = torch.rand(len(clean)) < pure
    noise = torch.randn_like(clean)
    a = signal[999]
    x = torch.where(first.view(-1, 1, 1, 1), noise, x)
    velocity = torch.where(first.view(-1, 1, 1, 1), (a * noise - clean) / (1 - a**2).sqrt(), velocity)
    return x, torch.where(first, 999, steps), velocity


def estimate(x: Tensor, steps: Tensor, velocity: Tensor, signal: Tensor) -> Tensor:
    """The clean latents that a predicted velocity stands for."""
    a = signal[steps].view(-1, 1, 1, 1)
    return a * x - (1 - a**2).sqrt() * velocity


def held_out(names: int) -> np.ndarray:
    """Numbers of the names that the ControlNet is not trained on."""
    return np.arange(HELD_OUT_FIRST, names, HELD_OUT_EVERY)
