"""The compiler service for tests: in this process, or in one of its own that can be killed; with small models."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import inkwell
from services.compiler.__main__ import build
from services.compiler.settings import Settings
from services.local import free_ports
from tests.support import tiny_trocr


def settings(root: Path, **options: Any) -> Settings:
    """Everything that it writes goes below `root`."""
    chosen = {
        "port": 0,
        "artifact_store": str(root / "artifacts"),
        "operations_database": str(root / "operations.sqlite"),
        "drain_grace_s": 10.0,
        **options,
    }
    return Settings(**chosen)


def tiny_model(folder: Path) -> str:
    """A TrOCR folder that compiles in seconds: random weights, short texts."""
    return str(tiny_trocr.save(folder, tiny_trocr.build(), max_new_tokens=12))


@contextlib.asynccontextmanager
async def serving(chosen: Settings) -> AsyncIterator[inkwell.AsyncClient]:
    """The service in this process, and a client of it."""
    server = build(chosen)
    await server.start()
    try:
        async with inkwell.AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop()


class CompilerProcess:
    """The service in a process of its own, which can be killed and started anew at the same port."""

    def __init__(self, root: Path, models: str) -> None:
        self.port = free_ports(1)[0]
        self._environment = {
            "INKWELL_COMPILER_PORT": str(self.port),
            "INKWELL_COMPILER_ARTIFACT_STORE": str(root / "artifacts"),
            "INKWELL_COMPILER_OPERATIONS_DATABASE": str(root / "operations.sqlite"),
            "INKWELL_COMPILER_OPERATIONS_ATTEMPTS": "1000",
            "INKWELL_COMPILER_MODELS": models,
            # Where the guards of its children keep their folders.
            "TMPDIR": str(root / "temporary"),
        }
        (root / "temporary").mkdir(exist_ok=True)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Returns once it listens; raises AssertionError with its output when it does not."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.compiler",
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
        )
        assert self._process.stderr is not None
        said = b""
        async for line in self._process.stderr:
            said += line
            if b'"listening"' in line:
                self._rest = asyncio.create_task(self._process.stderr.read())  # lest the pipe fill up
                return
        raise AssertionError(said.decode())

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal; answers the exit code."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return await self._process.wait()
