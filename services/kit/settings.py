"""Settings that every service has. Each comes from an environment variable: prefix of the service + upper-case name."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20


class ServiceSettings(BaseSettings):
    """Base of each service's own `Settings`, which adds its prefix (INKWELL_OCR_ …), port and knobs."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 in a container")
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus page")
    metrics_port: int = Field(
        -1, ge=-1, le=65535, description="port of the Prometheus page; 0 takes a free one, -1 none"
    )
    max_message_bytes: int = Field(32 * MIB, ge=1024, description="largest request message")
    queue_limit: int = Field(256, ge=1, description="admitted calls that may wait for the engine")
    queue_bytes_limit: int = Field(
        512 * MIB, ge=1024, description="bytes of decoded input that may wait for the engine"
    )
    drain_delay_s: float = Field(
        0.0, ge=0, description="seconds between NOT_SERVING and refusing calls, for load balancers to notice"
    )
    drain_grace_s: float = Field(30.0, ge=0, description="seconds that admitted calls may take to finish on SIGTERM")
    engine_stall_s: float = Field(300.0, gt=0, description="seconds one engine step may take before it counts as stuck")
    engine_start_s: float = Field(600.0, gt=0, description="seconds the engine may take to load its models")
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="least severe line that is logged"
    )
