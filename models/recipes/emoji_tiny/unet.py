"""Stage 3: the UNet, together with the text encoder that stage 2 prepared."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import common, data, text, vae

BATCH = 96
EMPTY = 0.1


def build() -> UNet2DConditionModel:
    """9 M parameters, most of them at 4x4 where they cost least; the text also enters through the time embedding."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=vae.LATENT_CHANNELS,
        out_channels=vae.LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 200),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def schedule() -> DDIMScheduler:
    """The noise schedule, as the scheduler that ships.

    Betas end at a finite noise level (sigma 175), which every scheduler can handle; a schedule rescaled to zero
    terminal SNR cannot be used by many. They fall instead of rising: 20 steps then have their last stop at a signal of
    0.6 and only three between 0.2 and 1. A model that knows its pictures by heart needs no gradual refinement, and with
    the usual rising betas the noise it failed to remove at the many middle levels added up (20 dB in one step, 16 in
    20). Velocity prediction keeps the text-driven steps well-defined; trailing spacing starts at pure noise.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=0.02,
        beta_end=0.0005,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def noised(clean: Tensor, believed: Tensor, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw time steps and noise: the UNet's input, the steps, and the velocity it has to answer.

    Half the steps are low ones, where sampling ends and the network must tell noise from picture; some are the very
    first of sampling. Above 300 half the inputs are noise with no picture left in it, as sampling starts: otherwise the
    network reads the hue from the faint rest of the picture that training leaves there. Below 250 half the inputs hold
    what the network itself `believed` the picture to be, as they will in sampling, and not the true one: otherwise it
    learns to trust its input more than the prompt, and sampling keeps whatever noise it took for picture.
    """
    count = len(clean)
    kind = torch.rand(count)
    steps = torch.randint(1000, (count,))
    steps = torch.where(kind < 0.15, torch.randint(250, (count,)), steps)
    steps = torch.where(kind > 0.65, torch.randint(20, 130, (count,)), steps)
    steps[torch.rand(count) < 0.12] = 999
    pure = (steps == 999) | ((steps > 300) & (torch.rand(count) < 0.5))
    own = (steps < 250) & (torch.rand(count) < 0.5)
    a = signal[steps].view(-1, 1, 1, 1)
    s = (1 - a**2).sqrt()
    noise = torch.randn_like(clean)
    content = torch.where(own.view(-1, 1, 1, 1), believed, clean)
    x = torch.where(pure.view(-1, 1, 1, 1), noise, a * content + s * noise)
    return x, steps, (a * x - clean) / s


@torch.no_grad()
def first_glance(model: UNet2DConditionModel, encoder: nn.Module, ids: Tensor, signal: Tensor) -> Tensor:
    """Latents predicted in one step from pure noise: a cheap and faithful measure of what has been learned."""
    guesses = []
    a = signal[-1]
    generator = torch.Generator().manual_seed(1)
    for part in ids.split(128):
        x = torch.randn(len(part), vae.LATENT_CHANNELS, 8, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = text.encode(encoder, part)
            velocity = model(x, 999, states).sample.float()
        guesses.append(a * x - (1 - a**2).sqrt() * velocity)
    return torch.cat(guesses)


@torch.no_grad()
def sampled(model: UNet2DConditionModel, encoder: nn.Module, ids: Tensor, count: int = 20) -> Tensor:
    """Latents after full sampling with the scheduler that ships."""
    scheduler = schedule()
    scheduler.set_timesteps(count)
    z = torch.randn(len(ids), vae.LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = text.encode(encoder, ids)
    for step in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(z, step, states).sample.float()
        z = scheduler.step(velocity, step, z).prev_sample
    return z


@torch.no_grad()
def measure(guess: Tensor, wanted: Tensor, weights: Tensor, decoder: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Squared error, right-name rate (of every fifth name among all), and PSNR of some decoded pictures."""
    root = weights.sqrt()
    right = torch.arange(0, len(wanted), 5)
    nearest = torch.cdist((guess * root).flatten(1), (wanted * root).flatten(1)).argmin(dim=1)
    drawn = decoder.decode(guess[::4] / decoder.config["scaling_factor"]).sample
    error = (drawn.clamp(-1, 1) - vae.to_tensor(images[right[::4]].numpy())).square().mean(dim=(1, 2, 3)) / 4
    return {
        "mse": ((guess - wanted[right]).square() * weights).mean().item(),
        "top1": (nearest == right).float().mean().item(),
        "psnr": (-10 * error.log10()).mean().item(),
    }


def train(work: Path, minutes: float, styles: list[str], muon_lr: float = 0.012, adam_lr: float = 1e-3) -> None:
    """Train UNet and text encoder on the chosen styles; resumes from and writes `unet.pt`."""
    checkpoint = work / "unet.pt"
    torch.manual_seed(0)
    random.seed(0)
    prompts = text.Prompts(work, styles)
    latents, weights = vae.latents(work, styles)
    decoder = vae.finished(work)
    pictures = {style: torch.from_numpy(data.load(work).of(style)) for style in styles}
    signal = schedule().alphas_cumprod.sqrt()
    unet, encoder = build().to(memory_format=torch.channels_last), text.build(prompts.tokenizer)
    prepared = common.restore(work / "text.pt")
    if prepared is None:
        raise FileNotFoundError("train the text encoder first")
    encoder.load_state_dict(prepared["model"])
    model = nn.ModuleDict({"unet": unet, "text": encoder})
    average = common.Average(model, 0.997)
    optimizers = [
        common.Optimizer(unet.named_parameters(), ("conv_in", "conv_out"), muon_lr, adam_lr),
        common.Optimizer(encoder.named_parameters(), ("embedding",), 0.2 * muon_lr, 0.2 * adam_lr),
    ]
    spent = 0.0
    if state := common.restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        for optimizer, part in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        average.steps, spent = state["steps"], state["spent"]
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    losses: list[float] = []
    torch.manual_seed(average.steps)
    every_prompt = torch.cat([prompts.of(style) for style in styles])
    believed = first_glance(average.module["unet"], average.module["text"], every_prompt, signal)
    while clock.progress < 1:
        pairs = torch.randint(len(latents), (BATCH,))
        x, steps, velocity = noised(latents[pairs], believed[pairs], signal)
        ids = prompts.draw(pairs, EMPTY)
        x = x.contiguous(memory_format=torch.channels_last)
        # With 16 tokens the plain formula of attention is much faster on a CPU than the fused kernel's backward pass.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states, _ = text.encode(encoder, ids)
            answer = unet(x, steps, states).sample
        loss = ((answer.float() - velocity).square() * weights).mean()
        loss.backward()
        fresh = (steps > 300) & (ids != prompts.empty).any(dim=1)
        a = signal[steps[fresh]].view(-1, 1, 1, 1)
        believed[pairs[fresh]] = a * x[fresh] - (1 - a**2).sqrt() * answer[fresh].detach().float()
        for optimizer in optimizers:
            optimizer.step(clock.rate())
        average.update(model)
        losses.append(loss.item())
        if time.monotonic() - saved > 240 or clock.progress >= 1:
            scores: dict[str, float] = {}
            for style, wanted in zip(styles, latents.split(len(prompts.names)), strict=True):
                guess = first_glance(average.module["unet"], average.module["text"], prompts.of(style)[::5], signal)
                found = measure(guess, wanted, weights, decoder, pictures[style])
                few = prompts.of(style)[::40]
                late = sampled(average.module["unet"], average.module["text"], few) - wanted[::40]
                found["mse20"] = (late.square() * weights).mean().item()
                scores |= {f"{style}_{k}": v for k, v in found.items()}
            common.log(
                work, "unet", minutes=clock.spent / 60, steps=average.steps, loss=sum(losses) / len(losses), **scores
            )
            common.save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "average": average.module.state_dict(),
                    "steps": average.steps,
                    "optimizers": [o.state_dict() for o in optimizers],
                    "spent": clock.spent,
                    "styles": styles,
                },
            )
            losses, saved = [], time.monotonic()
