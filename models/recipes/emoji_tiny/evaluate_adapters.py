"""Measure the two adapters the way a user meets them.

``python -m models.recipes.emoji_tiny.evaluate_adapters --model DIR --edges DIR --fluent DIR --work DIR`` prints JSON:

* for the ControlNet, how well the edges of the painted picture overlap the given ones (`edges.overlap`), with and
  without control from the same seeds, for drawings that were moved, for names it was not trained on, and for drawings
  of another style than the prompt's;
* for the LoRA, for how many names the picture is nearer Fluent's drawing (32x32 RGB on white, L2) than the same seed's
  picture without it, the right-name rate among all Fluent drawings, and PSNR.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from . import adapters, data, edges, evaluate, text, vae


def as_bytes(pictures: np.ndarray) -> np.ndarray:
    """Floats in 0..1 as uint8."""
    return (pictures * 255).round().astype(np.uint8)


def with_control(
    pipeline: StableDiffusionPipeline,
    model: ControlNetModel,
    prompts: list[str],
    conditions: np.ndarray,
    seeds: list[int],
    steps: int,
    guidance: float = 1.0,
) -> np.ndarray:
    """One picture per prompt, edge map and seed, float RGB in 0..1, (n, 64, 64, 3)."""
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=model, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, len(prompts), 50):
        part = slice(start, start + 50)
        images = [Image.fromarray(np.repeat(c[..., None], 3, 2).astype(np.uint8) * 255) for c in conditions[part]]
        drawn.append(
            controlled(
                prompts[part],
                image=images,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="np",
            ).images
        )
    return np.concatenate(drawn)


def cases(
    work: Path, names: list[str], kind: str, count: int, random: np.random.Generator
) -> tuple[list[str], np.ndarray, list[str]]:
    """Prompts, the drawings (n, 64, 64, 3) whose edges are given with them, and the bare names.

    Drawings are moved as in training but scaled to 0.5..0.9, so that none is where its name alone would paint it.
    """
    large = data.large(work, names)
    unseen = adapters.held_out(len(names))
    pool = unseen if kind == "held out" else np.setdiff1d(np.arange(len(names)), unseen)
    chosen = random.choice(pool, min(count, len(pool)), replace=False)
    prompts, drawings = [], []
    for turn, name in enumerate(chosen):
        style = turn % 2
        prompts.append(text.prompt(names[name], ("", "twemoji")[style]))
        if kind == "other style":
            drawings.append(data.load(work).images[1 - style, name])
        else:
            drawings.append(edges.move(large[style, name], random, (0.5, 0.9)))
    return prompts, np.stack(drawings), [names[i] for i in chosen]


def mean_overlap(drawn: np.ndarray, conditions: np.ndarray, tolerance: int) -> np.ndarray:
    """Overlap of each float picture's edges with its condition."""
    found = [edges.canny(picture) for picture in as_bytes(drawn)]
    return np.array([edges.overlap(f, c, tolerance) for f, c in zip(found, conditions, strict=True)])


def evaluate_edges(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Overlap with and without control for each kind of case."""
    model = ControlNetModel.from_pretrained(args.edges, dtype=torch.float32)
    names = data.load(args.work).names
    report: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in args.edges.rglob("*") if f.is_file())}
    for kind in ("moved", "held out", "other style"):
        random = np.random.default_rng(args.seed)
        prompts, drawings, _ = cases(args.work, names, kind, args.count, random)
        seeds = random.integers(0, 2**31, len(prompts)).tolist()
        conditions = np.stack([edges.canny(drawing) for drawing in drawings])
        without = evaluate.paint(pipeline, prompts, seeds, args.steps, 1.0)
        under = with_control(pipeline, model, prompts, conditions, seeds, args.steps)
        _, limit = vae.reconstruction(pipeline.vae, drawings)
        report[kind] = {"cases": len(prompts)}
        for tolerance in (1, 0):
            a, b = (mean_overlap(p, conditions, tolerance) for p in (without, under))
            best = mean_overlap(limit.permute(0, 2, 3, 1).numpy(), conditions, tolerance)
            report[kind][f"tolerance {tolerance}"] = {
                "without": float(a.mean()),
                "with": float(b.mean()),
                "ratio": float(b.mean() / a.mean()),
                "share at least doubled": float((b >= 2 * a).mean()),
                "of the drawing through the VAE": float(best.mean()),
            }
        report[kind]["psnr without"] = evaluate.decibels(without, drawings / 255)
        report[kind]["psnr with"] = evaluate.decibels(under, drawings / 255)
        if kind == "moved":
            some = slice(0, 30)
            for steps, guidance in ((4, 1.0), (args.steps, 1.5)):
                again = with_control(pipeline, model, prompts[some], conditions[some], seeds[some], steps, guidance)
                report[kind][f"with, {steps} steps, guidance {guidance}, 30 cases"] = float(
                    mean_overlap(again, conditions[some], 1).mean()
                )
            wrong = [*prompts[1:30], prompts[0]]
            mixed = with_control(pipeline, model, wrong, conditions[some], seeds[some], args.steps)
            report[kind]["with, a wrong name, 30 cases"] = float(mean_overlap(mixed, conditions[some], 1).mean())
    return report


def evaluate_lora(pipeline: StableDiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Nearness to Fluent's drawings at several weights; the pipeline keeps the LoRA, at weight 1."""
    known = data.load(args.work)
    references = known.of("fluent")
    random = np.random.default_rng(args.seed)
    chosen = random.choice(len(known.names), args.count, replace=False)
    prompts = [known.names[i] for i in chosen]
    seeds = random.integers(0, 2**31, args.count).tolist()
    wanted = data.thumbnails(references[chosen])

    def distance(pictures: np.ndarray) -> np.ndarray:
        return ((data.thumbnails(as_bytes(pictures)) - wanted) ** 2).mean(1) ** 0.5

    without = evaluate.paint(pipeline, prompts, seeds, args.steps, 1.0)
    pipeline.load_lora_weights(args.fluent, adapter_name="fluent")
    report: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in args.fluent.rglob("*") if f.is_file())}
    report["without"] = evaluate.score(without, references, chosen) | {"rms": float(distance(without).mean())}
    for weight in (0.0, 0.5, 0.8, 1.0):
        pipeline.set_adapters("fluent", weight)
        drawn = evaluate.paint(pipeline, prompts, seeds, args.steps, 1.0)
        report[f"weight {weight}"] = evaluate.score(drawn, references, chosen) | {
            "nearer": float((distance(drawn) < distance(without)).mean()),
            "rms": float(distance(drawn).mean()),
            "same as without": bool((drawn == without).all()),
        }
    few = evaluate.paint(pipeline, prompts, seeds, 4, 1.0)
    report["weight 1.0, 4 steps"] = evaluate.score(few, references, chosen)
    return report


def sheet(pipeline: StableDiffusionPipeline, args: argparse.Namespace, columns: int = 10) -> None:
    """A picture of both adapters at work: the first names of the cases measured, none picked."""
    names = data.load(args.work).names
    model = ControlNetModel.from_pretrained(args.edges, dtype=torch.float32)
    pipeline.set_adapters("fluent", 0.0)
    random = np.random.default_rng(args.seed)
    prompts, drawings, labels = cases(args.work, names, "moved", args.count, random)
    prompts, drawings, labels = prompts[:columns], drawings[:columns], labels[:columns]
    seeds = random.integers(0, 2**31, columns).tolist()
    conditions = np.stack([edges.canny(drawing) for drawing in drawings])
    rows = {
        "edges given": np.repeat(conditions[..., None], 3, 3).astype(float),
        "without": evaluate.paint(pipeline, prompts, seeds, args.steps, 1.0),
        "with control": with_control(pipeline, model, prompts, conditions, seeds, args.steps),
    }
    chosen = np.random.default_rng(args.seed).choice(len(names), args.count, replace=False)[:columns]
    fluent = [names[i] for i in chosen]
    rows["base"] = evaluate.paint(pipeline, fluent, seeds, args.steps, 1.0)
    pipeline.set_adapters("fluent", 1.0)
    rows["Fluent LoRA"] = evaluate.paint(pipeline, fluent, seeds, args.steps, 1.0)
    left, cell = 76, data.SIZE + 6
    page = Image.new("RGB", (left + columns * cell, len(rows) * cell + 2 * 26), "white")
    draw = ImageDraw.Draw(page)
    y = 0
    for number, (title, pictures) in enumerate(rows.items()):
        draw.text((2, y + 26), title, fill="black")
        for x, picture in enumerate(as_bytes(pictures)):
            page.paste(Image.fromarray(picture), (left + x * cell, y))
        y += cell
        if number in (2, len(rows) - 1):
            for x, label in enumerate(labels if number == 2 else fluent):
                draw.text((left + x * cell, y - 4), f"{label[:11]}\n{label[11:22]}", fill="black")
            y += 26
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(args.sheet, optimize=True)


def main() -> None:
    """Read the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the base model")
    parser.add_argument("--edges", type=Path, help="folder of the ControlNet")
    parser.add_argument("--fluent", type=Path, help="folder of the LoRA")
    parser.add_argument("--work", type=Path, required=True, help="training folder, for the reference pictures")
    parser.add_argument("--count", type=int, default=100, help="cases of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="contact sheet of both, as one PNG; needs both")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = evaluate.load(args.model)
    report = {}
    if args.edges:
        report["edges"] = evaluate_edges(pipeline, args)
    if args.fluent:
        report["fluent"] = evaluate_lora(pipeline, args)
    if args.sheet:
        sheet(pipeline, args)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
