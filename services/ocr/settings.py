"""Every knob of the OCR service. Each is an environment variable: INKWELL_OCR_ and the name in upper case."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.kit.settings import MIB, ServiceSettings
from services.ocr.domain import BEAM_WIDTH_MOST

_EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "handwriting-tiny"


class Settings(ServiceSettings):
    """The OCR service's settings; an unknown or unfit value stops the service at its start with a message."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_OCR_", extra="forbid", frozen=True)

    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one")

    models: dict[str, str] = Field(
        default_factory=lambda: {"handwriting-tiny": str(_EMBEDDED)},
        min_length=1,
        description="JSON object, name to source: a TrOCR folder, or a hub id with its revision as owner/name@revision",
    )
    default_model: str = Field("", description="model that an empty name means; empty takes the first of `models`")
    allow_pickled_weights: bool = Field(
        False, description="load weights that are not safetensors; a pickle can run code, so only from trusted sources"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type of the weights; auto is float32 on cpu and the best 16-bit type elsewhere"
    )
    device: str = Field(
        "auto", description='torch device, such as "cpu" or "cuda:1"; auto takes the best there is', min_length=1
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 takes one a core")

    max_rows: int = Field(64, ge=BEAM_WIDTH_MOST, description="decoder rows (a beam is one) that share a step, a model")
    max_jobs: int = Field(32, ge=1, description="calls the engine is given at a time; the rest waits in the queue")
    encoder_batch_size: int = Field(8, ge=1, description="images encoded together at most")
    encoder_step_ms: float = Field(
        250.0,
        gt=0,
        description="aim for the length of one encoder step in ms: on slow hardware fewer images are encoded together,"
        " so that rows under way and cancellations do not wait",
    )
    default_max_new_token_count: int = Field(
        128, ge=1, description="tokens to decode at most where neither the call nor the model's own files say"
    )
    max_new_token_limit: int = Field(
        512, ge=1, description="tokens a call may ask for at most; the model may allow less"
    )

    max_image_bytes: int = Field(20 * MIB, ge=1, description="largest encoded image, bytes")
    max_image_pixels: int = Field(50_000_000, ge=1, description="most pixels (width x height) of an image")
    min_image_side: int = Field(4, ge=1, description="smallest width and height, pixels")
    decode_threads: int = Field(2, ge=1, description="threads that decode images in the front process")
    batch_in_flight: int = Field(
        16, ge=1, description="items of one BatchRecognize stream under way at a time; the stream is not read further"
    )
    batch_item_limit: int = Field(1_000_000, ge=1, description="items of one BatchRecognize stream")

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for name, source in self.models.items():
            if not name or not source:
                raise ValueError("models: a name and a source must not be empty")
        if self.default_model and self.default_model not in self.models:
            raise ValueError(f"default_model: {self.default_model!r} is not one of models: {', '.join(self.models)}")
        return self

    @property
    def default_model_name(self) -> str:
        """The model that an empty name in a request means."""
        return self.default_model or next(iter(self.models))
