"""Every knob of the diffusion service: environment variable INKWELL_DIFFUSION_ + the name in upper case."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.kit.settings import ServiceSettings

_PROJECT = Path(__file__).resolve().parents[2]


class ModelSettings(BaseModel):
    """One row of the model table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="diffusers folder, or a hub model pinned as owner/name@revision")
    default_step_count: int = Field(20, ge=1, description="denoising steps when the request names none")
    default_guidance_scale: float = Field(7.5, ge=0, description="guidance scale when the request names none")
    preview_autoencoder: str | None = Field(
        None, description="AutoencoderTiny folder for previews; without it `preview_autoencoder/` inside the source"
    )


def _embedded_models() -> dict[str, ModelSettings]:
    source = str(_PROJECT / "models" / "emoji-tiny")
    return {"emoji-tiny": ModelSettings(source=source, default_step_count=20, default_guidance_scale=1.0)}


class Settings(ServiceSettings):
    """Settings of the diffusion service."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_DIFFUSION_", extra="forbid", frozen=True)

    port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    max_message_bytes: int = Field(1 << 20, ge=1024, description="largest request message, in bytes")

    models: dict[str, ModelSettings] = Field(
        default_factory=_embedded_models, description="the model table, as JSON: name to row"
    )
    default_model: str = Field("", description="model that an empty name in a request means; empty for the first row")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type of the weights; auto: float32 on CPU, else what the hardware does best"
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of one model evaluation; 0 leaves it to torch. Bytes repeat per thread count"
    )
    max_concurrent_calls: int = Field(4, ge=1, description="calls painted at the same time, step by step in turn")

    max_step_count: int = Field(200, ge=1, description="most denoising steps of a call")
    max_side_px: int = Field(2048, ge=8, description="longest side of a picture, in pixels")
    max_pixels: int = Field(2048 * 2048, ge=64, description="most pixels of one picture")
    max_image_count: int = Field(8, ge=1, description="most pictures of one call")
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
    def model_of_empty_name(self) -> str:
        """The model that a request without a name means."""
        return self.default_model or next(iter(self.models))
