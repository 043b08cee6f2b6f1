"""A backend in a process of its own, for tests that kill it: `python -m tests.support.backend_process`.

Prints its port, then "entered" for each call that arrives, which it never answers.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from tests.support.backend import Backend


class BackendProcess:
    """The other end, in the test."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.address = f"127.0.0.1:{port}"

    async def entered(self) -> None:
        """Return when a call has arrived there."""
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"entered\n"

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


@contextlib.asynccontextmanager
async def backend_process() -> AsyncIterator[BackendProcess]:
    """Start one; it is killed at the end at the latest."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.backend_process", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield BackendProcess(process, int(await process.stdout.readline()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def _hold(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    print("entered", flush=True)
    await asyncio.Event().wait()
    yield b""


async def _main() -> None:
    backend = await Backend(_hold).start()
    print(backend.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
