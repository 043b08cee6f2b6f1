"""Stage 4: let the VAE's decoder see what the UNet really delivers, and draw the right picture from that as well.

The UNet's latents miss the true ones by a little, always in similar ways (too smooth). Half of each batch are such
latents, half are true ones, so that plain encoding and decoding stays as good as it was.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from . import common, data, text, unet, vae

BATCH = 16
#: the noise levels of a cut-down sampling: its end, which decides the errors, is that of 20 steps
STEPS = (999, 249, 149, 99, 49)


@torch.no_grad()
def painted(work: Path, styles: list[str]) -> Tensor:
    """Latents the trained UNet makes of every prompt in a few steps, cached in `painted.pt`."""
    cache = work / "painted.pt"
    if state := common.restore(cache):
        return state["latents"]
    prompts = text.Prompts(work, styles)
    model = nn.ModuleDict({"unet": unet.build(), "text": text.build(prompts.tokenizer)}).eval()
    trained = common.restore(work / "unet.pt")
    if trained is None:
        raise FileNotFoundError("train the UNet first")
    model.load_state_dict(trained["average"])
    signal = unet.schedule().alphas_cumprod.sqrt()
    torch.manual_seed(0)
    results = []
    for ids in torch.cat([prompts.of(style) for style in styles]).split(128):
        z = torch.randn(len(ids), vae.LATENT_CHANNELS, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = text.encode(model["text"], ids)
        for step, following in zip(STEPS, (*STEPS[1:], None), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                velocity = model["unet"](z, step, states).sample.float()
            a, s = signal[step], (1 - signal[step] ** 2).sqrt()
            clean, noise = a * z - s * velocity, s * z + a * velocity
            z = clean if following is None else signal[following] * clean + (1 - signal[following] ** 2).sqrt() * noise
        results.append(z)
    latents = torch.cat(results)
    common.save(cache, {"latents": latents})
    return latents


def train(work: Path, minutes: float, styles: list[str], lr: float = 0.003) -> None:
    """Fine-tune the decoder; resumes from and writes `polish.pt`, which the export prefers over the plain VAE."""
    checkpoint = work / "polish.pt"
    torch.manual_seed(0)
    model = vae.finished(work)
    every = data.load(work).images
    true_latents, _ = vae.latents(work, list(data.STYLES))
    true_pictures = torch.from_numpy(every.reshape(-1, *every.shape[2:]))
    made_latents = painted(work, styles)
    made_pictures = torch.cat([torch.from_numpy(every[data.STYLES.index(style)]) for style in styles])
    factor = model.config["scaling_factor"]
    average = common.Average(model, 0.99)
    optimizer = common.Optimizer(model.decoder.named_parameters(), ("conv_in", "conv_out"), lr, 0.2 * lr)
    spent = 0.0
    if state := common.restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.steps, spent = state["steps"], state["spent"]

    @torch.no_grad()
    def quality(latents: Tensor, pictures: Tensor) -> float:
        drawn = torch.cat([average.module.decode(part / factor).sample for part in latents.split(64)]).clamp(-1, 1)
        error = (drawn - vae.to_tensor(pictures.numpy())).square().mean(dim=(1, 2, 3)) / 4
        return (-10 * error.log10()).mean().item()

    def report() -> None:
        scores = {"psnr_true": quality(true_latents[::30], true_pictures[::30])}
        scores["psnr_painted"] = quality(made_latents[::20], made_pictures[::20])
        common.log(work, "polish", minutes=clock.spent / 60, steps=average.steps, **scores)

    clock = common.Clock(minutes, spent)
    report()
    saved = time.monotonic()
    while clock.progress < 1:
        true = torch.randint(len(true_latents), (BATCH // 2,))
        made = torch.randint(len(made_latents), (BATCH // 2,))
        z = torch.cat([true_latents[true], made_latents[made]])
        wanted = vae.to_tensor(torch.cat([true_pictures[true], made_pictures[made]]).numpy())
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decode((z + 0.03 * torch.randn_like(z)) / factor).sample
        vae.picture_loss(drawn.float(), wanted).backward()
        optimizer.step(clock.rate(0.05))
        average.update(model)
        if time.monotonic() - saved > 90 or clock.progress >= 1:
            report()
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
