"""Stage 1: the AutoencoderKL. What it cannot draw, the pipeline cannot draw either, so it gets the most care."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from . import common, data

#: channels while training, and those that ship: the KL term empties most of them, and the calibration drops the empty
WIDE_CHANNELS = 32
LATENT_CHANNELS = 16
BATCH = 16
KL_WEIGHT = 1e-4


def build(channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """64x64 pictures to 8x8 latents. Narrow at full resolution, where the time goes, and wide where it is cheap."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=data.SIZE,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 pictures (n, h, w, 3) as floats in -1..1 (n, 3, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Squared error (what PSNR counts), plus terms for edges and for flat colour.

    Squared and absolute error alone left small shapes as blobs and let hues drift (pink turned orange): differences of
    neighbouring pixels ask for edges, and the error of 4x4 averages, without any brightness, asks for the hue.
    """
    error = drawn - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    flat = F.avg_pool2d(error, 4)
    hue = flat - flat.mean(dim=1, keepdim=True)
    return 4 * error.square().mean() + 0.4 * error.abs().mean() + 0.25 * edges + 4 * hue.square().mean()


@torch.no_grad()
def reconstruction(model: AutoencoderKL, images: np.ndarray) -> tuple[float, Tensor]:
    """Mean PSNR of mean-latent reconstructions, and the reconstructions in 0..1."""
    drawn = []
    for start in range(0, len(images), 64):
        batch = to_tensor(images[start : start + 64])
        with torch.autocast("cpu", torch.bfloat16):
            drawn.append(model.decode(model.encode(batch).latent_dist.mean).sample.float())
    result = (torch.cat(drawn) / 2 + 0.5).clamp(0, 1)
    wanted = to_tensor(images) / 2 + 0.5
    per_picture = (result - wanted).square().mean(dim=(1, 2, 3))
    return float((-10 * per_picture.clamp_min(1e-10).log10()).mean()), result


def train(work: Path, minutes: float, muon_lr: float = 0.01) -> None:
    """Train on every style at once; resumes from and writes `vae.pt`."""
    checkpoint = work / "vae.pt"
    pictures = torch.from_numpy(data.load(work).images.reshape(-1, data.SIZE, data.SIZE, 3))
    probe = pictures[:: max(1, len(pictures) // 150)].numpy()
    torch.manual_seed(0)
    model = build(WIDE_CHANNELS)
    average = common.Average(model, 0.998)
    optimizer = common.Optimizer(model.named_parameters(), ("conv_in", "conv_out", "quant_conv"), muon_lr, 2e-3)
    spent = 0.0
    if state := common.restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.steps, spent = state["steps"], state["spent"]
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    torch.manual_seed(average.steps)
    while clock.progress < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(pictures))
        batch, order = to_tensor(pictures[order[:BATCH]].numpy()), order[BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            drawn = model.decode(posterior.sample().bfloat16()).sample
        loss = picture_loss(drawn.float(), batch)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        (loss + KL_WEIGHT * kl).backward()
        optimizer.step(clock.rate())
        average.update(model)
        losses.append(loss.item())
        if time.monotonic() - saved > 120 or clock.progress >= 1:
            quality, _ = reconstruction(average.module, probe)
            common.log(
                work,
                "vae",
                minutes=clock.spent / 60,
                steps=average.steps,
                loss=sum(losses) / len(losses),
                kl=kl.item(),
                psnr=quality,
            )
            common.save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "average": average.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "steps": average.steps,
                    "spent": clock.spent,
                },
            )
            losses, saved = [], time.monotonic()


@torch.no_grad()
def sensitivity(model: AutoencoderKL, means: Tensor, pictures: int = 48, draws: int = 2, size: float = 0.2) -> Tensor:
    """How much the decoded picture changes per pair of latent channels: the average of J^T J, (channels, channels).

    Each channel is nudged everywhere at once with random signs, the same signs for all channels, so that in expectation
    only the products at one place remain.
    """
    channels = means.shape[1]
    total = torch.zeros(channels, channels)
    chosen = means[torch.randperm(len(means))[:pictures]]
    for z in chosen:
        base = model.decode(z[None]).sample
        for _ in range(draws):
            signs = torch.randint(0, 2, z.shape[1:]).float() * 2 - 1
            nudged = z + size * torch.eye(channels)[:, :, None, None] * signs
            change = (model.decode(nudged).sample - base).flatten(1) / size
            total += change @ change.T / signs.numel()
    return total / (pictures * draws)


@torch.no_grad()
def calibrate(wide: AutoencoderKL, images: np.ndarray) -> tuple[AutoencoderKL, Tensor, Tensor]:
    """Re-express the latents so that few channels remain and it is known how much each of them matters.

    The later stages minimise squared error in latents. Left alone, a channel that decides the hue and one that hardly
    matters have the same variance, and the UNet wastes its memory on the second. So: principal axes in the metric of
    picture changes, the strongest kept, spreads evened out half-way (a spread of 1 to 30 is bad for diffusion). All of
    it is linear and goes into the convolutions around the latents.

    Returns the narrow autoencoder, the scaled latents, and the weight of each channel's squared error.
    """
    means, variances = [], []
    for start in range(0, len(images), 64):
        posterior = wide.encode(to_tensor(images[start : start + 64])).latent_dist
        means.append(posterior.mean)
        variances.append(posterior.var.mean(dim=(0, 2, 3)))
    latents = torch.cat(means)
    metric = sensitivity(wide, latents)
    metric += 0.002 * metric.diagonal().mean() * torch.eye(len(metric))
    values, vectors = torch.linalg.eigh(metric)
    root = vectors @ values.sqrt().diag() @ vectors.T
    centre = latents.mean(dim=(0, 2, 3))
    flat = (latents - centre[:, None, None]).transpose(0, 1).flatten(1)
    power, axes = torch.linalg.eigh(root @ (flat @ flat.T / flat.shape[1]) @ root.T)
    keep = axes.flip(1)[:, :LATENT_CHANNELS]
    spread = power.flip(0)[:LATENT_CHANNELS].sqrt()
    change = (keep / spread.sqrt()).T @ root
    back = torch.linalg.inv(root) @ (keep * spread.sqrt())
    noise = (change**2) @ torch.stack(variances).mean(dim=0)

    narrow = build(LATENT_CHANNELS).eval()
    weights = wide.state_dict()
    head = weights["encoder.conv_out.weight"]
    mean_of = weights["quant_conv.weight"][: len(metric), :, 0, 0]
    to_mean = change @ mean_of
    weights["encoder.conv_out.weight"] = torch.cat([torch.einsum("ij,jkhw->ikhw", to_mean, head)] * 2)
    bias = to_mean @ weights["encoder.conv_out.bias"] + change @ (weights["quant_conv.bias"][: len(metric)] - centre)
    weights["encoder.conv_out.bias"] = torch.cat([bias, bias])
    eye = torch.eye(LATENT_CHANNELS)[:, :, None, None]
    # The log-variance half of the encoder's answer becomes a constant: a rotation cannot carry it over exactly.
    mean_row = torch.cat([eye, 0 * eye], dim=1)
    weights["quant_conv.weight"] = torch.cat([mean_row, 0 * mean_row])
    weights["quant_conv.bias"] = torch.cat([torch.zeros(LATENT_CHANNELS), noise.log()])
    after = weights["post_quant_conv.weight"][:, :, 0, 0]
    first = weights["decoder.conv_in.weight"]
    weights["decoder.conv_in.weight"] = torch.einsum("ijhw,jk->ikhw", first, after @ back)
    # Exact except in the border pixels, whose padding lacks this constant; `refine` teaches the decoder the difference.
    constant = after @ centre + weights["post_quant_conv.bias"]
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"] + first.sum(dim=(2, 3)) @ constant
    weights["post_quant_conv.weight"] = eye
    weights["post_quant_conv.bias"] = torch.zeros(LATENT_CHANNELS)
    narrow.load_state_dict(weights)

    new = torch.einsum("ij,njhw->nihw", change, latents - centre[:, None, None])
    factor = round(1 / float(new.std()), 6)
    narrow.register_to_config(scaling_factor=factor)
    scaled = new * factor
    return narrow, scaled, spread / (spread * scaled.var(dim=(0, 2, 3))).mean()


def refine(model: AutoencoderKL, images: np.ndarray, scaled: Tensor, minutes: float, lr: float = 0.002) -> None:
    """Teach the decoder to draw the pictures from their latents as they now are, slightly disturbed."""
    pictures = torch.from_numpy(images)
    model.decoder.train().requires_grad_(True)
    noise = (model.quant_conv.bias[LATENT_CHANNELS:] / 2).exp().detach()[:, None, None]
    optimizer = common.Optimizer(model.decoder.named_parameters(), ("conv_in", "conv_out"), lr, lr)
    clock = common.Clock(minutes)
    while clock.progress < 1:
        chosen = torch.randint(len(pictures), (BATCH,))
        z = scaled[chosen] / model.config["scaling_factor"]
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decode(z + noise * torch.randn_like(z)).sample
        picture_loss(drawn.float(), to_tensor(pictures[chosen].numpy())).backward()
        optimizer.step(clock.rate())
    model.eval()


def finish(work: Path, minutes: float = 1.0) -> None:
    """Calibrate the averaged weights and cache the scaled latents of all pictures in `latents.pt`, once."""
    if (work / "latents.pt").exists():
        return
    torch.manual_seed(0)
    wide = build(WIDE_CHANNELS).eval()
    state = common.restore(work / "vae.pt")
    if state is None:
        raise FileNotFoundError("train the VAE first")
    wide.load_state_dict(state["average"])
    images = data.load(work).images
    flat = images.reshape(-1, data.SIZE, data.SIZE, 3)
    model, scaled, weights = calibrate(wide, flat)
    scores = {"psnr_wide": reconstruction(wide, flat[::20])[0], "psnr_narrow": reconstruction(model, flat[::20])[0]}
    refine(model, flat, scaled, minutes)
    for style, pictures in zip(data.STYLES, images, strict=True):
        scores[f"psnr_{style}"] = reconstruction(model, pictures[::4])[0]
    spread = scaled.std(dim=(0, 2, 3))
    common.log(
        work,
        "vae-finish",
        scaling_factor=model.config["scaling_factor"],
        spread=" ".join(f"{s:.2f}" for s in spread),
        weights=" ".join(f"{w:.2f}" for w in weights),
        **scores,
    )
    common.save(
        work / "latents.pt",
        {
            "latents": scaled.reshape(*images.shape[:2], *scaled.shape[1:]),
            "vae": model.state_dict(),
            "weights": weights,
            "scaling_factor": model.config["scaling_factor"],
        },
    )


def finished(work: Path) -> AutoencoderKL:
    """The calibrated autoencoder."""
    finish(work)
    state = common.restore(work / "latents.pt")
    assert state is not None
    model = build().eval()
    model.load_state_dict(state["vae"])
    model.register_to_config(scaling_factor=state["scaling_factor"])
    return model


def latents(work: Path, styles: list[str]) -> tuple[Tensor, Tensor]:
    """Scaled latents of all pictures of the given styles, one after another, and the weights of their channels."""
    finish(work)
    state = common.restore(work / "latents.pt")
    assert state is not None
    chosen = torch.cat([state["latents"][data.STYLES.index(style)] for style in styles])
    return chosen, state["weights"][:, None, None]
