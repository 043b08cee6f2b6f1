"""Every knob of the diffusion service: environment variable INKWELL_DIFFUSION_ + the name in upper case."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.diffusion.domain import Runtime
from services.kit.settings import MIB, RepeatSettings

# The rest is for activations and everything else on the machine.
MEMORY_SHARE = 0.7

_MODELS = Path(__file__).resolve().parents[2] / "models"


class ModelSettings(BaseModel):
    """One row of the model table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="diffusers folder, one .safetensors file of a whole checkpoint, or a hub model pinned as"
        " owner/name@revision"
    )
    config: str | None = Field(
        None,
        description="for a .safetensors file: the diffusers folder, or hub model pinned as owner/name@revision, whose"
        " configurations and tokenizers it goes with",
    )
    default_step_count: int = Field(20, ge=1, description="denoising steps when the request names none")
    default_guidance_scale: float = Field(7.5, ge=0, description="guidance scale when the request names none")
    preview_autoencoder: str | None = Field(
        None, description="AutoencoderTiny folder for previews; without it `preview_autoencoder/` inside the source"
    )
    vaes: dict[str, str] = Field(
        default_factory=dict, description="other VAEs by the name that a request gives: AutoencoderKL folders"
    )


class AdapterSettings(BaseModel):
    """A LoRA or textual inversion embedding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="its .safetensors file, or the folder that holds one")
    models: list[str] = Field(default_factory=list, description="models it is for; empty when a call may find out")


class ImagePromptSettings(AdapterSettings):
    """An IP-Adapter: its file, and the encoder of the pictures that it is given."""

    image_encoder: str = Field(description="folder of the CLIP vision model that it was trained with")


class ControlSettings(AdapterSettings):
    """A ControlNet or T2I-Adapter; its config.json says which."""

    source: str = Field(description="its diffusers folder")
    preprocessor: str = Field("", description="name of the preprocessor that makes what it was trained on")


def _embedded_models() -> dict[str, ModelSettings]:
    source = str(_MODELS / "emoji-tiny")
    return {"emoji-tiny": ModelSettings(source=source, default_step_count=20, default_guidance_scale=1.0)}


def _embedded_loras() -> dict[str, AdapterSettings]:
    return {"fluent": AdapterSettings(source=str(_MODELS / "emoji-tiny-fluent"), models=["emoji-tiny"])}


def _embedded_controls() -> dict[str, ControlSettings]:
    source = str(_MODELS / "emoji-tiny-edges")
    return {"edges": ControlSettings(source=source, models=["emoji-tiny"], preprocessor="canny")}


class Settings(RepeatSettings):
    """Settings of the diffusion service."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_DIFFUSION_", extra="forbid", frozen=True)

    port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    # Room for pictures and conditions; a gateway lets as much through.
    max_message_bytes: int = Field(64 * MIB, ge=1024, description="largest request message, in bytes")

    models: dict[str, ModelSettings] = Field(
        default_factory=_embedded_models, description="the model table, as JSON: name to row"
    )
    default_model: str = Field("", description="model that an empty name in a request means; empty for the first row")
    model_folder: str = Field(
        "",
        description="folder whose subfolders in diffusers' layout are models too, each under its own name; looked at"
        " again whenever models are listed or one is asked for. Empty: none",
    )
    load_at_start: list[str] | None = Field(
        None,
        description="JSON list of the models that are loaded before the service is ready, unset for all of `models`;"
        " the others are loaded when a call or LoadModel names them",
    )
    memory_limit_bytes: int = Field(
        0,
        ge=0,
        description="memory that the weights of all loaded models may take, bytes; the least recently used leave when"
        f" it is short. 0 takes {MEMORY_SHARE:.0%} of what is free on the device at the start",
    )

    loras: dict[str, AdapterSettings] = Field(
        default_factory=_embedded_loras, description="LoRAs, as JSON: the name that a request gives to row"
    )
    lora_folder: str = Field(
        "",
        description="folder whose .safetensors files are LoRAs too, each under its name without ending; looked at"
        " again when one is asked for or they are listed. Empty: none",
    )
    embeddings: dict[str, AdapterSettings] = Field(
        default_factory=dict, description="textual inversion embeddings, as JSON: the word of the prompt to row"
    )
    embedding_folder: str = Field("", description="as lora_folder, for embeddings")
    image_prompt_adapters: dict[str, ImagePromptSettings] = Field(
        default_factory=dict, description="IP-Adapters, as JSON: name to row"
    )
    controls: dict[str, ControlSettings] = Field(
        default_factory=_embedded_controls, description="ControlNets and T2I-Adapters, as JSON: name to row"
    )
    preprocessor_models: dict[Literal["depth"], str] = Field(
        default_factory=dict,
        description='models of the preprocessors that need one, as JSON: {"depth": folder of a transformers depth'
        " estimation model}; the others need none",
    )
    adapters_kept: int = Field(
        8, ge=1, description="LoRAs, embeddings, IP-Adapters and controls that stay in memory; least recently used out"
    )
    wildcard_folder: str = Field(
        "", description="folder of the .txt files that __name__ in a prompt takes a line of. Empty: none"
    )
    styles_file: str = Field("", description="CSV file of styles: name, prompt, negative_prompt. Empty: none")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type of the weights; auto: float32 on CPU, else what the hardware does best"
    )
    runtime: Literal["auto"] | Runtime = Field(
        "auto",
        description="what computes the models: torch, or onnxruntime, openvino, tensorrt or triton from an artifact"
        " that the compiler made of the model; auto takes the artifact that `inkwell use` chose, else the fastest"
        " that was measured to be faster than torch on such hardware, else torch",
    )
    artifact_store: str = Field(
        "",
        description="where the compiler keeps artifacts: a folder, or s3://bucket/prefix; empty for"
        " ~/.local/share/inkwell/artifacts",
    )
    triton_address: str = Field(
        "", description="host:port of a Triton server's gRPC, grpcs://host:port with TLS, for the runtime triton"
    )
    triton_timeout_s: float = Field(60.0, gt=0, description="seconds that one call of a graph on Triton may take")
    triton_shared_memory: bool = Field(
        False,
        description="pass tensors to Triton through /dev/shm; the server has to run on this host, as the same user",
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of one model evaluation; 0 leaves it to torch. Bytes repeat per thread count"
    )
    torch_compile: Literal["off", "on"] = Field(
        "off",
        description="on: what torch runs is tuned for speed over repeatable last bits: the denoiser by torch.compile,"
        " which compiles at the first picture of each size and needs a C++ compiler on the machine, CUDA"
        " graphs, kernels chosen by trial and TF32 on GPUs. Artifacts are left as they are",
    )
    max_concurrent_calls: int = Field(4, ge=1, description="calls painted at the same time, step by step in turn")

    max_step_count: int = Field(200, ge=1, description="most denoising steps of a call")
    max_side_px: int = Field(2048, ge=8, description="longest side of a picture, in pixels")
    max_pixels: int = Field(2048 * 2048, ge=64, description="most pixels of one picture")
    max_image_count: int = Field(8, ge=1, description="most pictures of one batch")
    max_batch_count: int = Field(8, ge=1, description="most batches of one call")
    max_controls: int = Field(4, ge=0, description="most controls of one call")
    max_image_prompts: int = Field(4, ge=0, description="most image prompts of one call")
    max_loras: int = Field(8, ge=0, description="most LoRAs of one call")
    max_image_bytes: int = Field(20 * MIB, ge=1, description="largest encoded picture in a request, bytes")
    max_image_pixels: int = Field(50_000_000, ge=1, description="most pixels of a picture in a request")
    decode_threads: int = Field(2, ge=1, description="threads that decode pictures in the front process")
    max_prompt_bytes: int = Field(8192, ge=1, description="longest prompt or negative prompt, in UTF-8 bytes")
    max_guidance_scale: float = Field(30.0, ge=1, description="largest guidance scale")

    default_quality: int = Field(95, ge=1, le=100, description="JPEG and WebP quality when the request names none")
    preview_quality: int = Field(80, ge=1, le=100, description="JPEG quality of the previews")
    preview_max_side_px: int = Field(512, ge=8, description="longer previews are scaled down to this side, in pixels")

    @model_validator(mode="after")
    def _table_is_sound(self) -> Self:
        if not self.models:
            raise ValueError("models: the table is empty; name at least one model")
        if self.default_model and self.default_model not in self.models:
            raise ValueError(f"default_model: {self.default_model!r} is not in models ({', '.join(self.models)})")
        for name, row in self.models.items():
            if not name.strip() or len(name) > 80:
                raise ValueError(f"models: {name!r} is not a usable name; take 1 to 80 characters")
            if row.default_step_count > self.max_step_count:
                raise ValueError(f"models.{name}.default_step_count: above max_step_count ({self.max_step_count})")
            if row.default_guidance_scale > self.max_guidance_scale:
                raise ValueError(
                    f"models.{name}.default_guidance_scale: above max_guidance_scale ({self.max_guidance_scale:g})"
                )
        return self

    @property
    def names_at_start(self) -> list[str]:
        """The models loaded before the service is ready, the default one first: later ones may find no room."""
        names = list(self.models) if self.load_at_start is None else self.load_at_start
        return sorted(dict.fromkeys(names), key=lambda name: name != self.model_of_empty_name)

    @property
    def model_of_empty_name(self) -> str:
        """The model that a request without a name means."""
        return self.default_model or next(iter(self.models))
