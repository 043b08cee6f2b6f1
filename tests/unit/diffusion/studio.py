"""A tiny model with adapters on it, whose pictures are painted in lanes, in turns, as the engine does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from services.diffusion.domain import Parameters
from services.diffusion.engine import lanes
from services.diffusion.engine.adapters import Adapters, Held
from services.diffusion.settings import Settings
from tests.support.tiny_adapters import open_pipeline

MODEL = "tiny"
STEPS = 3


def parameters(**more: Any) -> Parameters:
    """A picture of the tiny model."""
    given: dict[str, Any] = {
        "prompt": "red panda",
        "negative_prompt": "",
        "seed": 7,
        "prompt_syntax": "weighted",
        **more,
    }
    return Parameters(model=MODEL, width=32, height=32, step_count=STEPS, guidance_scale=2.0, scheduler="ddim", **given)


def call(pipeline: Any, asked: Parameters, **more: Any) -> torch.Tensor:
    """The pipeline's own call for those parameters; pixels [1, 3, 32, 32]."""
    arguments: dict[str, Any] = {
        "prompt": asked.prompt,
        "num_inference_steps": asked.step_count,
        "guidance_scale": asked.guidance_scale,
        "generator": torch.Generator().manual_seed(asked.seed),
        "output_type": "pt",
        "width": 32,
        "height": 32,
    }
    with torch.no_grad():
        images: torch.Tensor = pipeline(**arguments | more).images
    return images


@dataclass
class Painting:
    """One picture on its way."""

    held: Held
    lane: lanes.Lane


@dataclass
class Studio:
    """The model. pipeline: shared by all pictures. under_way: what they hold."""

    settings: Settings
    pipeline: Any
    name: str = MODEL
    under_way: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.denoiser = self.pipeline.unet
        self.device = torch.device("cpu")
        self.adapters = Adapters(self, self.settings)
        lanes.open_gate(self.denoiser)

    def begin(self, asked: Parameters, paint: Callable[[Held], torch.Tensor] | None = None) -> Painting:
        """A picture before its first turn. paint: instead of the model's own pipeline."""
        held = self.adapters.hold(asked, under_way=self.under_way)
        self.under_way.append(held)

        def run() -> torch.Tensor:
            if paint is not None:
                return paint(held)
            return call(self.pipeline, asked, prompt=held.prompt(asked.prompt))

        return Painting(held, lanes.Lane(run))

    def turn(self, painting: Painting) -> None:
        """One turn of a picture."""
        self.adapters.switch.to(painting.held.overlay)
        painting.lane.advance()

    def paint(self, paintings: Sequence[Painting]) -> list[torch.Tensor]:
        """All of them in turns, to the end."""
        while any(not painting.lane.finished for painting in paintings):
            for painting in paintings:
                if not painting.lane.finished:
                    self.turn(painting)
        self.under_way.clear()
        return [painting.lane.result for painting in paintings]

    def paint_one(self, asked: Parameters) -> torch.Tensor:
        """One picture with nobody else around."""
        return self.paint([self.begin(asked)])[0]


def open_studio(base: Path, **settings: Any) -> Studio:
    """A fresh model of a folder. settings: those of adapters."""
    given = {"loras": {}, "controls": {}, "models": {MODEL: {"source": str(base)}}, **settings}
    return Studio(Settings.model_validate(given), open_pipeline(base))
