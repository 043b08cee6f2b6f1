"""A server in a process of its own, for tests that kill it, end it, and start it anew at the same port."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from services.local import free_ports


@dataclass
class ServiceProcess:
    """`python -m module`, with settings from environment variables `prefix` + name.

    port: a free one is chosen if it is 0. It listens on loopback; what it logs goes to the test's standard error.
    """

    module: str
    prefix: str
    settings: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    port: int = 0
    process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        if self.port == 0:
            (self.port,) = free_ports(1)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Returns once it listens; raises AssertionError when it ends before."""
        chosen = {"log_level": "error", **self.settings, "port": str(self.port)}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            *self.arguments,
            env={**os.environ, **{f"{self.prefix}{name.upper()}": value for name, value in chosen.items()}},
        )
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100)]
        options += [("grpc.initial_reconnect_backoff_ms", 50)]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            listening = asyncio.create_task(channel.channel_ready())
            ended = asyncio.create_task(self.process.wait())
            await asyncio.wait({listening, ended}, return_when=asyncio.FIRST_COMPLETED)
            assert listening.done(), f"{self.module} ended with {self.process.returncode} before it listened"
            ended.cancel()

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal and wait; answers the exit code."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.process.wait()


@contextlib.asynccontextmanager
async def started(*processes: ServiceProcess) -> AsyncIterator[None]:
    """Start them together; they are killed at the end at the latest."""
    try:
        await asyncio.gather(*(process.start() for process in processes))
        yield
    finally:
        for process in processes:
            if process.process is not None:
                await process.end()
