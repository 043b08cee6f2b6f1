"""What the diffusion service talks about. These structs also cross from the front to the engine and back."""

import struct
from dataclasses import dataclass

import msgspec

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
SEED_MOST = 2**32 - 1


class Parameters(msgspec.Struct, frozen=True):
    """Everything that decides one picture, all defaults filled in.

    The names are those of the GenerationParameters message: they are the keys of the JSON embedded in the file.
    """

    model: str
    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int  # pixels
    step_count: int
    guidance_scale: float
    scheduler: str
    seed: int  # 0 to 2^32 - 1


class PaintJob(msgspec.Struct, frozen=True):
    """A validated call, as the engine gets it. Picture i of it has seed `parameters.seed + i`."""

    parameters: Parameters
    image_count: int
    media_type: str  # one of MEDIA_TYPES
    quality: int  # 1 to 100, for JPEG and WebP
    preview_interval: int  # steps between previews; 0 for none

    def parameters_of(self, index: int) -> Parameters:
        """The parameters with which picture `index` could be asked for alone."""
        return msgspec.structs.replace(self.parameters, seed=self.parameters.seed + index)


@dataclass(frozen=True)
class Asked:
    """A request as it came, before limits and defaults; None where the caller left a field unset."""

    model: str
    prompt: str
    negative_prompt: str
    width: int | None
    height: int | None
    step_count: int | None
    guidance_scale: float | None
    scheduler: str
    seed: int | None
    image_count: int | None
    media_type: str
    quality: int | None
    preview_disabled: bool
    preview_interval: int | None


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
    """The encoded files, parameters embedded, and what the caller should know."""

    images: tuple[bytes, ...]
    warnings: tuple[str, ...]


# --- what the engine says about itself ---


class ModelInfo(msgspec.Struct, frozen=True):
    """A loaded model."""

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


class EngineInfo(msgspec.Struct, frozen=True):
    """The engine, once it is ready."""

    hardware: str
    runtime: str
    models: tuple[ModelInfo, ...]

    def model(self, name: str) -> ModelInfo | None:
        """The model of that name, None if there is none."""
        return next((model for model in self.models if model.name == name), None)


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same 32-bit float as `value`: 7.1 for what travelled as 7.099999904632568.

    Used for the guidance scale, so that what is embedded is what was typed, and repeats the same picture.
    """
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 10):
        short = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == single:
            return short
    return float(single)
