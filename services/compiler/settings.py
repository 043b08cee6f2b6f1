"""Every knob of the compiler service: environment variable INKWELL_COMPILER_ + the name in upper case."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.kit.operations import OperationsSettings
from services.kit.settings import MIB

_MODELS = Path(__file__).resolve().parents[2] / "models"
# Under the names that the services know them by.
_EMBEDDED = {"handwriting-tiny": "handwriting-tiny", "emoji-tiny": "emoji-tiny", "edges": "emoji-tiny-edges"}


class Settings(OperationsSettings):
    """Settings of the compiler service; an unknown or unfit value stops the service at its start with a message."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_COMPILER_", extra="forbid", frozen=True)

    port: int = Field(50053, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    max_message_bytes: int = Field(1 * MIB, ge=1024, description="largest request message")

    models: dict[str, str] = Field(
        default_factory=lambda: {name: str(_MODELS / folder) for name, folder in _EMBEDDED.items()},
        min_length=1,
        description="JSON object, name to source: a TrOCR, diffusers or ControlNet folder, or a hub id with its"
        " revision as owner/name@revision. The same names as in the services that run the models",
    )
    model_folder: str = Field("", description="folder whose subfolders are models too, each under its own name")
    allow_pickled_weights: bool = Field(
        False, description="load weights that are not safetensors; a pickle can run code, so only from trusted sources"
    )
    artifact_store: str = Field(
        "",
        description="where artifacts are kept: a folder, or s3://bucket/prefix (AWS_* variables say how); the same for"
        " all services. Empty for ~/.local/share/inkwell/artifacts",
    )
    memory_limit_bytes: int = Field(
        0,
        ge=0,
        description="memory that one compile may take, bytes; 0 takes what the machine has, shared among"
        " operations_concurrency",
    )
    time_limit_s: float = Field(7200.0, gt=0, description="seconds that one compile may take")
    download_chunk_bytes: int = Field(
        256 * 1024, ge=1024, le=MIB, description="bytes of one message of DownloadArtifact"
    )

    collect_every_s: float = Field(
        86400.0, ge=0, description="seconds between two garbage collections of the store; 0 for none"
    )
    collect_keep_newest: int = Field(
        2, ge=1, description="artifacts of one model, target and precision that a collection leaves, newest first"
    )
    collect_older_than_s: float = Field(
        30 * 86400.0, ge=0, description="artifacts younger than this are left by a collection, seconds"
    )
