"""How many pictures are painted: diffusers in-process against Inkwell over gRPC, at the same precision.

One caller, the same prompts, seeds, steps and sizes, on the same cores, one contender after the other; the figures are
medians of ratios within a round. The embedded model shows what the service costs where a step takes milliseconds,
Stable Diffusion 1.5 in full width (random weights, 512x512) what it costs where it takes seconds. Encoding the PNG is
part of the work of both.

As a program of its own (`python -m benchmarks.diffusion --help`) it takes fewer rounds, and draws.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks import _chart, _stable_diffusion
from benchmarks._bars import Bar, at_least, at_most, print_report
from benchmarks._running import running
from inkwell import Client, types
from services import local
from services.diffusion.settings import ModelSettings, Settings

ROUNDS = 5
PROMPT = "grinning face"
EMOJI_STEPS = 20
# Where a picture takes half a second, what else the machine does shows in each: so few at a time, and more often.
EMOJI_PICTURES = 4
EMOJI_ROUNDS = 6  # for one of the large model's
LARGE_STEPS = 2
PREVIEW_PICTURES = 20

DIFFUSERS = "diffusers"
OURS = "Inkwell over gRPC"


@dataclass
class Work:
    """What one model paints in a round."""

    name: str
    folder: str
    step_count: int
    guidance_scale: float
    pictures: int
    rates: dict[str, list[float]] = field(default_factory=dict)


def run(rounds: int = ROUNDS, figure: Path | None = None) -> dict[str, Bar]:
    """Ratios of pictures a second, milliseconds to the first progress, and the cost of previews in percent."""
    diffusers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stable-diffusion-"))
        _stable_diffusion.save(Path(folder))
        emoji = Work("emoji-tiny", str(local.ROOT / "models" / "emoji-tiny"), EMOJI_STEPS, 1.0, EMOJI_PICTURES)
        large = Work("sd-1.5", folder, LARGE_STEPS, 7.5, 1)
        settings = Settings(
            models={work.name: ModelSettings(source=work.folder) for work in (emoji, large)}, dtype="float32"
        )
        service = stack.enter_context(running("diffusion", settings))
        client = stack.enter_context(Client(service.address, timeout_s=None))
        for work, count in ((emoji, EMOJI_ROUNDS * rounds), (large, rounds)):
            _compare(work, {DIFFUSERS: _in_process(work), OURS: _over_grpc(client, work)}, count)
        first_ms = statistics.median(_first_progress_ms(client, emoji) for _ in range(20))
        cost = _preview_cost(client, emoji)
    print(f"  first progress {first_ms:.1f} ms after the engine took the call; previews cost {cost:+.1f} % of a step")
    if figure is not None:
        _chart.draw(
            figure,
            "Pictures a minute in float32 on two cores, one caller",
            {
                f"{contender}, {work.name}": 60 * statistics.median(rates)
                for work in (emoji, large)
                for contender, rates in work.rates.items()
            },
        )
    return {
        "emoji_tiny_over_diffusers": at_least(_ratio(emoji), 0.97),
        "sd15_over_diffusers": at_least(_ratio(large), 0.97),
        "first_progress_ms": at_most(first_ms, 30.0),
        "preview_cost_percent": at_most(cost, 5.0),
    }


def _compare(work: Work, contenders: dict[str, Callable[[int], None]], rounds: int) -> None:
    for paint in contenders.values():
        paint(0)  # the first run of everything is slow
    for number in range(rounds):
        # Each goes first in every other round: whoever follows finds a warmer machine.
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in order:
            began = time.perf_counter()
            for seed in range(work.pictures):
                contenders[name](seed)
            work.rates.setdefault(name, []).append(work.pictures / (time.perf_counter() - began))
        last = ", ".join(f"{name} {60 * work.rates[name][-1]:.2f}" for name in contenders)
        print(f"  {work.name}, round {number + 1} of {rounds}, pictures a minute: {last}", flush=True)


def _ratio(work: Work) -> float:
    ours, theirs = work.rates[OURS], work.rates[DIFFUSERS]
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _in_process(work: Work) -> Callable[[int], None]:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(work.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint(seed: int) -> None:
        image = pipeline(
            PROMPT,
            num_inference_steps=work.step_count,
            guidance_scale=work.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        image.save(io.BytesIO(), "PNG")

    return paint


def _options(work: Work, seed: int) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "model": work.name,
        "steps": work.step_count,
        "guidance_scale": work.guidance_scale,
        "seed": seed,
    }


def _over_grpc(client: Client, work: Work) -> Callable[[int], None]:
    def paint(seed: int) -> None:
        # No previews, and nobody who looks at the progress: diffusers paints and shows none either.
        client.paint(**_options(work, seed), previews=False)

    return paint


def _first_progress_ms(client: Client, work: Work) -> float:
    """From the engine taking the call to its first step, as the caller sees the two events."""
    began = 0.0
    for event in client.paint_stream(**_options(work, 0)):
        if isinstance(event, types.Started):
            began = time.perf_counter()
        elif isinstance(event, types.Progress):
            return 1000 * (time.perf_counter() - began)
    raise RuntimeError("a call ended without progress")


def _preview_cost(client: Client, work: Work) -> float:
    """Percent that a call takes longer with previews as they come by default than without; pairs in turn."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * PREVIEW_PICTURES):
        previews = number % 2 == 0
        began = time.perf_counter()
        for _ in client.paint_stream(**_options(work, number // 2), previews=previews):
            pass
        taken[previews].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(taken[True], taken[False], strict=True)]
    return 100 * (statistics.median(ratios) - 1)


def main() -> None:
    """The last line is the JSON object of the bars."""
    parser = argparse.ArgumentParser(description="Pictures a second: diffusers against Inkwell")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--figure", type=Path, help="SVG file to draw the pictures a minute into")
    options = parser.parse_args()
    print_report("diffusion", run(options.rounds, options.figure))


if __name__ == "__main__":
    main()
