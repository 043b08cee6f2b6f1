"""The access file: who is let in, and what they may do. docs/access.md describes it for those who write it."""

import functools
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import limits
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from inkwell.gateway.v1 import gateway_pb2
from services.gateway.config import checked, decode, read
from services.gateway.methods import FULL_NAMES, METHODS, SHARED_NAMES
from services.kit.settings import is_loopback

ANONYMOUS = "anonymous"
CERTIFICATE, KEY = "certificate", "key"  # first parts of callers' names, beside the names of token issuers

# Full protobuf names to how a rule calls them.
_OWN = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]
SHORT: dict[str, str] = {full: name for name, full in FULL_NAMES.items()}
SHORT |= dict.fromkeys(SHARED_NAMES, "operations")
SHORT |= {_OWN.full_name: "gateway"}
SHORT |= {"grpc.reflection.v1alpha.ServerReflection": "reflection", "grpc.channelz.v1.Channelz": "channelz"}
_METHODS = sorted(
    {f"{SHORT[full]}/{name}" for full, _, name in (path[1:].rpartition("/") for path in METHODS)}
    | {f"gateway/{method.name}" for method in _OWN.methods}
    | {"reflection/ServerReflectionInfo", "channelz/GetServers"}
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _pattern(text: str) -> str:
    if not (text and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(f"{text!r} is not a pattern; accepted: printable ASCII without blanks, '*' for any characters")
    return text


def _method(text: str) -> str:
    if not any(matches((text,), name) for name in _METHODS):
        raise ValueError(f"{text!r} is no method; accepted: '*', or as in {', '.join(_METHODS)}, '*' for any part")
    return text


def _limit(text: str) -> str:
    try:
        limits.parse(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a limit; accepted: as in '10/second' or '500 per 5 minutes'") from None
    return text


def _source(text: str) -> str:
    url = urlsplit(text)
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError(f"{text!r} would fetch keys in plain text; accepted: https://…, or a file")
    if url.scheme not in ("https", "http", ""):
        raise ValueError(f"{text!r} is neither https://… nor a file")
    return text


Pattern = Annotated[str, pydantic.AfterValidator(_pattern)]
MethodPattern = Annotated[str, pydantic.AfterValidator(_pattern), pydantic.AfterValidator(_method)]
RateLimit = Annotated[str, pydantic.AfterValidator(_limit)]
# Only those with a public key: a gateway that could sign tokens would be worth stealing from.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]


class TokenIssuer(_Part):
    """Who issues JWTs that are believed. A caller with such a token is called `name/claim`."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    issuer: str = Field(min_length=1)  # its claim `iss`
    audience: str = Field(min_length=1)  # has to be in `aud`
    keys: Annotated[str, pydantic.AfterValidator(_source)]  # JWKS, a file or a URL
    algorithms: tuple[Algorithm, ...] = Field(("RS256", "ES256", "Ed25519", "EdDSA"), min_length=1)
    claim: str = Field("sub", min_length=1)
    once: bool = False  # every token has a `jti` and is good for one call
    leeway_s: int = Field(30, ge=0, le=600)  # how far clocks may be apart

    @pydantic.field_validator("name")
    @classmethod
    def _not_taken(cls, value: str) -> str:
        if value in (CERTIFICATE, KEY, ANONYMOUS):
            raise ValueError(f"{value!r} is the name of another kind of caller; choose another")
        return value


class ApiKey(_Part):
    """A key and who has it, who is called `key/name`. Of the key itself only its SHA-256 is kept."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Rule(_Part):
    """What callers may do. The first rule that has the caller and the method decides."""

    callers: tuple[Pattern, ...] = Field(min_length=1)
    methods: tuple[MethodPattern, ...] = Field(min_length=1)
    models: tuple[Pattern, ...] = ()  # a call must name one of these; empty for any
    pools: tuple[Pattern, ...] = ()  # where it may be served; empty for any
    limits: tuple[RateLimit, ...] = ()  # of each caller by itself


class AccessFile(_Part):
    """The whole file."""

    rules: tuple[Rule, ...] = Field(min_length=1)
    tokens: tuple[TokenIssuer, ...] = ()
    keys: tuple[ApiKey, ...] = ()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "AccessFile":
        issuers = [issuer.name for issuer in self.tokens]
        for what, values in (
            ("tokens: name", issuers),
            ("tokens: issuer", [issuer.issuer for issuer in self.tokens]),
            ("keys: sha256", [key.sha256 for key in self.keys]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} {next(v for v in values if values.count(v) > 1)!r} is given twice")
        known = [ANONYMOUS, CERTIFICATE + "/", *(f"{KEY}/{key.name}" for key in self.keys), *(f"{i}/" for i in issuers)]
        for i, rule in enumerate(self.rules):
            for caller in rule.callers:
                fixed = caller.partition("*")[0]
                if not any(name.startswith(fixed) or (name.endswith("/") and fixed.startswith(name)) for name in known):
                    shown = ", ".join(name + "…" * name.endswith("/") for name in known)
                    raise ValueError(f"rules[{i}].callers: {caller!r} is nobody; accepted: '*', {shown}")
        return self


def load(path: Path) -> AccessFile:
    """Read and check the file; raises ConfigError. Files of keys that it names are relative to it."""
    return checked(AccessFile, decode(read(path), path), name=str(path))


def matches(patterns: tuple[str, ...], text: str) -> bool:
    """Whether one of the patterns, in which `*` stands for any characters, is the whole text."""
    return any(pattern in ("*", text) or _compiled(pattern).fullmatch(text) is not None for pattern in patterns)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")))


def method_name(path: str) -> str:
    """How a rule calls the method at a wire path: "/inkwell.ocr.v1.OcrService/Recognize" is "ocr/Recognize"."""
    full, _, name = path.removeprefix("/").rpartition("/")
    return f"{SHORT.get(full, full)}/{name}"
