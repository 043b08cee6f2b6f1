"""A grpc.aio server that listens again when a caller has broken it.

grpc.aio (1.85) reads the path of every call as UTF-8 in the loop that takes calls, and a path that is none ends that
loop, and with it the server: calls under way go on, but the port is closed for good. Whoever can connect can send one.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable

import grpc
import structlog

log = structlog.get_logger(__name__)

# grpc.aio tells nobody when its loop ends; it answers when it is asked.
_LOOK_EVERY_S = 0.1
# The port is free a moment after the loop has ended, in a thread of gRPC's own.
_BIND_AGAIN_S = 0.05


class Listening:
    """make: a server with everything that it serves, listening at the address of `port` (0: a free one), and its port.

    It is called again for each server that takes the place of a broken one; raises RuntimeError if the port is taken.
    """

    def __init__(self, make: Callable[[int], tuple[grpc.aio.Server, int]], port: int, *, grace_s: float) -> None:
        """grace_s: seconds that calls of a broken server may go on."""
        self._make = make
        self._grace_s = grace_s
        self._server, self.port = make(port)
        self._watching: asyncio.Task[None] | None = None
        self._broken: dict[grpc.aio.Server, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Take calls."""
        await self._server.start()
        self._watching = asyncio.create_task(self._watch(), name="listening")

    async def stop(self, grace_s: float | None) -> None:
        """As of grpc.aio.Server: calls may go on for so long, and are cancelled then; at once if it is None."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await asyncio.gather(*(server.stop(grace_s) for server in (self._server, *self._broken)))
        await asyncio.gather(*self._broken.values())

    async def _watch(self) -> None:
        while True:
            try:
                while await self._server.wait_for_termination(_LOOK_EVERY_S):
                    pass
                return  # it was stopped
            except Exception as error:  # noqa: BLE001 - whatever ended its loop
                log.error("a call broke the server; listening anew", error=ascii(str(error))[:200], port=self.port)
            broken = self._server
            ending = asyncio.create_task(broken.stop(self._grace_s), name="broken server")
            self._broken[broken] = ending
            ending.add_done_callback(functools.partial(self._ended, broken))
            await self._replace()

    def _ended(self, server: grpc.aio.Server, _ending: asyncio.Task[None]) -> None:
        del self._broken[server]

    async def _replace(self) -> None:
        while True:
            try:
                self._server, self.port = self._make(self.port)
                break
            except RuntimeError:
                await asyncio.sleep(_BIND_AGAIN_S)
        await self._server.start()
