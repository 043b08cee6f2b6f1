"""The configuration file: which pools there are. docs/gateway.md describes it for those who write it."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from services.gateway.methods import FULL_NAMES
from services.gateway.preference import LABELS

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]"
_TARGET = re.compile(rf"(?P<dns>dns:///)?(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})")


class ConfigError(ValueError):
    """The file cannot be used. The message names the file and every wrong key, with what would be accepted."""


class Target(BaseModel):
    """Where endpoints are found."""

    model_config = ConfigDict(frozen=True)

    text: str  # as written
    host: str  # without brackets
    port: int
    resolve: bool  # look the name up again and again, and use each address on its own

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_target(text: str) -> Target:
    """Read "dns:///host:port" or "host:port"; raises ValueError that says what is accepted."""
    match = _TARGET.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a target; accepted: 'host:port', '[ipv6]:port' or 'dns:///host:port'")
    port = int(match["port"])
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} of {text!r} is not between 1 and 65535")
    return Target(text=text, host=match["host"].strip("[]"), port=port, resolve=match["dns"] is not None)


def _known_service(name: str) -> str:
    if name not in FULL_NAMES:
        raise ValueError(f"{name!r} is not a service; accepted: {', '.join(FULL_NAMES)}")
    return name


def _known_label(label: str) -> str:
    if label not in LABELS:
        raise ValueError(f"{label!r} is not a hardware label; accepted: {', '.join(LABELS)}")
    return label


def _known_target(text: str) -> str:
    parse_target(text)
    return text


def _all_different(values: list[str]) -> list[str]:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is listed more than once")
    return values


ServiceName = Annotated[str, pydantic.AfterValidator(_known_service)]
HardwareLabel = Annotated[str, pydantic.AfterValidator(_known_label)]
TargetText = Annotated[str, pydantic.AfterValidator(_known_target)]


class PoolConfig(BaseModel):
    """Endpoints that run one service on one kind of hardware."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    service: ServiceName
    hardware: HardwareLabel
    targets: Annotated[list[TargetText], Field(min_length=1), pydantic.AfterValidator(_all_different)]


class GatewayConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pools: list[PoolConfig] = Field(min_length=1)
    # For callers without a preference, per service; labels not listed come after, in the order of the pools.
    defaults: dict[
        ServiceName, Annotated[list[HardwareLabel], Field(min_length=1), pydantic.AfterValidator(_all_different)]
    ] = {}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path) -> GatewayConfig:
    """Read and check the file; raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse(text, name=str(path))


def parse(text: str, *, name: str = "config") -> GatewayConfig:
    """Check the text of a configuration file; `name` stands for it in errors. Raises ConfigError."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping with the key 'pools'")
    try:
        config = GatewayConfig.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"{_path(e['loc'])}: {_what(e)}" for e in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(lines)) from None
    _check_across_pools(config, name)
    return config


def _check_across_pools(config: GatewayConfig, name: str) -> None:
    names: dict[str, int] = {}
    owners: dict[tuple[str, str, int], str] = {}
    for i, pool in enumerate(config.pools):
        if pool.name in names:
            raise ConfigError(f"{name}: pools[{i}].name: {pool.name!r} is already pools[{names[pool.name]}]")
        names[pool.name] = i
        for j, text in enumerate(pool.targets):
            target = parse_target(text)
            owner = owners.setdefault((pool.service, target.host, target.port), pool.name)
            if owner != pool.name:
                # Two pools would each see only their own half of that endpoint's load.
                raise ConfigError(f"{name}: pools[{i}].targets[{j}]: {text!r} is already in pool {owner!r}")


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _what(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such key"
    if error["type"] == "missing":
        return "this key is required"
    message: str = error["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:] if error["type"] != "value_error" else message
