"""The front's side of a document's render process: start it, ask it for pages, and end it in any case."""

import asyncio
import contextlib
import os
import signal
import sys
from types import TracebackType
from typing import NoReturn

import msgspec
import structlog

from services.kit import faults, tracing
from services.kit.faults import Fault
from services.ocr.documents import frames, kinds
from services.ocr.documents.frames import (
    HEADER,
    Limits,
    Open,
    Opened,
    Refused,
    Render,
    Rendered,
    Reply,
    Request,
    TextPage,
    WritePdf,
    Written,
)

log = structlog.get_logger(__name__)

# In the trace of the call.
_SPANS = {Open: "open", Render: "render", WritePdf: "export"}

# What Python needs to find itself and its libraries. Nothing else: the process works on files of strangers.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL")


class Rendering:
    """One document's render process. Use as an async context manager; leaving it ends the process at once.

    Requests come one after another: `open` first. Each raises Fault: what the process itself says of the file, or
    DOCUMENT_DAMAGED when the file makes it crash, hang or run out of bounds. After such an end every request fails.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # The process limits its own processor time; this is for one that does not even use any, or gets none.
        self.patience_s = 4 * limits.step_s
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "Rendering":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.ocr.documents.render_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # What the libraries say there may quote the document, which has no place in logs.
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            limit=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return self._process.pid if self._process else None

    async def open(self, content: bytes) -> int:
        """Hand over the file; answers its number of pages, at least 1."""
        reply = await self._ask(Open(content, self._limits), "the document")
        return reply.page_count if isinstance(reply, Opened) else _unforeseen(reply)

    async def render(self, page: int, dpi: int) -> Rendered:
        """The page's pixels; `page` from 1, `dpi` for PDF pages only."""
        reply = await self._ask(Render(page, dpi), f"page {page}")
        return reply if isinstance(reply, Rendered) else _unforeseen(reply)

    async def searchable_pdf(self, pages: tuple[TextPage, ...], *, whole: bool) -> bytes:
        """The pages, or the whole file, as PDF with text lying invisibly over the writing."""
        reply = await self._ask(WritePdf(pages, whole), "the searchable PDF")
        return reply.content if isinstance(reply, Written) else _unforeseen(reply)

    async def _ask(self, request: Request, what: str) -> Reply:
        try:
            with tracing.part(_SPANS[type(request)], {"inkwell.what": what}):
                async with asyncio.timeout(self.patience_s):
                    reply = await self._exchange(request)
        except TimeoutError:
            raise self._lost(what, "was stuck") from None
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            raise self._lost(what, "ended") from None
        if isinstance(reply, Refused):
            raise Fault(reply.fault)
        return reply

    async def _exchange(self, request: Request) -> Reply:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise faults.internal("a page was asked for before the render process was started")
        process.stdin.write(frames.encode(request))
        await process.stdin.drain()
        (length,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
        return frames.decode_reply(await process.stdout.readexactly(length))

    def _lost(self, what: str, how: str) -> Fault:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = process.returncode
            cause = signal.Signals(-code).name if code is not None and code < 0 else code
            log.warning("render process lost", how=how, cause=cause)
        return kinds.damaged(
            f"{what} cannot be processed: decoding it crashes, or takes more than {self._limits.step_s:g} s or"
            f" {self._limits.memory_bytes} bytes"
        )


def _unforeseen(reply: Reply) -> NoReturn:
    raise faults.internal(f"the render process answered with {type(reply).__name__}")
