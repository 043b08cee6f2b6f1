"""Measure an exported folder the way a user meets it.

``python -m models.recipes.emoji_tiny.evaluate --model DIR --work DIR`` paints random known names with random seeds
through a plain StableDiffusionPipeline and prints, per style and as JSON, how often the right reference picture is the
nearest (or among the five nearest) of all pictures of that style, the PSNR against it, and what the autoencoder alone
reaches. ``--schedulers N`` repeats it on N names with each of the schedulers of diffusers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image, ImageDraw

from . import data, text, vae

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras sigmas": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, Karras sigmas": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ singlestep": ("DPMSolverSinglestepScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "SA-Solver": ("SASolverScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


def load(model: Path) -> StableDiffusionPipeline:
    """The pipeline in float32 on the CPU, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
) -> np.ndarray:
    """One picture per prompt and seed, float RGB in 0..1, (n, 64, 64, 3)."""
    drawn = []
    for start in range(0, len(prompts), 50):
        part = slice(start, start + 50)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        drawn.append(
            pipeline(
                prompts[part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            ).images
        )
    return np.concatenate(drawn)


def decibels(drawn: np.ndarray, wanted: np.ndarray) -> float:
    """Mean PSNR."""
    error = ((drawn - wanted) ** 2).mean(axis=(1, 2, 3))
    return float((-10 * np.log10(np.maximum(error, 1e-10))).mean())


def score(drawn: np.ndarray, references: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Right-name rates and PSNR of pictures against all references of their style."""
    mine = data.thumbnails((drawn * 255).round().astype(np.uint8))
    theirs = data.thumbnails(references)
    distance = (mine**2).sum(1)[:, None] - 2 * mine @ theirs.T + (theirs**2).sum(1)
    rank = (distance < distance[np.arange(len(right)), right][:, None]).sum(1)
    return {
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "psnr": decibels(drawn, references[right] / 255),
    }


def sheet(rows: list[np.ndarray], labels: list[str], path: Path) -> None:
    """A contact sheet: each row of pictures left to right, labels under the last row of each column."""
    columns, size = len(rows[0]), data.SIZE
    page = Image.new("RGB", (columns * (size + 6), len(rows) * (size + 2) + 26), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(Image.fromarray((picture * 255).round().astype(np.uint8)), (x * (size + 6), y * (size + 2)))
    draw = ImageDraw.Draw(page)
    for x, label in enumerate(labels):
        draw.text((x * (size + 6), len(rows) * (size + 2)), f"{label[:11]}\n{label[11:22]}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements asked for on the command line."""
    known = data.load(args.work)
    pipeline = load(args.model)
    tiny = AutoencoderTiny.from_pretrained(args.model / "preview_autoencoder", dtype=torch.float32)
    random = np.random.default_rng(args.seed)
    report: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in args.model.rglob("*") if f.is_file())}
    for style in args.styles:
        references = known.of(style)
        chosen = random.choice(len(known.names), args.count, replace=False)
        prompts = [text.prompt(known.names[i], "" if style == "noto" else style) for i in chosen]
        seeds = random.integers(0, 2**31, args.count).tolist()
        drawn = paint(pipeline, prompts, seeds, args.steps, args.guidance)
        found = score(drawn, references, chosen)
        found["vae_psnr"] = vae.reconstruction(pipeline.vae, references)[0]
        with torch.no_grad():
            scaled = pipeline.vae.encode(vae.to_tensor(references[chosen])).latent_dist.mean
            tried = tiny.decode(scaled * pipeline.vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
        found["preview_psnr"] = decibels((tried / 2 + 0.5).clip(0, 1), references[chosen] / 255)
        again = paint(pipeline, prompts[:50], [s + 1 for s in seeds[:50]], args.steps, args.guidance)
        found["psnr_between_seeds"] = decibels(again, drawn[:50])
        report[style] = found
        if args.sheets:
            wanted = references[chosen] / 255
            for page in range(2):
                part = slice(page * 20, page * 20 + 20)
                rows = [wanted[part], drawn[part], again[part], (tried[part] / 2 + 0.5).clip(0, 1)]
                sheet(rows, [known.names[i] for i in chosen[part]], args.sheets / f"{style}-{page}.png")
        for name, (kind, options) in SCHEDULERS.items() if args.schedulers else ():
            original = pipeline.scheduler
            try:
                pipeline.scheduler = getattr(diffusers, kind).from_config(original.config, **options)
                some = slice(0, args.schedulers)
                pictures = paint(pipeline, prompts[some], seeds[some], args.steps, args.guidance)
                report[style].setdefault("schedulers", {})[name] = score(pictures, references, chosen[some])
                if args.sheets:
                    rows = [references[chosen[:20]] / 255, pictures[:20]]
                    names = [known.names[i] for i in chosen[:20]]
                    sheet(rows, names, args.sheets / f"{style}-{name.replace(' ', '_').replace(',', '')}.png")
            except Exception as error:  # noqa: BLE001 - a scheduler that cannot run at all is a result as well
                report[style].setdefault("schedulers", {})[name] = f"{type(error).__name__}: {error}"
            pipeline.scheduler = original
    return report


def main() -> None:
    """Read the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported diffusers folder")
    parser.add_argument("--work", type=Path, required=True, help="training folder, for the reference pictures")
    parser.add_argument("--styles", nargs="+", default=["noto", "twemoji"], choices=data.STYLES)
    parser.add_argument("--count", type=int, default=200, help="names per style")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedulers", type=int, default=0, metavar="N", help="also try every scheduler on N names")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets: wanted, painted, another seed, preview")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(evaluate(args), indent=1))


if __name__ == "__main__":
    main()
