"""Settings of the gateway, from environment variables INKWELL_GATEWAY_*."""

from pathlib import Path

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from services.gateway.kubernetes import ACCOUNT
from services.kit.settings import MIB, OFF, ServiceSettings, is_loopback


class Settings(ServiceSettings):
    """How the gateway runs; which pools there are is in the file that `config` names."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_GATEWAY_", extra="forbid", frozen=True)

    port: int = Field(50050, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    config: Path = Field(
        Path("gateway.yaml"), description="the file that names the pools, or a folder whose *.yaml files do"
    )
    reload_interval_s: float = Field(
        2.0, ge=0, description="seconds between looks at that file for changes; 0 never looks again"
    )
    access: str = Field(
        "",
        validate_default=True,
        description="file that says who may call what, which is read anew when it changes; 'off' lets everybody call."
        " Empty: everybody, on a loopback address or with a certificate of ca.crt only",
    )
    limits_redis: SecretStr = Field(
        SecretStr(""),
        description="redis://host:6379/0 or rediss://…, where gateways count rate limits together; empty: each its own",
    )
    services_tls: str = Field(
        "",
        description="folder with the certificate to call services with, and ca.crt which vouches for theirs; 'off' for"
        " plain text. Empty: the folder that TLS names, if there is one",
    )
    services_tls_name: str = Field(
        "", description="name that every service's certificate has; empty: the host name in the pool's target"
    )
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
    retry_ratio: float = Field(0.2, ge=0, le=1, description="retries that each call of a pool earns it")
    retry_reserve: int = Field(100, ge=1, description="most retries that a pool saves up; it begins with so many")
    retry_refill_per_s: float = Field(1.0, ge=0, description="retries that a pool is given each second besides")
    queue_limit: int = Field(256, ge=1, description="calls that may wait for a place in one pool")
    queue_wait_s: float = Field(30.0, gt=0, description="longest wait for a place that a call is let in with")
    overload_ends_s: float = Field(
        1.0, ge=0, description="seconds without a waiting call after which a pool's overload is over"
    )
    priority_ageing_s: float = Field(5.0, gt=0, description="seconds of waiting that lift a call by one priority")
    limit_initial: int = Field(64, ge=1, description="calls that an endpoint is given at a time until more is known")
    limit_least: int = Field(2, ge=1, description="fewest calls that the learned limit gives an endpoint at a time")
    limit_most: int = Field(1000, ge=1, description="most calls that an endpoint is given at a time")
    stream_limit: int = Field(1000, ge=1, description="calls with a stream of requests that one pool may have")
    caller_limit: int = Field(1000, ge=1, description="calls that one caller may have, waiting ones included")
    wake_wait_s: float = Field(
        60.0, ge=0, description="seconds that a call waits for the first endpoint of a pool that has none; 0 refuses it"
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

    @property
    def access_path(self) -> Path | None:
        """The access file, None to let everybody call."""
        return None if self.access in ("", OFF) else Path(self.access)

    @property
    def services_folder(self) -> Path | None:
        """The folder of certificates to call services with, None for plain text."""
        if self.services_tls == OFF:
            return None
        return Path(self.services_tls) if self.services_tls else self.tls_folder

    @field_validator("access")
    @classmethod
    def _somebody_in_particular(cls, value: str, info: ValidationInfo) -> str:
        host = info.data.get("host", "")
        certificates = info.data.get("tls", "") not in ("", OFF) and info.data.get("tls_clients")
        if value == "" and not certificates and not is_loopback(host):
            raise ValueError(
                f"the address {host} is not loopback, so who may call has to be said: set INKWELL_GATEWAY_ACCESS to an"
                " access file (docs/access.md), or have callers show certificates (TLS, TLS_CLIENTS), or set"
                " INKWELL_GATEWAY_ACCESS=off to let everybody call"
            )
        return value

    @field_validator("services_tls")
    @classmethod
    def _folder_or_off(cls, value: str) -> str:
        if value not in ("", OFF) and not Path(value).is_dir():
            raise ValueError(f"{value!r} is neither a folder nor {OFF!r}")
        return value

    @model_validator(mode="after")
    def _ordered_limits(self) -> "Settings":
        if not self.limit_least <= self.limit_initial <= self.limit_most:
            raise ValueError(
                f"limit_least {self.limit_least}, limit_initial {self.limit_initial} and limit_most {self.limit_most}"
                " have to be in this order, least to most"
            )
        return self
