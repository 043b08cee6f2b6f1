"""Who calls: by the certificate of the connection, or as a gateway says that was let in by its certificate.

On a connection in plain text nobody is known. What a gateway says is then believed, for want of anything better: a
service that must not be lied to needs TLS and its setting `callers`.
"""

import contextvars
from collections.abc import Awaitable, Callable, Collection

import grpc

from services.kit import faults
from services.kit.call import received

CALLER_KEY = "inkwell-caller"
"""Metadata with which a gateway names its caller to a service. Gateways refuse calls that bring it."""

UNKNOWN = ""
CERTIFICATE_PREFIX = "certificate/"
NAME_CHARACTERS_MOST = 256

current_caller: contextvars.ContextVar[str] = contextvars.ContextVar("inkwell_caller", default=UNKNOWN)


def certificate_name(context: grpc.aio.ServicerContext) -> str:
    """The name in the caller's verified certificate: its first subject alternative name, else its common name.

    Empty without a certificate, or when the name is not printable ASCII of at most 256 characters.
    """
    properties = context.auth_context()
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        for value in properties.get(key, ()):
            name: str = value.decode("utf-8", "replace")
            if is_name(name):
                return name
    return UNKNOWN


def is_name(text: str) -> bool:
    """Whether it can be a caller's name: it has to fit into metadata, into logs, and into a policy file."""
    return 0 < len(text) <= NAME_CHARACTERS_MOST and text.isascii() and text.isprintable() and text.strip() == text


def guard(*, encrypted: bool, allowed: Collection[str]) -> Callable[[str, grpc.aio.ServicerContext], Awaitable[None]]:
    """A service's guard, for `Boundary`: see `caller_at_service`."""

    async def admit(_method: str, context: grpc.aio.ServicerContext) -> None:
        current_caller.set(caller_at_service(context, encrypted=encrypted, allowed=allowed))

    return admit


def current(_context: grpc.aio.ServicerContext) -> str:
    """Who makes the call that is being handled: whose operations it sees. Empty if nobody is known."""
    return current_caller.get()


def caller_at_service(context: grpc.aio.ServicerContext, *, encrypted: bool, allowed: Collection[str]) -> str:
    """The name of who calls a service, empty if nobody is known; raises Fault for one that may not call.

    encrypted: whether callers had to show a certificate. allowed: names of certificates that may call, and may say for
    whom; empty for all that the authority signed, none of which may speak for others.
    """
    said = [value for key, value in received(context) if key == CALLER_KEY]
    if len(said) > 1 or (said and not (isinstance(said[0], str) and is_name(said[0]))):
        raise faults.invalid_field(f"metadata.{CALLER_KEY}", "expected one name in printable ASCII")
    if not encrypted:
        return str(said[0]) if said else UNKNOWN
    name = certificate_name(context)
    if allowed:
        if name not in allowed:
            raise faults.permission_denied(
                "CALLER_NOT_ALLOWED", f"this service takes calls from {', '.join(sorted(allowed))} only, not {name!r}"
            )
        return str(said[0]) if said else CERTIFICATE_PREFIX + name
    if said:
        raise faults.permission_denied(
            "CALLER_NOT_TRUSTED",
            f"{name!r} may not speak for others: the service's setting CALLERS has to name the gateway's certificate",
        )
    return CERTIFICATE_PREFIX + name if name else UNKNOWN
