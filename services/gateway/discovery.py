"""From a pool's targets to the addresses that are behind them now."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from services.gateway.config import Target, join_address

# Answers the IP addresses behind a host name; raises OSError.
Resolver = Callable[[str], Awaitable[list[str]]]


async def resolve_host(host: str) -> list[str]:
    """Ask the system's resolver. Raises OSError (socket.gaierror) if there is no answer."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(info[4][0]) for info in found})


async def addresses(target: Target, resolver: Resolver) -> list[str]:
    """host:port of every endpoint behind the target. Raises OSError if its name cannot be looked up now."""
    if not target.resolve:
        return [target.address]
    return [join_address(ip, target.port) for ip in await resolver(target.host)]
