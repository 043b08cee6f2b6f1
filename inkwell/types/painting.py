"""A picture that was painted."""

from dataclasses import dataclass
from typing import TypeAlias

from inkwell.types.asking import (
    FreeU,
    Hires,
    Lora,
    MaskFill,
    Outpaint,
    PerturbedAttention,
    PromptSyntax,
    Refiner,
    Sampling,
    Vae,
    Variation,
)
from inkwell.types.common import Image, Progress, Queued, ServedBy, Started, Timing


@dataclass(frozen=True, slots=True)
class InpaintParameters:
    """`Inpaint`, its mask by the SHA-256 of the encoded file."""

    mask_sha256: str
    blur_px: int = 0
    inverted: bool = False
    crop_padding_px: int | None = None
    fill: MaskFill = MaskFill.ORIGINAL


@dataclass(frozen=True, slots=True)
class ControlParameters:
    """`Control`, its image by the SHA-256 of the encoded file."""

    model: str
    image_sha256: str
    preprocessor: str
    scale: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class ImagePromptParameters:
    """`ImagePrompt`, its image by the SHA-256 of the encoded file."""

    adapter: str
    image_sha256: str
    scale: float


@dataclass(frozen=True, slots=True)
class GenerationParameters:
    """Everything that decides a picture, all defaults filled in. The same values are embedded in its file.

    What was not asked for is None or empty. Pictures that went in stand here by the SHA-256 of their encoded bytes.
    """

    model: str
    prompt: str
    """With wildcards and styles filled in."""
    negative_prompt: str
    width: int
    height: int
    step_count: int
    guidance_scale: float
    scheduler: str
    seed: int
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN  # as it was for pictures whose files do not say
    prompt_template: str = ""
    """The prompt as it was asked for, where wildcards or styles changed it."""
    negative_prompt_template: str = ""
    styles: tuple[str, ...] = ()
    wildcard_seed: int | None = None
    image_sha256: str = ""
    strength: float | None = None
    inpaint: InpaintParameters | None = None
    outpaint: Outpaint | None = None
    controls: tuple[ControlParameters, ...] = ()
    image_prompts: tuple[ImagePromptParameters, ...] = ()
    loras: tuple[Lora, ...] = ()
    hires: Hires | None = None
    refiner: Refiner | None = None
    sampling: Sampling | None = None
    guidance_rescale: float | None = None
    perturbed_attention: PerturbedAttention | None = None
    freeu: FreeU | None = None
    clip_skip: int | None = None
    variation: Variation | None = None
    vae: Vae | None = None

    def __post_init__(self) -> None:
        if self.sampling == Sampling():  # some write it so where nothing was asked for
            object.__setattr__(self, "sampling", None)


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
    """Always the last event of a paint.

    control_images: the conditions that steered, in the order of the controls, as their preprocessors made them.
    """

    sequence: int
    pictures: tuple[Picture, ...]
    timing: Timing
    served_by: ServedBy
    warnings: tuple[str, ...]
    control_images: tuple[Image, ...] = ()


PaintEvent: TypeAlias = Queued | Started | Progress | Preview | PaintResult
