"""What there is: models, schedulers, and the machines behind a gateway."""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from inkwell.types.reading import Decoding


class ModelState(enum.StrEnum):
    """Whether a model can serve."""

    UNKNOWN = "unknown"
    LOADING = "loading"
    READY = "ready"
    UNLOADED = "unloaded"
    """Known but not in memory; a call that names it loads it."""


class EndpointState(enum.StrEnum):
    """Whether a gateway gives calls to an endpoint."""

    UNKNOWN = "unknown"
    CONNECTING = "connecting"
    READY = "ready"
    NOT_READY = "not_ready"
    NOT_SELECTED = "not_selected"
    """Ready, but not what its pool is for."""
    UNREACHABLE = "unreachable"


class Precision(enum.StrEnum):
    """What a model's weights are computed with."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8_DYNAMIC = "int8_dynamic"
    """8-bit weights, activations rounded to 8 bits by the range that each has."""
    INT8_WEIGHT_ONLY = "int8_weight_only"
    """8-bit weights, everything computed in floating point."""
    INT8_STATIC = "int8_static"
    """8-bit weights, activations rounded by ranges measured beforehand; for models that bring them."""
    INT4_WEIGHT_ONLY = "int4_weight_only"
    """4-bit weights, everything computed in floating point; for artifacts of the compiler only."""


@dataclass(frozen=True, slots=True)
class OcrModel:
    """A model that reads. `dtype` is that of its weights in memory; `default_decoding` is what unset options mean."""

    name: str
    state: ModelState
    hardware: str
    runtime: str
    dtype: str
    parameter_count: int
    is_default: bool
    default_decoding: Decoding
    max_new_token_limit: int
    precision: Precision | None = None
    """None while it is not loaded, or when the server does not say."""
    weight_bytes: int = 0
    """Memory that its weights take; of a model that is not loaded the size of its files, where known."""
    languages: tuple[str, ...] = ()
    """The languages it declares, as BCP 47 tags."""
    confidence_calibrated: bool = False
    embedding_width: int = 0
    artifact: str = ""
    """Id of the artifact that it runs from; empty where torch runs the model itself."""


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """A model that paints. Width and height (pixels) must be multiples of `size_multiple`."""

    name: str
    state: ModelState
    hardware: str
    runtime: str
    dtype: str
    parameter_count: int
    is_default: bool
    pipeline: str
    default_width: int
    default_height: int
    size_multiple: int
    default_step_count: int
    default_guidance_scale: float
    default_scheduler: str
    prompt_token_limit: int
    has_preview_autoencoder: bool
    file_bytes: int = 0
    """Size of its weights on disk, as memory_bytes in memory; 0 where the server does not know (yet)."""
    memory_bytes: int = 0
    vaes: tuple[str, ...] = ()
    """Names of other VAEs that it can decode with."""
    features: tuple[str, ...] = ()
    """Which of the options of `Client.paint` it takes, such as "inpaint" or "loras"."""
    schedulers: tuple[str, ...] = ()
    """Names of the schedulers that fit it."""
    precision: str = ""
    """What it is computed with, such as "float32" or "int8_weight_only"; empty while it is not loaded."""
    artifact: str = ""
    """Id of the artifact that it runs from; empty where torch runs the model itself."""


Model: TypeAlias = OcrModel | DiffusionModel


class LoadStage(enum.StrEnum):
    """The stages of loading a model, in order."""

    UNKNOWN = "unknown"
    WAITING = "waiting"
    READING_WEIGHTS = "reading_weights"
    WARMING = "warming"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Where loading stands; `evicted_models` were unloaded to make room."""

    sequence: int
    stage: LoadStage
    evicted_models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The model serves. Always the last event of a load."""

    sequence: int
    model: Model
    elapsed_ms: int
    """0 where the server does not say."""


LoadEvent: TypeAlias = LoadProgress | LoadResult


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A scheduler by the short name that `Client.paint` takes, and the diffusers class behind it."""

    name: str
    diffusers_class: str
    description: str
    aliases: tuple[str, ...] = ()
    """Other names that `Client.paint` takes for it, such as "DPM++ 2M Karras"."""
    sampling_options: tuple[str, ...] = ()
    """Fields of `Sampling` that it takes."""


class AdapterKind(enum.StrEnum):
    """The kinds of things that are laid on a model."""

    UNKNOWN = "unknown"
    LORA = "lora"
    TEXTUAL_INVERSION = "textual_inversion"
    IMAGE_PROMPT = "image_prompt"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Something to lay on `models`; on any, where they are empty, and a call finds out whether it fits."""

    name: str
    kind: AdapterKind
    models: tuple[str, ...]
    file_bytes: int


class ControlKind(enum.StrEnum):
    """The kinds of models that steer."""

    UNKNOWN = "unknown"
    CONTROLNET = "controlnet"
    T2I_ADAPTER = "t2i_adapter"


@dataclass(frozen=True, slots=True)
class ControlModel:
    """Steers `models`; any, where they are empty. `preprocessor` makes the conditions that it was trained on."""

    name: str
    kind: ControlKind
    models: tuple[str, ...]
    preprocessor: str


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """A step that makes a condition of a picture."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Controls:
    """What can steer a picture's composition."""

    models: tuple[ControlModel, ...]
    preprocessors: tuple[Preprocessor, ...]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server behind a gateway, and what that gateway has sent it since it started."""

    address: str
    state: EndpointState
    in_flight_count: int
    call_count: int
    unavailable_count: int
    last_error: str
    device: str = ""
    """What it reports of itself, as all below: for people, such as "NVIDIA L4"; empty if it reports nothing."""
    memory_bytes: int = 0
    compute_capability: str = ""
    """Of NVIDIA devices, such as "8.9"."""
    runtimes: tuple[str, ...] = ()
    loaded_models: tuple[str, ...] = ()
    """As NAME@VERSION."""
    version: str = ""
    """Of Inkwell, that it runs."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Endpoints that run one service ("ocr" or "diffusion") on one kind of hardware."""

    name: str
    service: str
    hardware: str
    targets: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]
