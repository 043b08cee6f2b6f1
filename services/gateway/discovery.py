"""From a pool's targets to the addresses that are behind them now."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable

import structlog

from services.gateway.config import Target, join_address

log = structlog.get_logger(__name__)

# Answers the IP addresses behind a host name; raises OSError.
Resolver = Callable[[str], Awaitable[list[str]]]

# A resolver may try several name servers for 5 s each; what was found before serves meanwhile.
_LOOK_UP_WITHIN_S = 5.0
# Between two look-ups, however often they are asked for.
_SOONEST_S = 0.25


async def resolve_host(host: str) -> list[str]:
    """Ask the system's resolver. Raises OSError (socket.gaierror) if there is no answer."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(info[4][0]) for info in found})


async def addresses(target: Target, resolver: Resolver) -> list[str]:
    """host:port of every endpoint behind the target. Raises OSError if its name cannot be looked up now."""
    if not target.resolve:
        return [target.address]
    async with asyncio.timeout(_LOOK_UP_WITHIN_S):  # TimeoutError is an OSError
        return [join_address(ip, target.port) for ip in await resolver(target.host)]


class NameWatch:
    """Looks one name up again and again, every so many seconds and whenever `soon` is called.

    found: called with the addresses after each look-up that answered. A name server that does not answer changes
    nothing: an empty pool would be the worse guess.
    """

    def __init__(
        self, target: Target, resolver: Resolver, *, interval_s: float, found: Callable[[list[str]], None]
    ) -> None:
        self._target = target
        self._resolver = resolver
        self._interval_s = interval_s
        self._found = found
        self._soon = asyncio.Event()

    def soon(self) -> None:
        """Look at once, or nearly: an endpoint that is gone may have a successor."""
        self._soon.set()

    async def look(self) -> None:
        """Look once."""
        try:
            there = await addresses(self._target, self._resolver)
        except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
            what = str(error) or f"no answer within {_LOOK_UP_WITHIN_S:.0f} s"
            log.warning("cannot resolve", target=self._target.text, error=what)
        else:
            self._found(there)

    async def run(self) -> None:
        """Look until cancelled; the first time after one interval."""
        while True:
            try:
                # Spread, so that gateways do not ask all at once.
                async with asyncio.timeout(self._interval_s * random.uniform(0.8, 1.0)):
                    await self._soon.wait()
            except TimeoutError:
                pass
            self._soon.clear()
            await self.look()
            await asyncio.sleep(min(_SOONEST_S, self._interval_s))
