"""The configuration file: which pools there are. docs/gateway.md describes it for those who write it."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from services.gateway.methods import FULL_NAMES, METHODS
from services.gateway.preference import LABELS
from services.gateway.selectors import Pattern, Requirements

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]"
_TARGET = re.compile(rf"(?P<dns>dns:///)?(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})")
# Names as Kubernetes has them: DNS labels; a port by its number or by its name in the Service.
_K8S_NAME = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_K8S_TARGET = re.compile(
    rf"k8s:///(?P<namespace>{_K8S_NAME})/(?P<service>{_K8S_NAME}):(?:(?P<port>[0-9]{{1,5}})|(?P<port_name>{_K8S_NAME}))"
)


_Model = TypeVar("_Model", bound=BaseModel)
# Between the files of a folder: what YAML has between documents.
_BETWEEN = b"\n---\n"


class ConfigError(ValueError):
    """The file cannot be used. The message names the file and every wrong key, with what would be accepted."""


class Target(BaseModel):
    """Where endpoints are found."""

    model_config = ConfigDict(frozen=True)

    text: str  # as written
    host: str  # without brackets; of Kubernetes the Service
    port: int  # 0 if it goes by its name
    resolve: bool = False  # look the name up again and again, and use each address on its own
    namespace: str = ""  # of Kubernetes, whose EndpointSlices say where the endpoints are
    port_name: str = ""

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_target(text: str) -> Target:
    """Read "host:port", "dns:///host:port" or "k8s:///namespace/service:port"; raises ValueError that says so."""
    k8s = _K8S_TARGET.fullmatch(text)
    match = k8s or _TARGET.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a target; accepted: 'host:port', '[ipv6]:port', 'dns:///host:port' or"
            " 'k8s:///namespace/service:port'"
        )
    port = int(match["port"] or 0)
    if match["port"] and not 1 <= port <= 65535:
        raise ValueError(f"port {port} of {text!r} is not between 1 and 65535")
    if k8s is not None:
        return Target(
            text=text, host=k8s["service"], port=port, namespace=k8s["namespace"], port_name=k8s["port_name"] or ""
        )
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
    select: Requirements | None = None  # of what is found there, only endpoints that report all of this


class RouteConfig(BaseModel):
    """What holds for some calls of one service. The first route that a call falls under decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: ServiceName
    # Empty: every method, and every model or none.
    methods: tuple[str, ...] = ()
    models: tuple[Pattern, ...] = ()
    # Hardware labels in this order before the service's defaults; or these labels in this order and nothing else.
    prefer: Annotated[list[HardwareLabel], pydantic.AfterValidator(_all_different)] = []
    only: Annotated[list[HardwareLabel], pydantic.AfterValidator(_all_different)] = []
    needs: Requirements | None = None  # what an endpoint must report to be given such a call
    weights: dict[str, Annotated[int, Field(ge=0, le=1_000_000)]] = {}  # shares of the pools of one hardware label

    @pydantic.model_validator(mode="after")
    def _one_order(self) -> "RouteConfig":
        if self.prefer and self.only:
            raise ValueError("it has both 'prefer' and 'only'; accepted: one of them")
        known = {path.rpartition("/")[2] for path, method in METHODS.items() if method.service == self.service}
        for name in self.methods:
            if name not in known:
                raise ValueError(f"{name!r} is not a method of {self.service}; accepted: {', '.join(sorted(known))}")
        return self


class GatewayConfig(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pools: list[PoolConfig] = Field(min_length=1)
    # For callers without a preference, per service; labels not listed come after, in the order of the pools.
    defaults: dict[
        ServiceName, Annotated[list[HardwareLabel], Field(min_length=1), pydantic.AfterValidator(_all_different)]
    ] = {}
    routes: list[RouteConfig] = []


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
    return parse(decode(read(path), path), name=str(path))


def read(path: Path) -> bytes:
    """The file as it is, or of a folder its *.yaml files in the order of their names; raises ConfigError."""
    try:
        if path.is_dir():
            return _BETWEEN.join(file.read_bytes() for file in sorted(path.glob("*.yaml")))
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def decode(data: bytes, path: Path) -> str:
    """The text in the file's contents; raises ConfigError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def parse(text: str, *, name: str = "config") -> GatewayConfig:
    """Check the text of a configuration; `name` stands for it in errors. Raises ConfigError.

    Of several YAML documents, such as the files of a folder, the lists are joined in their order.
    """
    config = checked(GatewayConfig, text, name=name, joined=True)
    _check_across_pools(config, name)
    return config


def checked(model: type[_Model], text: str, *, name: str, joined: bool = False) -> _Model:
    """The text of a YAML file as the model; `name` stands for the file in errors. Raises ConfigError.

    joined: there may be several documents, which are made one.
    """
    try:
        documents = list(yaml.load_all(text, Loader=_Loader)) if joined else [yaml.load(text, Loader=_Loader)]  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    # Only a comment in it, or nothing.
    documents = [document for document in documents if document is not None] or [None]
    data = documents[0]
    if not all(isinstance(document, dict) for document in documents):
        known = " and ".join(repr(key) for key, field in model.model_fields.items() if field.is_required())
        raise ConfigError(f"{name}: expected a mapping with the key {known}")
    for document in documents[1:]:
        data = _joined(data, document, name)
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        # What is wrong between keys has no path, and says it itself.
        lines = [": ".join(filter(None, (_path(e["loc"]), _what(e)))) for e in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(lines)) from None


def _joined(first: dict[Any, Any], second: dict[Any, Any], name: str) -> dict[Any, Any]:
    """Both documents: lists one after the other, mappings together. Raises ConfigError for what is said twice."""
    whole = dict(first)
    for key, value in second.items():
        known = whole.get(key)
        if key not in whole:
            whole[key] = value
        elif isinstance(known, list) and isinstance(value, list):
            whole[key] = known + value
        elif isinstance(known, dict) and isinstance(value, dict) and not known.keys() & value.keys():
            whole[key] = known | value
        else:
            raise ConfigError(f"{name}: {key}: said in two files, in ways that cannot be joined")
    return whole


def _check_across_pools(config: GatewayConfig, name: str) -> None:
    names: dict[str, int] = {}
    owners: dict[tuple[str, str, str, int, str], str] = {}
    for i, pool in enumerate(config.pools):
        if pool.name in names:
            raise ConfigError(f"{name}: pools[{i}].name: {pool.name!r} is already pools[{names[pool.name]}]")
        names[pool.name] = i
        for j, text in enumerate(pool.targets):
            target = parse_target(text)
            place = (pool.service, target.namespace, target.host, target.port, target.port_name)
            owner = owners.setdefault(place, pool.name)
            selected = pool.select is not None and config.pools[names[owner]].select is not None
            if owner != pool.name and not selected:
                # Two pools would each see only their own half of that endpoint's load.
                raise ConfigError(
                    f"{name}: pools[{i}].targets[{j}]: {text!r} is already in pool {owner!r}; pools may share a target"
                    " if each has 'select'"
                )
    for i, route in enumerate(config.routes):
        _check_weights(config, route, f"{name}: routes[{i}].weights")


def _check_weights(config: GatewayConfig, route: RouteConfig, where: str) -> None:
    pools = {pool.name: pool for pool in config.pools if pool.service == route.service}
    for pool_name in route.weights:
        if pool_name not in pools:
            raise ConfigError(f"{where}: {route.service} has no pool {pool_name!r}; accepted: {', '.join(pools)}")
    for label in dict.fromkeys(pools[pool_name].hardware for pool_name in route.weights):
        beside = [pool_name for pool_name, pool in pools.items() if pool.hardware == label]
        missing = [pool_name for pool_name in beside if pool_name not in route.weights]
        if missing:
            raise ConfigError(f"{where}: {missing[0]!r} is missing; of a hardware label, here {label}, name every pool")
        if not any(route.weights[pool_name] for pool_name in beside):
            raise ConfigError(f"{where}: all pools of {label} have weight 0; at least one must have more")


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
