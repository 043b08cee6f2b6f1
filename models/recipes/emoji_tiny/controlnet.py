"""Train `emoji-tiny-edges`, a ControlNet by which `emoji-tiny` follows given edges.

``python -m models.recipes.emoji_tiny.controlnet --model models/emoji-tiny --work DIR`` trains against the frozen base
model, writes a checkpoint every few minutes and exports to ``DIR/edges``; the same command resumes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import adapters, common, edges, text

BATCH = 48
BANK = 3000
#: drawings replaced after each batch
FRESH = 8
EMPTY = 0.1
#: share of the samples that are pure noise: what edges decide is decided there
PURE = 0.7
LIMIT_BYTES = 10_000_000


def build(unet: UNet2DConditionModel) -> ControlNetModel:
    """A copy of the UNet's way down, with a smaller middle, behind a small encoder of the 64x64 edges.

    `ControlNetModel.from_unet` would drop the number of heads with which the text enters the time embedding, and its
    middle with attention is as large as all the rest.
    """
    kept = (
        "in_channels flip_sin_to_cos freq_shift down_block_types block_out_channels layers_per_block norm_num_groups "
        "cross_attention_dim attention_head_dim addition_embed_type addition_embed_type_num_heads "
        "resnet_time_scale_shift"
    )
    model = ControlNetModel(
        **{key: unet.config[key] for key in kept.split()},
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(8, 24, 64, 192),
    )
    for part in ("conv_in", "time_embedding", "add_embedding", "down_blocks"):
        getattr(model, part).load_state_dict(getattr(unet, part).state_dict())
    model.mid_block.resnets[0].load_state_dict(unet.mid_block.resnets[0].state_dict())
    return model


@torch.no_grad()
def text_states(base: adapters.Base) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder states of all prompts, (style * names + name, 16, 192); of noto prompts that say so; of the empty one."""

    def encode(ids: Tensor) -> Tensor:
        return torch.cat([text.encode(base.pipeline.text_encoder, part)[0] for part in ids.split(256)])

    prompts = base.prompts
    spelled = prompts.tokenizer(
        [text.prompt(name, "noto") for name in prompts.names],
        padding="max_length",
        max_length=text.TOKENS,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    every = encode(torch.cat([prompts.of("noto"), prompts.of("twemoji")]))
    return every, encode(spelled), encode(prompts.empty[None])[0]


def answer(
    unet: UNet2DConditionModel, model: ControlNetModel, x: Tensor, steps: Tensor, states: Tensor, condition: Tensor
) -> Tensor:
    """The velocity the UNet predicts under control."""
    down, middle = model(x, steps, states, controlnet_cond=condition, return_dict=False)
    return unet(x, steps, states, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample


@torch.no_grad()
def followed(base: adapters.Base, model: ControlNetModel, bank: edges.Bank, every: Tensor, count: int = 64) -> float:
    """Mean edge overlap of one-step pictures of the bank's newest drawings with their conditions."""
    pipeline = base.pipeline
    places = bank.newest(count)
    x = torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = torch.full((count,), 999)
    velocity = answer(pipeline.unet, model, x, steps, every[bank.pairs[places]], edges.as_condition(bank.edges[places]))
    z = adapters.estimate(x, steps, velocity, base.signal) / pipeline.vae.config.scaling_factor
    drawn = ((pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = bank.edges[places].numpy()
    return sum(edges.overlap(edges.canny(d), w) for d, w in zip(drawn, wanted, strict=True)) / count


def train(model_folder: Path, work: Path, minutes: float, muon_lr: float = 0.02, adam_lr: float = 1e-3) -> None:
    """Train for a budget of minutes; resumes from and writes `controlnet.pt`."""
    checkpoint = work / "controlnet.pt"
    torch.manual_seed(0)
    base = adapters.load(model_folder, work)
    unet = base.pipeline.unet.to(memory_format=torch.channels_last)
    bank = edges.Bank(base.pipeline, work, base.prompts.names, BANK)
    weights = adapters.channel_weights(bank.latents)
    every, spelled, empty = text_states(base)
    model = build(unet).to(memory_format=torch.channels_last)
    average = common.Average(model, 0.995)
    optimizer = common.Optimizer(model.named_parameters(), ("conv_in",), muon_lr, adam_lr)
    spent = 0.0
    if state := common.restore(checkpoint):
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.steps, spent = state["steps"], state["spent"]
    torch.manual_seed(average.steps)
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    losses: list[float] = []
    while clock.progress < 1:
        chosen = torch.randint(len(bank), (BATCH,))
        x, steps, velocity = adapters.noised(bank.latents[chosen], bank.believed[chosen], base.signal, PURE)
        x = x.contiguous(memory_format=torch.channels_last)
        pairs = bank.pairs[chosen]
        states = every[pairs]
        said = (pairs < len(spelled)) & (torch.rand(BATCH) < 0.3)
        states[said] = spelled[pairs[said]]
        blank = torch.rand(BATCH) < EMPTY
        states[blank] = empty
        with sdpa_kernel(SDPBackend.MATH):
            predicted = answer(unet, model, x, steps, states, edges.as_condition(bank.edges[chosen]))
        loss = ((predicted - velocity).square() * weights).mean()
        loss.backward()
        fresh = (steps > 300) & ~blank
        guess = adapters.estimate(x, steps, predicted.detach(), base.signal)
        bank.believed[chosen[fresh]] = guess[fresh]
        optimizer.step(clock.rate())
        average.update(model)
        bank.refresh(FRESH)
        losses.append(loss.item())
        if time.monotonic() - saved > 120 or clock.progress >= 1:
            common.log(
                work,
                "controlnet",
                minutes=clock.spent / 60,
                steps=average.steps,
                loss=sum(losses) / len(losses),
                overlap=followed(base, average.module, bank, every),
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


def export(model_folder: Path, work: Path) -> Path:
    """Write the averaged weights as a diffusers folder, fp16. Returns the folder."""
    state = common.restore(work / "controlnet.pt")
    if state is None:
        raise FileNotFoundError("train the ControlNet first")
    model = build(adapters.load(model_folder, work).pipeline.unet)
    model.load_state_dict(state["average"])
    folder = work / "edges"
    model.half().save_pretrained(folder, safe_serialization=True)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    common.log(work, "controlnet-export", bytes=size)
    if size > LIMIT_BYTES:
        raise ValueError(f"the export has {size} bytes, the limit is {LIMIT_BYTES}")
    return folder


def main() -> None:
    """Read the command line, train and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the exported base model")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, checkpoints and the export")
    parser.add_argument("--minutes", type=float, default=29, help="time budget (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--export-only", action="store_true", help="export what the checkpoint holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.export_only:
        train(args.model, args.work, args.minutes)
    export(args.model, args.work)


if __name__ == "__main__":
    main()
