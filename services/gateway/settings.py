"""Settings of the gateway, from environment variables INKWELL_GATEWAY_*."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.gateway.kubernetes import ACCOUNT
from services.kit.settings import MIB, ServiceSettings


class Settings(ServiceSettings):
    """How the gateway runs; which pools there are is in the file that `config` names."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_GATEWAY_", extra="forbid", frozen=True)

    port: int = Field(50050, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    config: Path = Field(Path("gateway.yaml"), description="the file that names the pools")
    max_message_bytes: int = Field(64 * MIB, ge=1024, description="largest request message")
    processes: int = Field(
        1, ge=0, le=128, description="processes that share the port, each on a core; 0 for as many as there are cores"
    )
    deadline_margin_ms: int = Field(
        10, ge=0, le=10_000, description="a caller's deadline is passed on earlier by this, so that our answer arrives"
    )
    max_attempts: int = Field(4, ge=1, le=20, description="times one call is tried, the first included")
    retry_wait_s: float = Field(
        30.0, ge=0, description="seconds a call that failed may wait for an endpoint to come back before it is retried"
    )
    replay_bytes: int = Field(
        8 * MIB, ge=0, description="request-stream bytes kept for a retry; a stream that sent more is not retried"
    )
    resolve_interval_s: float = Field(2.0, gt=0, description="seconds between look-ups of a dns:/// target")
    load_interval_s: float = Field(1.0, ge=0.1, le=60, description="seconds between an endpoint's reports of its load")
    load_stale_s: float = Field(
        5.0, gt=0, description="seconds without a report after which an endpoint that sent some counts as saturated"
    )
    slow_start_s: float = Field(
        10.0,
        ge=0,
        description="seconds over which an endpoint that became ready is given more calls; 0 for all at once",
    )
    eject_after: int = Field(
        5, ge=0, description="failures in a row for which an endpoint that is ready is left out; 0 never leaves one out"
    )
    eject_s: float = Field(
        5.0, gt=0, description="seconds it is left out the first time; twice as long each time after, up to a minute"
    )
    kubernetes_url: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="API server for k8s:/// targets; empty: that of this pod's cluster",
    )
    kubernetes_account: Path = Field(
        ACCOUNT, description="folder with the service account's token and, if the server's signer is not public, ca.crt"
    )
    connect_timeout_s: float = Field(3.0, gt=0, description="seconds that connecting to an endpoint may take")
    keepalive_time_s: float = Field(
        20.0, ge=10, description="seconds of silence on a connection after which it is probed"
    )
    keepalive_timeout_s: float = Field(5.0, gt=0, description="seconds a probe may take until the connection is dead")
