"""How a client proves who it is, and how it knows the server: TLS, certificates and tokens."""

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from inkwell.errors import invalid

AccessToken = str | Callable[[], str]
"""A JWT or an API key; or what answers one, which is asked before every call, for tokens that are renewed."""

AUTHORIZATION = "authorization"


def tls(
    *, ca: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials for `Client(credentials=…)`, from files in PEM.

    ca: who signed the server's certificate; None for the roots that gRPC ships. certificate and key: of this client,
    for servers that know their callers by certificates. Raises InvalidRequest, and OSError for a file that cannot be
    read. The files are read now: make a new client when they were renewed.
    """
    if (certificate is None) != (key is None):
        raise invalid("certificate", "a certificate and its key belong together; give both or neither")
    read = [None if path is None else Path(path).read_bytes() for path in (ca, key, certificate)]
    return grpc.ssl_channel_credentials(*read)


def authorized(
    target: str, credentials: Any | None, token: AccessToken | None
) -> tuple[Any | None, tuple[tuple[str, str], ...]]:
    """The credentials with the token in them, and metadata for every call where they cannot hold it.

    Raises InvalidRequest for a token that would travel in plain text to another machine.
    """
    if token is None:
        return credentials, ()
    if credentials is not None:
        return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_plugin(token))), ()
    if not _is_loopback(target):
        raise invalid(
            "token", f"it would be sent to {target} in plain text; accepted: with credentials, or to localhost"
        )
    if not isinstance(token, str):
        raise invalid("token", "without credentials it has to be text, not what answers one")
    return None, ((AUTHORIZATION, _bearer(token)),)


def _plugin(token: AccessToken) -> Callable[[Any, Any], None]:
    fixed = _bearer(token) if isinstance(token, str) else None

    def add(_context: Any, done: Any) -> None:
        try:
            value = fixed if fixed is not None else _bearer(token())  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - of the caller's own function; gRPC ends the call with it
            done((), error)
        else:
            done(((AUTHORIZATION, value),), None)

    return add


def _bearer(token: str) -> str:
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        raise invalid("token", "expected a JWT or an API key: printable ASCII without blanks")  # not shown
    return f"Bearer {token}"


def _is_loopback(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    host = host.rpartition(":")[0].strip("[]") if ":" in host else host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
