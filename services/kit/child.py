"""Running one piece of heavy work in a process of its own, within limits, and leaving nothing of it behind.

The process is below a guard (`services.kit.child_guard`), which ends it and removes its files when it is cancelled, and
also when this process is killed.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
import structlog

from services.kit.child_side import Line, ToldFault, ToldProgress, ToldResponse
from services.kit.faults import Fault, FaultData, Kind

log = structlog.get_logger(__name__)

Progress = TypeVar("Progress", bound=msgspec.Struct)
Response = TypeVar("Response", bound=msgspec.Struct)

_line_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)

_LINE_BYTES_MOST = 16 << 20
_LAST_WORDS_BYTES = 8192
# How often memory is looked at. Reading the sizes of a few processes takes some milliseconds.
_LOOK_S = 0.2
_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a child may take.

    memory_bytes: resident size of all its processes together. time_s: from start to end. remedy: what the operator can
    do about either, as the end of a sentence: "raise INKWELL_COMPILER_MEMORY_BYTES".
    """

    memory_bytes: int
    time_s: float
    remedy: str


async def run_child(
    module: str,
    request: msgspec.Struct,
    *,
    progress: type[Progress],
    response: type[Response],
    on_progress: Callable[[Progress], Awaitable[None]],
    limits: Limits,
    partial: Sequence[Path] = (),
) -> Response:
    """`python -m module`, whose main is `services.kit.child_side.serve`, from request to response.

    partial: folders that are removed too unless it answers. Raises Fault: the work's own, or MEMORY_LIMIT, TIME_LIMIT,
    PROCESS_KILLED, PROCESS_FAILED. However this ends, cancelling included, the process, all processes that it started
    and its temporary folder are gone by then.
    """
    child = _Child(module, limits)
    answer: Line | None = None

    async def converse() -> None:
        nonlocal answer
        async with contextlib.aclosing(child.converse(msgspec.json.encode(request))) as lines:
            async for line in lines:
                if isinstance(line, ToldProgress):
                    await on_progress(msgspec.json.decode(line.value, type=progress))
                else:
                    answer = line

    await child.start(partial)
    watching = asyncio.create_task(child.watch_memory(), name="child-memory")
    try:
        async with asyncio.timeout(limits.time_s):
            await converse()
            code = await child.ended()
    except TimeoutError:
        raise Fault(_time_limit(limits)) from None
    finally:
        watching.cancel()
        await child.end()
    if code == 0 and isinstance(answer, ToldResponse):
        return msgspec.json.decode(answer.value, type=response)
    if isinstance(answer, ToldFault):
        raise Fault(answer.fault)
    if child.peak_bytes > limits.memory_bytes:
        raise Fault(_memory_limit(limits, child.peak_bytes))
    log.error("child process failed", module=module, code=code, last_words=child.last_words)
    raise Fault(_lost(module, code, limits))


class _Child:
    """The process, seen from here."""

    def __init__(self, module: str, limits: Limits) -> None:
        self.module = module
        self.limits = limits
        self.peak_bytes = 0
        self._errors = bytearray()
        self._life: int | None = None
        self._process: asyncio.subprocess.Process

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return self._errors.decode(errors="replace")

    async def start(self, partial: Sequence[Path]) -> None:
        folder = tempfile.mkdtemp(prefix="inkwell-child-")
        watched, self._life = os.pipe()
        order = {"module": self.module, "life": watched, "folder": folder, "partial": [str(each) for each in partial]}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.kit.child_guard",
                json.dumps(order),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "TMPDIR": folder},
                limit=_LINE_BYTES_MOST,
                pass_fds=[watched],
                start_new_session=True,  # a Ctrl-C meant for this process is not for the guard
            )
        except BaseException:
            self._let_go()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(watched)

    async def converse(self, request: bytes) -> AsyncGenerator[Line, None]:
        """Its lines, until it has closed its output."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        errors = asyncio.create_task(self._keep_last_words(), name="child-errors")
        try:
            # Should it have died at once, its output ends, and its exit code says why (uvloop raises RuntimeError).
            with contextlib.suppress(ConnectionError, RuntimeError):
                process.stdin.write(request)
                await process.stdin.drain()
            process.stdin.close()
            async for text in process.stdout:
                yield _line_decoder.decode(text)
            await errors
        finally:
            errors.cancel()

    async def ended(self) -> int:
        """Its exit code, negative for a signal, once it and its folder are gone."""
        return await self._process.wait()

    async def end(self) -> None:
        """End it now. Waits, whoever cancels this."""
        self._let_go()
        waiting = asyncio.ensure_future(self._process.wait())
        cancelled = False
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    async def watch_memory(self) -> None:
        """End it once it takes more than it may."""
        while self.peak_bytes <= self.limits.memory_bytes:
            await asyncio.sleep(_LOOK_S)
            self.peak_bytes = max(self.peak_bytes, await asyncio.to_thread(_resident_bytes, self._process.pid))
        self._let_go()

    def _let_go(self) -> None:
        # The guard sees this end of the pipe close.
        if self._life is not None:
            os.close(self._life)
            self._life = None

    async def _keep_last_words(self) -> None:
        assert self._process.stderr is not None
        while said := await self._process.stderr.read(_LAST_WORDS_BYTES):
            self._errors += said
            del self._errors[:-_LAST_WORDS_BYTES]


def _resident_bytes(guard: int) -> int:
    """Of all processes below the guard."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(guard).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _memory_limit(limits: Limits, peak_bytes: int) -> FaultData:
    return FaultData(
        Kind.TOO_LARGE,
        "MEMORY_LIMIT",
        f"the work took {peak_bytes // _MIB} MiB of memory, more than the limit of {limits.memory_bytes // _MIB} MiB;"
        f" {limits.remedy}",
        metadata={"limit_bytes": str(limits.memory_bytes), "peak_bytes": str(peak_bytes)},
    )


def _time_limit(limits: Limits) -> FaultData:
    return FaultData(
        Kind.DEADLINE,
        "TIME_LIMIT",
        f"the work was not done within the limit of {limits.time_s:g} s; {limits.remedy}",
        metadata={"limit_s": f"{limits.time_s:g}"},
    )


def _lost(module: str, code: int, limits: Limits) -> FaultData:
    if code >= 0:
        return FaultData(
            Kind.INTERNAL,
            "PROCESS_FAILED",
            f"the process of {module} ended with exit code {code} and no answer; the service's log has its last words",
            metadata={"exit_code": str(code)},
        )
    name = signal.Signals(-code).name
    # Nobody here sends SIGKILL but for a limit, and that is told otherwise.
    why = f": the machine ran out of memory, or somebody killed it; {limits.remedy}" if name == "SIGKILL" else ""
    return FaultData(
        Kind.INTERNAL,
        "PROCESS_KILLED",
        f"the process of {module} was ended by {name}{why}",
        metadata={"signal": name},
    )
