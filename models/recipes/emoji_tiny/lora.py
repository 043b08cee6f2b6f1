"""Train `emoji-tiny-fluent`, a LoRA with which `emoji-tiny` paints a bare name in the style of Fluent Emoji Flat.

``python -m models.recipes.emoji_tiny.lora --model models/emoji-tiny --work DIR`` trains low-rank additions to the UNet
and the text encoder, writes a checkpoint every few minutes and exports to ``DIR/fluent``; the same command resumes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import adapters, common, data, text

BATCH = 48
EMPTY = 0.05
UNET_RANK, TEXT_RANK = 40, 48
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
UNET_LAYERS += ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
UNET_LAYERS += [f"add_embedding.{part}" for part in ("pool.q_proj", "pool.k_proj", "pool.v_proj", "proj")]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LIMIT_BYTES = 8_000_000


def attach(pipeline: StableDiffusionPipeline) -> nn.ParameterDict:
    """Add untrained low-rank layers, which change nothing yet, and return their parameters."""
    parts = {"unet": (UNET_RANK, UNET_LAYERS), "text_encoder": (TEXT_RANK, TEXT_LAYERS)}
    found = nn.ParameterDict()
    for part, (rank, layers) in parts.items():
        module = getattr(pipeline, part)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found[f"{part}.{name}".replace(".", "/")] = parameter
    return found


@torch.no_grad()
def first_glance(base: adapters.Base, ids: Tensor) -> Tensor:
    """Latents predicted in one step from pure noise."""
    guesses = []
    generator = torch.Generator().manual_seed(1)
    for part in ids.split(128):
        x = torch.randn(len(part), 16, 8, 8, generator=generator)
        steps = torch.full((len(part),), 999)
        states, _ = text.encode(base.pipeline.text_encoder, part)
        velocity = base.pipeline.unet(x, steps, states).sample
        guesses.append(adapters.estimate(x, steps, velocity, base.signal))
    return torch.cat(guesses)


def remembered(guess: Tensor, wanted: Tensor, weights: Tensor, every: int) -> dict[str, float]:
    """Squared error of the guesses for every so many names, and the share whose own latents are the nearest of all."""
    root = weights.sqrt()
    right = torch.arange(0, len(wanted), every)
    nearest = torch.cdist((guess * root).flatten(1), (wanted * root).flatten(1)).argmin(dim=1)
    return {
        "mse": ((guess - wanted[right]).square() * weights).mean().item(),
        "top1": (nearest == right).float().mean().item(),
    }


def train(model_folder: Path, work: Path, minutes: float, muon_lr: float = 0.01, adam_lr: float = 1e-3) -> None:
    """Train for a budget of minutes; resumes from and writes `lora.pt`."""
    checkpoint = work / "lora.pt"
    torch.manual_seed(0)
    base = adapters.load(model_folder, work)
    pipeline = base.pipeline
    ids, empty = base.prompts.of("noto"), base.prompts.empty
    wanted = adapters.encode(pipeline, data.load(work).of("fluent"))
    weights = adapters.channel_weights(wanted)
    trained = attach(pipeline)
    average = common.Average(trained, 0.99)
    optimizer = common.Optimizer(trained.items(), (), muon_lr, adam_lr)
    spent = 0.0
    if state := common.restore(checkpoint):
        trained.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        average.steps, spent = state["steps"], state["spent"]
    torch.manual_seed(average.steps)
    believed = first_glance(base, ids)
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    while clock.progress < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(wanted))
        chosen, order = order[:BATCH], order[BATCH:]
        x, steps, velocity = adapters.noised(wanted[chosen], believed[chosen], base.signal)
        prompt = ids[chosen]
        blank = torch.rand(BATCH) < EMPTY
        prompt[blank] = empty
        with sdpa_kernel(SDPBackend.MATH):
            states, _ = text.encode(pipeline.text_encoder, prompt)
            predicted = pipeline.unet(x, steps, states).sample
        loss = ((predicted - velocity).square() * weights).mean()
        loss.backward()
        fresh = (steps > 300) & ~blank
        believed[chosen[fresh]] = adapters.estimate(x, steps, predicted.detach(), base.signal)[fresh]
        optimizer.step(clock.rate())
        average.update(trained)
        losses.append(loss.item())
        if time.monotonic() - saved > 90 or clock.progress >= 1:
            found = remembered(first_glance(base, ids[::5]), wanted, weights, 5)
            common.log(
                work,
                "lora",
                minutes=clock.spent / 60,
                steps=average.steps,
                loss=sum(losses) / len(losses),
                **found,
            )
            common.save(
                checkpoint,
                {
                    "model": trained.state_dict(),
                    "average": average.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "steps": average.steps,
                    "spent": clock.spent,
                },
            )
            losses, saved = [], time.monotonic()


def export(model_folder: Path, work: Path) -> Path:
    """Write the averaged weights as diffusers' `pytorch_lora_weights.safetensors`, fp16. Returns the folder."""
    state = common.restore(work / "lora.pt")
    if state is None:
        raise FileNotFoundError("train the LoRA first")
    pipeline = adapters.load(model_folder, work).pipeline
    trained = attach(pipeline)
    trained.load_state_dict(state["average"])
    # PEFT's own names throughout. The older ones that `convert_state_dict_to_diffusers` gives to some layers are not
    # read back for those by which the text enters the time embedding, which would stay uninitialized memory.
    layers = {
        part: {key: value.half() for key, value in get_peft_model_state_dict(getattr(pipeline, part)).items()}
        for part in ("unet", "text_encoder")
    }
    folder = work / "fluent"
    pipeline.save_lora_weights(folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"])
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    common.log(work, "lora-export", bytes=size)
    if size > LIMIT_BYTES:
        raise ValueError(f"the export has {size} bytes, the limit is {LIMIT_BYTES}")
    return folder


def main() -> None:
    """Read the command line, train and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the exported base model")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, checkpoints and the export")
    parser.add_argument("--minutes", type=float, default=8, help="time budget (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--export-only", action="store_true", help="export what the checkpoint holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.export_only:
        train(args.model, args.work, args.minutes)
    export(args.model, args.work)


if __name__ == "__main__":
    main()
