"""What a picture is asked for: the options of `Client.paint`.

Each mirrors the message of the same name in the proto, where units, ranges and defaults stand; None leaves a value to
the server's default. In frozen form they come back in `GenerationParameters`.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from inkwell.types.common import Image, ImageSource

PictureSource: TypeAlias = ImageSource | Image
"""An encoded picture: its bytes, the path of its file, or one that was painted."""


class PromptSyntax(enum.StrEnum):
    """How prompts are read."""

    WEIGHTED = "weighted"
    """As AUTOMATIC1111's web UI reads them: (word:1.2), [word], [from:to:0.5], BREAK, AND, <lora:name:0.8>,
    __wildcard__."""
    PLAIN = "plain"
    """Every character is text."""


class MaskFill(enum.StrEnum):
    """What the pixels under a mask are before they are repainted."""

    ORIGINAL = "original"
    SURROUNDINGS = "surroundings"
    """The colours around the hole, spread into it."""
    NOISE = "noise"
    """Random colours, the same for the same seed."""
    GREY = "grey"


class SigmaSchedule(enum.StrEnum):
    """How noise levels are spread over the steps."""

    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"


class TimestepSpacing(enum.StrEnum):
    """Which of the training's time steps are visited."""

    LEADING = "leading"
    LINSPACE = "linspace"
    TRAILING = "trailing"


class PredictionType(enum.StrEnum):
    """What the model's output means; for checkpoints whose files say it wrong."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"
    SAMPLE = "sample"


class PreviewMethod(enum.StrEnum):
    """What decodes previews."""

    TINY_AUTOENCODER = "tiny_autoencoder"
    """The model's small autoencoder, where it has one."""
    LINEAR = "linear"
    """A linear map from latents to colours: coarse and almost free."""


@dataclass(frozen=True, slots=True)
class Inpaint:
    """Repaints the part of `image` that is white in `mask`, a grey picture of the same size.

    blur_px: softens the mask's edge, standard deviation of a Gaussian, 0 to 64. inverted: repaints what is black.
    crop_padding_px: cuts out the masked region and so many pixels around it, 0 to 512, paints it at the call's full
        size and puts it back. fill: see `MaskFill`; the original if left out.
    """

    mask: PictureSource
    blur_px: int | None = None
    inverted: bool = False
    crop_padding_px: int | None = None
    fill: str | None = None


@dataclass(frozen=True, slots=True)
class Outpaint:
    """Paints beyond the edges of `image`, so many pixels a side; the picture grows by them.

    blur_px: how far the old edge is softened, 0 to 64. fill: see `MaskFill`; the surroundings if left out.
    """

    left_px: int = 0
    top_px: int = 0
    right_px: int = 0
    bottom_px: int = 0
    blur_px: int | None = None
    fill: str | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """Steers the composition by a picture.

    model: name from `Client.controls`; empty where exactly one fits. preprocessor: name of the step that makes the
    condition of the image; empty: the image is the condition. scale: 0 to 2. start, end: the part of the steps, 0 to 1.
    """

    image: PictureSource
    model: str = ""
    preprocessor: str = ""
    scale: float | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A picture that says, beside the prompt, what to paint (IP-Adapter).

    adapter: name from `Client.adapters`; empty where exactly one fits. scale: 0 to 2.
    """

    image: PictureSource
    adapter: str = ""
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA by its name from `Client.adapters`, and how much of it, -4 to 4; the same as <lora:name:weight>."""

    name: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Hires:
    """A second pass at a higher size over the finished first one.

    scale: how much larger each side gets, above 1 to 4, or width and height in pixels instead. upscaler: "lanczos",
    "bicubic", "nearest", "latent" or "latent_nearest". step_count: before strength shortens them. strength: how much is
    repainted, above 0 to 1.
    """

    scale: float | None = None
    width: int | None = None
    height: int | None = None
    upscaler: str = ""
    step_count: int | None = None
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class Refiner:
    """Another model of the same family, which takes over after this part of the steps, between 0 and 1."""

    model: str
    switch_at: float | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Refines the scheduler; `Scheduler.sampling_options` says which of these one takes.

    sigma_schedule, timestep_spacing, prediction_type: see the enums of these names. eta: fresh noise at each step of
    ddim and its kin, 0 to 1. timesteps or sigmas: the steps by hand, falling, in place of their count.
    """

    sigma_schedule: str | None = None
    timestep_spacing: str | None = None
    prediction_type: str | None = None
    eta: float | None = None
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PerturbedAttention:
    """Perturbed-attention guidance. scale: above 0 to 20. adaptive_scale: how fast it fades, 0 (never) to 20."""

    scale: float | None = None
    adaptive_scale: float | None = None


@dataclass(frozen=True, slots=True)
class FreeU:
    """FreeU: weights of a U-Net's skip connections (s1, s2) and backbone (b1, b2), 0 to 4 each."""

    s1: float | None = None
    s2: float | None = None
    b1: float | None = None
    b2: float | None = None


@dataclass(frozen=True, slots=True)
class Variation:
    """Mixes a second seed's noise into the first's: 0 (only the first) to 1 (only this one)."""

    seed: int
    strength: float


@dataclass(frozen=True, slots=True)
class Vae:
    """How latents become the picture.

    name: from the model's `vaes`; empty for its own. tiled: in overlapping tiles, with less memory. upcast: in float32
    where the service computes in 16 bits.
    """

    name: str = ""
    tiled: bool = False
    upcast: bool = False


class PaintOptions(TypedDict, total=False):
    """The options of `Client.paint`; what is left out, or None, takes the model's default, which `Client.models` shows.

    Where a type is followed by that of its first field, this value alone will do: `hires=2` is `Hires(scale=2)`.
    """

    negative_prompt: str | None
    """What the picture should not show; takes effect when guidance_scale is above 1."""
    model: str | None
    width: int | None
    """In pixels, as is height; multiples of the model's size_multiple."""
    height: int | None
    steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """How strongly the prompt rules."""
    scheduler: str | None
    """Name or alias from `Client.schedulers`, such as "dpmpp_2m" or "DPM++ 2M Karras"."""
    seed: int | None
    """0 to 2**32 - 1, random if left out. Picture i has seed + i and is the same as if it had been asked for alone."""
    image_count: int | None
    """Pictures painted side by side."""
    batch_count: int | None
    """So many times image_count pictures, one batch after the other; their seeds go on."""
    media_type: str | None
    """One of "image/png" (the default), "image/jpeg" and "image/webp"."""
    quality: int | None
    """1 to 100, not for PNG."""
    prompt_syntax: str | None
    """See `PromptSyntax`; weighted if left out."""
    styles: str | Iterable[str] | None
    """Names of the service's styles, laid on the prompts in this order."""
    wildcard_seed: int | None
    """What decides the prompt's __wildcards__; each picture's own seed if left out."""
    image: PictureSource | None
    """The picture to start from."""
    strength: float | None
    """How much of `image` is repainted, above 0 to 1."""
    inpaint: Inpaint | PictureSource | None
    outpaint: Outpaint | None
    controls: Iterable[Control | PictureSource] | None
    image_prompts: Iterable[ImagePrompt | PictureSource] | None
    loras: Iterable[Lora | str | tuple[str, float]] | None
    hires: Hires | float | None
    refiner: Refiner | str | None
    sampling: Sampling | None
    guidance_rescale: float | None
    """Against overexposure by guidance, 0 (not) to 1 (fully)."""
    perturbed_attention: PerturbedAttention | float | None
    freeu: FreeU | None
    """`FreeU()` for the values that its authors advise."""
    clip_skip: int | None
    """Text encoder layers to skip, 0 to 11; what the A1111 web UI calls clip skip is one more."""
    variation: Variation | None
    vae: Vae | str | None
    previews: bool | None
    """Previews while it is painted, for whoever takes the events; as one of the next three says, if left out."""
    preview_interval: int | None
    """A preview after every so many steps; as often as costs little if left out."""
    preview_method: str | None
    """See `PreviewMethod`."""
    preview_max_side_px: int | None
    """Previews are scaled down to this longest side."""
    progress_interval_ms: int | None
    """Progress at most so often, and after the first step and the last; after every step if left out."""
