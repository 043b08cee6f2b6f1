"""What the diffusion service talks about. These structs also cross from the front to the engine and back."""

import ctypes
from dataclasses import dataclass
from typing import Literal

import msgspec

from services.kit.device import Device

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
SEED_MOST = 2**32 - 1
# An hour: whoever wants none in between the first step and the last.
PROGRESS_INTERVAL_MS_MOST = 3_600_000


PromptSyntax = Literal["weighted", "plain"]
MaskFill = Literal["original", "surroundings", "noise", "grey"]
SigmaSchedule = Literal["karras", "exponential", "beta"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
PreviewMethod = Literal["tiny_autoencoder", "linear"]
Upscaler = Literal["lanczos", "bicubic", "nearest", "latent", "latent_nearest"]
LATENT_UPSCALERS = ("latent", "latent_nearest")
UPSCALERS = ("lanczos", "bicubic", "nearest", *LATENT_UPSCALERS)


class Pixels(msgspec.Struct, frozen=True):
    """A decoded picture, 8 bits a channel, row by row from the top: `mode` "RGB" has 3 bytes a pixel, "L" has 1."""

    width: int
    height: int
    mode: Literal["RGB", "L"]
    content: bytes


# --- what decides a picture. The names are those of the messages in the proto, and the keys of the embedded JSON. ---


class Inpaint(msgspec.Struct, frozen=True):
    """Repaint what is white in the mask."""

    mask_sha256: str
    blur_px: int = 0
    inverted: bool = False
    crop_padding_px: int | None = None
    fill: MaskFill = "original"


class Outpaint(msgspec.Struct, frozen=True):
    """Paint beyond the edges, pixels."""

    left_px: int
    top_px: int
    right_px: int
    bottom_px: int
    blur_px: int = 4
    fill: MaskFill = "surroundings"


class Control(msgspec.Struct, frozen=True):
    """Steer by a condition. preprocessor: empty when the image is the condition itself."""

    model: str
    image_sha256: str
    preprocessor: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class ImagePrompt(msgspec.Struct, frozen=True):
    """A picture that says what to paint."""

    adapter: str
    image_sha256: str
    scale: float = 1.0


class Lora(msgspec.Struct, frozen=True):
    """A LoRA and its weight."""

    name: str
    weight: float = 1.0


class Hires(msgspec.Struct, frozen=True):
    """The second pass: final size in pixels, and how it paints."""

    width: int
    height: int
    upscaler: Upscaler
    step_count: int
    strength: float


class Refiner(msgspec.Struct, frozen=True):
    """Another model that takes over after this part of the steps."""

    model: str
    switch_at: float = 0.8


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """What refines the scheduler; None and () where it is left as it is."""

    sigma_schedule: SigmaSchedule | None = None
    timestep_spacing: TimestepSpacing | None = None
    prediction_type: PredictionType | None = None
    eta: float | None = None
    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()


class PerturbedAttention(msgspec.Struct, frozen=True):
    """Perturbed-attention guidance."""

    scale: float = 3.0
    adaptive_scale: float = 0.0


class FreeU(msgspec.Struct, frozen=True):
    """FreeU's factors."""

    s1: float = 0.9
    s2: float = 0.2
    b1: float = 1.5
    b2: float = 1.6


class Variation(msgspec.Struct, frozen=True):
    """A second seed and how much of its noise."""

    seed: int
    strength: float


class Vae(msgspec.Struct, frozen=True):
    """How latents become the picture. name: empty for the model's own."""

    name: str = ""
    tiled: bool = False
    upcast: bool = False


class Parameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that decides one picture, all defaults filled in; None and empty for what was not asked for.

    The names are those of the GenerationParameters message: they are the keys of the JSON embedded in the file.
    """

    model: str
    prompt: str  # with wildcards and styles filled in
    negative_prompt: str
    width: int  # pixels
    height: int  # pixels
    step_count: int
    guidance_scale: float
    scheduler: str
    seed: int  # 0 to 2^32 - 1
    prompt_syntax: PromptSyntax = "plain"  # as it was for pictures whose files do not say
    # The prompts as they were asked for, where wildcards or styles changed them.
    prompt_template: str = ""
    negative_prompt_template: str = ""
    styles: tuple[str, ...] = ()
    wildcard_seed: int | None = None
    image_sha256: str = ""
    strength: float | None = None
    inpaint: Inpaint | None = None
    outpaint: Outpaint | None = None
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    loras: tuple[Lora, ...] = ()
    hires: Hires | None = None
    refiner: Refiner | None = None
    sampling: Sampling = Sampling()
    guidance_rescale: float | None = None
    perturbed_attention: PerturbedAttention | None = None
    freeu: FreeU | None = None
    clip_skip: int | None = None
    variation: Variation | None = None
    vae: Vae | None = None


class PreviewPlan(msgspec.Struct, frozen=True):
    """When and how previews are painted. interval: steps between two; 0 for none, None for as often as is cheap."""

    interval: int | None = None
    method: PreviewMethod | None = None  # None takes the small autoencoder where there is one
    max_side_px: int = 512


class PaintJob(msgspec.Struct, frozen=True, tag=True):
    """A validated call, as the engine gets it: one set of parameters a picture, of which only the seed and what follows
    from it (prompts with wildcards) differ.

    batch_size: pictures painted side by side; the batches come one after the other. Pictures are decoded but not yet
    scaled; conditions come before their preprocessor.
    """

    pictures: tuple[Parameters, ...]
    batch_size: int
    media_type: str  # one of MEDIA_TYPES
    quality: int  # 1 to 100, for JPEG and WebP
    preview: PreviewPlan
    image: Pixels | None = None
    mask: Pixels | None = None  # "L"
    control_images: tuple[Pixels, ...] = ()  # by parameters.controls
    image_prompt_images: tuple[Pixels, ...] = ()  # by parameters.image_prompts

    @property
    def parameters(self) -> Parameters:
        """Those of the first picture; model, size and steps are the same for all."""
        return self.pictures[0]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that it needs, the one that begins first."""
        refiners = (picture.refiner.model for picture in self.pictures if picture.refiner is not None)
        return tuple(dict.fromkeys((self.parameters.model, *refiners)))


# What computes a model; all but torch run artifacts of the compiler.
Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt", "triton"]


class LoadJob(msgspec.Struct, frozen=True, tag=True):
    """Load a known model; nothing to do when it is loaded so. Updates are `Loading`, the result is its ModelInfo."""

    model: str
    runtime: Runtime | None = None  # None: the setting's
    artifact: str = ""  # the id to run from, or its first digits; "": what fits


class UnloadJob(msgspec.Struct, frozen=True, tag=True):
    """Free a model's memory once the jobs that use it are done. The result says nothing."""

    model: str


Work = PaintJob | LoadJob | UnloadJob


# --- a request as it came, before limits and defaults; None where the caller left a field unset ---


@dataclass(frozen=True)
class AskedInpaint:
    """Inpaint as asked for."""

    mask: bytes
    blur_px: int | None
    inverted: bool
    crop_padding_px: int | None
    fill: MaskFill | None


@dataclass(frozen=True)
class AskedOutpaint:
    """Outpaint as asked for."""

    left_px: int
    top_px: int
    right_px: int
    bottom_px: int
    blur_px: int | None
    fill: MaskFill | None


@dataclass(frozen=True)
class AskedControl:
    """Control as asked for."""

    model: str
    image: bytes
    preprocessor: str
    scale: float | None
    start: float | None
    end: float | None


@dataclass(frozen=True)
class AskedImagePrompt:
    """ImagePrompt as asked for."""

    adapter: str
    image: bytes
    scale: float | None


@dataclass(frozen=True)
class AskedLora:
    """Lora as asked for."""

    name: str
    weight: float | None


@dataclass(frozen=True)
class AskedHires:
    """Hires as asked for."""

    scale: float | None
    width: int | None
    height: int | None
    upscaler: str
    step_count: int | None
    strength: float | None


@dataclass(frozen=True)
class AskedRefiner:
    """Refiner as asked for."""

    model: str
    switch_at: float | None


@dataclass(frozen=True)
class AskedPerturbedAttention:
    """PerturbedAttention as asked for."""

    scale: float | None
    adaptive_scale: float | None


@dataclass(frozen=True)
class AskedFreeU:
    """FreeU as asked for."""

    s1: float | None
    s2: float | None
    b1: float | None
    b2: float | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A whole request as it came."""

    model: str = ""
    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    step_count: int | None = None
    guidance_scale: float | None = None
    scheduler: str = ""
    seed: int | None = None
    image_count: int | None = None
    batch_count: int | None = None
    media_type: str = ""
    quality: int | None = None
    preview_disabled: bool = False
    preview_interval: int | None = None
    preview_method: PreviewMethod | None = None
    preview_max_side_px: int | None = None
    progress_interval_ms: int | None = None
    prompt_syntax: PromptSyntax | None = None
    styles: tuple[str, ...] = ()
    wildcard_seed: int | None = None
    image: bytes | None = None
    strength: float | None = None
    inpaint: AskedInpaint | None = None
    outpaint: AskedOutpaint | None = None
    controls: tuple[AskedControl, ...] = ()
    image_prompts: tuple[AskedImagePrompt, ...] = ()
    loras: tuple[AskedLora, ...] = ()
    hires: AskedHires | None = None
    refiner: AskedRefiner | None = None
    sampling: Sampling = Sampling()
    guidance_rescale: float | None = None
    perturbed_attention: AskedPerturbedAttention | None = None
    freeu: AskedFreeU | None = None
    clip_skip: int | None = None
    variation: Variation | None = None
    vae: Vae | None = None
    unknown_enums: tuple[str, ...] = ()  # fields whose number means nothing in this version of the contract


# --- what the engine says while it paints, and at the end ---


class StepDone(msgspec.Struct, tag=True, frozen=True):
    """Every picture of the call has done `step` of `step_count` steps."""

    step: int
    step_count: int
    eta_ms: int  # estimated time until the result
    compute_s: float  # time the engine itself spent on this step, all pictures of the call together


class PreviewPainted(msgspec.Struct, tag=True, frozen=True):
    """What the pictures look like after `step`: one JPEG a picture, in order."""

    step: int
    images: tuple[bytes, ...]


JobUpdate = StepDone | PreviewPainted


class Painted(msgspec.Struct, frozen=True):
    """The encoded files, parameters embedded, and what the caller should know.

    control_images: the conditions as they steered, PNG, by parameters.controls.
    """

    images: tuple[bytes, ...]
    warnings: tuple[str, ...]
    control_images: tuple[bytes, ...] = ()


# --- what the engine says about itself ---


class Loading(msgspec.Struct, frozen=True):
    """Where a LoadJob stands."""

    stage: Literal["waiting", "reading_weights", "warming"]
    evicted_models: tuple[str, ...] = ()  # unloaded to make room


# Where a model stands, in the words of the contract's ModelState.
ModelState = Literal["loading", "ready", "unloaded"]
Family = Literal["sd", "sdxl", "sd3", "flux", "other"]
Feature = Literal[
    "text",  # paints from a prompt alone; a refiner does not
    "image",
    "inpaint",
    "outpaint",
    "controls",
    "image_prompts",
    "loras",
    "hires",
    "refiner",  # another model can take its last steps over
    "perturbed_attention",
    "freeu",
    "clip_skip",
    "guidance_rescale",
    "variation",
]


class ModelInfo(msgspec.Struct, frozen=True):
    """A loaded model. What LoadJob ends with."""

    name: str
    pipeline: str  # diffusers class
    dtype: str
    parameter_count: int
    default_width: int  # pixels
    default_height: int  # pixels
    size_multiple: int  # pixels
    default_step_count: int
    default_guidance_scale: float
    default_scheduler: str
    prompt_token_limit: int
    has_preview_autoencoder: bool
    # Names it can be painted with, and for the others of the table why not.
    schedulers: tuple[str, ...]
    unfit_schedulers: dict[str, str]
    family: Family = "other"
    features: tuple[Feature, ...] = ()
    vaes: tuple[str, ...] = ()  # other VAEs by name
    file_bytes: int = 0  # of the weights on disk
    memory_bytes: int = 0  # of the weights in memory
    runtime: str = "torch"  # what computes it: one of Runtime, torch with its version
    precision: str = "float32"  # an ArtifactPrecision: what weights are computed with
    artifact: str = ""  # id of the artifact that it runs from; "" for the checkpoint itself
    largest_side_px: int = 0  # that its graphs were built for; 0 for any
    version: str = ""  # changes when the weights do


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine says of itself when it is ready, and again whenever a model comes or goes."""

    hardware: str
    runtime: str
    models: tuple[ModelInfo, ...]  # those that are loaded
    loading: tuple[str, ...] = ()  # names of those that are being loaded or wait for it
    device: Device = Device()

    def model(self, name: str) -> ModelInfo | None:
        """The model of that name, None if there is none."""
        return next((model for model in self.models if model.name == name), None)


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same 32-bit float as `value`: 7.1 for what travelled as 7.099999904632568.

    Used for the guidance scale, so that what is embedded is what was typed, and repeats the same picture.
    """
    # Not struct, which refuses what is rounded up beyond the largest 32-bit float; this makes it infinite.
    single = ctypes.c_float(value).value
    for digits in range(1, 10):
        short = float(f"{single:.{digits}g}")
        if ctypes.c_float(short).value == single:
            return short
    return single
