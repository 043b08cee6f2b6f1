"""Which metadata crosses the gateway: everything but what belongs to one connection or to gRPC itself."""

from collections.abc import Iterable

from services.kit import faults, orca

Pair = tuple[str, str | bytes]
Metadata = tuple[Pair, ...]

POOL_KEY = "inkwell-pool"
ENDPOINT_KEY = "inkwell-endpoint"
HARDWARE_KEY = "inkwell-hardware"  # in a reply: the label of the pool that served
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# Said anew on each side of the gateway.
_HOP = frozenset(
    ("te", "user-agent", "content-type", "host", "connection", "keep-alive", "proxy-connection", "transfer-encoding")
    + ("upgrade", "content-length", "accept-encoding")
)
_RESERVED = ("grpc-", ":")
# Reserved, yet part of a status that belongs to the caller.
_OF_STATUS = frozenset((DETAILS_KEY, PUSHBACK_KEY))
_KEPT_HERE = _HOP | {orca.LOAD_KEY, orca.ORCA_KEY}
_SERVED = frozenset((POOL_KEY, ENDPOINT_KEY, HARDWARE_KEY))


def to_upstream(metadata: Iterable[Pair]) -> Metadata:
    """A caller's metadata as it is passed on. Raises Fault for a value that HTTP/2 cannot carry."""
    passed: list[Pair] = []
    for pair in metadata:
        key, value = pair
        if key.startswith(_RESERVED) or key in _HOP:
            continue
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise faults.invalid_field(
                f"metadata.{key[:80]}", "it has characters other than printable ASCII; use a key that ends in -bin"
            )
        passed.append((key, value))
    return tuple(passed)


def to_caller(metadata: Iterable[Pair] | None, served: Metadata) -> Metadata:
    """An endpoint's initial metadata as it is passed on, and who served the call."""
    if not metadata:
        return served
    kept = [p for p in metadata if not (p[0].startswith(_RESERVED) or p[0] in _HOP or p[0] in _SERVED)]
    return (*kept, *served)


def trailers(metadata: Iterable[Pair] | None) -> Metadata:
    """An endpoint's trailing metadata as it is passed on, details of its status included.

    Its load is for the gateway: a caller that balances by such reports would take it for the gateway's own.
    """
    if not metadata:
        return ()
    return tuple(p for p in metadata if p[0] in _OF_STATUS or not (p[0].startswith(_RESERVED) or p[0] in _KEPT_HERE))
