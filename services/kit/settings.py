"""Settings that every service has. Each comes from an environment variable: prefix of the service + upper-case name."""

import ipaddress
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20
OFF = "off"
# In a folder of certificates; the names of a Kubernetes secret of type kubernetes.io/tls.
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


class ServiceSettings(BaseSettings):
    """Base of each service's own `Settings`, which adds its prefix (INKWELL_OCR_ …), port and knobs."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 in a container")
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    tls: str = Field(
        "",
        validate_default=True,
        description="folder with tls.crt, tls.key and ca.crt, which are read anew when they change; 'off' for plain"
        " text. Empty: plain text, on a loopback address only",
    )
    tls_clients: bool = Field(
        True, validate_default=True, description="with a folder: callers have to show a certificate that ca.crt signed"
    )
    callers: tuple[str, ...] = Field(
        (),
        description="names of the certificates that may call and may say for whom, such as the gateway's, as a JSON"
        " list; empty: every certificate that ca.crt signed",
    )
    metrics_host: str = Field("127.0.0.1", description="address of the Prometheus page")
    metrics_port: int = Field(
        -1, ge=-1, le=65535, description="port of the Prometheus page; 0 takes a free one, -1 none"
    )
    metrics_tenants: int = Field(
        100, ge=0, le=250, description="callers that have series of their own; the others are counted together"
    )
    trace_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="OTLP collector that traces are sent to by gRPC, such as http://127.0.0.1:4317; empty: no traces",
    )
    trace_ratio: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of calls that are recorded, of those whose caller does not say whether they are to be",
    )
    health_port: int = Field(
        -1,
        ge=-1,
        le=65535,
        description="port that answers about health, and nothing else, in plain text: for probes that cannot speak the"
        " TLS of the other; 0 takes a free one, -1 none",
    )
    max_message_bytes: int = Field(32 * MIB, ge=1024, description="largest request message")
    client_keepalive_time_s: float = Field(
        30.0, ge=1, description="seconds of silence on a client's connection after which it is probed"
    )
    client_keepalive_timeout_s: float = Field(
        20.0, gt=0, description="seconds that such a probe may take; then the connection is dead, its calls cancelled"
    )
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

    @property
    def tls_folder(self) -> Path | None:
        """The folder of certificates, None for plain text."""
        return None if self.tls in ("", OFF) else Path(self.tls)

    @field_validator("tls")
    @classmethod
    def _encrypted_beyond_loopback(cls, value: str, info: ValidationInfo) -> str:
        host = info.data.get("host", "")
        if value == "" and not is_loopback(host):
            name = f"{cls.model_config.get('env_prefix', '')}TLS"
            raise ValueError(
                f"the address {host} is not loopback, so who may connect has to be said: set {name} to a folder with"
                f" {CERTIFICATE}, {KEY} and {AUTHORITY}, or {name}={OFF} to serve anybody in plain text"
            )
        if value not in ("", OFF) and not Path(value).is_dir():
            raise ValueError(f"{value!r} is neither a folder nor {OFF!r}")
        return value

    @field_validator("tls_clients")
    @classmethod
    def _someone_vouches(cls, value: bool, info: ValidationInfo) -> bool:
        folder = info.data.get("tls", "")
        if value and folder not in ("", OFF) and not (Path(folder) / AUTHORITY).is_file():
            name = f"{cls.model_config.get('env_prefix', '')}TLS_CLIENTS"
            raise ValueError(
                f"{folder} has no {AUTHORITY} to check callers' certificates with: add it, or set {name}=false to"
                " take calls from anybody, encrypted"
            )
        return value

    @field_validator("callers")
    @classmethod
    def _callers_are_known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and not (info.data.get("tls_clients") and info.data.get("tls", "") not in ("", OFF)):
            raise ValueError("names of certificates are known only with a TLS folder, and with TLS_CLIENTS not false")
        return value


class RepeatSettings(ServiceSettings):
    """Settings of services whose calls may be repeated; inherited in place of ServiceSettings."""

    repeat_keep_s: float = Field(
        120.0, ge=0, description="seconds for which the answer to a call with an id is kept for its repetition; 0: none"
    )
    repeat_count_limit: int = Field(
        1000, ge=1, description="calls with an id that are kept in mind, those under way included"
    )
    repeat_bytes_limit: int = Field(
        64 * MIB, ge=0, description="bytes of answers that are kept for repetition; an answer that is larger is not"
    )
