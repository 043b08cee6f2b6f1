"""One process of a gateway that has several, and how it and its supervisor talk: messages over a socket pair.

The process tells what it is ready for and answers for its metrics. It is told what the whole gateway is ready for,
which is what it says to whoever asks its health: an answer must not depend on which process a probe happened to reach.
"""

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from services.gateway.endpoint import State
from services.gateway.pools import Fleet
from services.gateway.summed_metrics import Family, collect

log = structlog.get_logger(__name__)

_LENGTH = struct.Struct(">I")


class Serving(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: the process takes calls."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Health by name: to the supervisor this process's own, from the supervisor the whole gateway's."""

    names: dict[str, bool]


class Scrape(msgspec.Struct, tag=True, frozen=True):
    """From the supervisor: send your metrics."""

    number: int


class Scraped(msgspec.Struct, tag=True, frozen=True):
    """The answer to the Scrape of that number."""

    number: int
    families: list[Family]


Message = Serving | Ready | Scrape | Scraped


class Link:
    """One end of the socket between supervisor and process: messages behind their length in bytes, in JSON."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.json.Decoder(Message)

    @classmethod
    async def over(cls, end: socket.socket) -> "Link":
        """Take the socket over; `close` closes it."""
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: Message) -> None:
        """Send without waiting; nothing happens if the other end is gone."""
        data = msgspec.json.encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def received(self) -> AsyncIterator[Message]:
        """Every message until the other end is gone."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                yield self._decoder.decode(await self._reader.readexactly(length))

    def close(self) -> None:
        """Close the socket."""
        self._writer.close()


class Member:
    """The process's side of its supervisor.

    wait_settled_s: seconds that the process may take to hear from all endpoints before it takes its first call.
    """

    def __init__(self, end: socket.socket, *, wait_settled_s: float) -> None:
        self._end = end
        self._wait_settled_s = wait_settled_s
        self._link: Link | None = None
        self._own: dict[str, bool] = {}
        self._whole: dict[str, bool] = {}
        self._publish: Callable[[str, bool], None] = lambda _name, _serving: None

    @contextlib.asynccontextmanager
    async def connected(self, registry: CollectorRegistry, publish: Callable[[str, bool], None]) -> AsyncIterator[None]:
        """Talk to the supervisor inside this; `publish` is told what the health of each name is to be."""
        self._publish = publish
        self._link = link = await Link.over(self._end)
        following = asyncio.create_task(self._follow(link, registry), name="supervisor")
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            link.close()

    def tell(self, names: dict[str, bool]) -> None:
        """What this process is ready for, by name."""
        self._own = names
        self._say()
        if self._link is not None:
            self._link.send(Ready(names))

    async def serving(self, fleet: Fleet) -> None:
        """Tell that the process takes calls, once it knows of every endpoint whether it is there.

        Calls arrive from the first moment on, a share of all that the gateway gets. Without this wait a process that
        takes the place of one that died would refuse its share for as long as connecting takes.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_settled_s):
                while any(e.state is State.CONNECTING for pool in fleet.pools for e in pool.endpoints):
                    await fleet.wait_change()
        if self._link is not None:
            self._link.send(Serving())

    def _say(self) -> None:
        for name, ready in self._own.items():
            self._publish(name, self._whole.get(name, ready) or ready)

    async def _follow(self, link: Link, registry: CollectorRegistry) -> None:
        async for message in link.received():
            if isinstance(message, Ready):
                self._whole = message.names
                self._say()
            elif isinstance(message, Scrape):
                link.send(Scraped(message.number, collect(registry)))
        log.warning("the supervisor is gone; draining")
        os.kill(os.getpid(), signal.SIGTERM)
