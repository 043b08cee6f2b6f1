"""A picture that was painted."""

from dataclasses import dataclass
from typing import TypeAlias

from inkwell.types.common import Image, Progress, Queued, ServedBy, Started, Timing


@dataclass(frozen=True, slots=True)
class GenerationParameters:
    """Everything that decides a picture, all defaults filled in. The same values are embedded in its file."""

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    step_count: int
    guidance_scale: float
    scheduler: str
    seed: int


@dataclass(frozen=True, slots=True)
class Picture(Image):
    """One finished picture. `warnings` say what the caller should know, such as a prompt that was cut off."""

    parameters: GenerationParameters
    served_by: ServedBy
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """What the pictures of the call, in order, look like after `step`."""

    sequence: int
    step: int
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class PaintResult:
    """Always the last event of a paint."""

    sequence: int
    pictures: tuple[Picture, ...]
    timing: Timing
    served_by: ServedBy
    warnings: tuple[str, ...]


PaintEvent: TypeAlias = Queued | Started | Progress | Preview | PaintResult
