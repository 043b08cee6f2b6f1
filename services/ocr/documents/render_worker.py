"""The render process: `python -m services.ocr.documents.render_worker`, one a document, started by `rendering`.

It holds the file, opens it with native decoders that a hostile file might crash, hang or blow up, and gives away pages
one at a time when asked. Its memory and the processor time of each request are limited; it can write no file. It ends
when the front closes the pipe, or dies.
"""

import os
import resource
import signal
import sys
from typing import BinaryIO

from services.kit.faults import Fault, internal, too_large
from services.ocr.documents import frames, kinds, sources
from services.ocr.documents.frames import Limits, Open, Opened, Refused, Render, Reply, Request, WritePdf, Written


def main() -> None:
    # Ctrl-C reaches the whole process group; the front decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The replies' pipe is kept to ourselves: whatever a library prints goes to standard error.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the front is gone."""
    opened = frames.read_request(requests)
    if not isinstance(opened, Open):
        return
    _limit(opened.limits)
    worker = _Worker(opened)
    request: Request | None = opened
    while request is not None:
        _allow_time(opened.limits.step_s)
        replies.write(frames.encode(worker.answer(request)))
        replies.flush()
        request = frames.read_request(requests)


class _Worker:
    def __init__(self, opened: Open) -> None:
        self._limits = opened.limits
        self._source: sources.Source | None = None

    def answer(self, request: Request) -> Reply:
        try:
            return self._answer(request)
        except Fault as fault:
            return Refused(fault.data)
        except MemoryError:
            limit = self._limits.memory_bytes
            return Refused(
                too_large(
                    kinds.FIELD,
                    "DOCUMENT_TOO_LARGE",
                    f"it takes more than the {limit} bytes of memory that a document may have; send fewer pages",
                    limit_bytes=limit,
                ).data
            )

    def _answer(self, request: Request) -> Reply:
        if isinstance(request, Open):
            self._source = sources.open_source(request.content, request.limits)
            return Opened(self._source.page_count)
        if self._source is None:
            raise internal("a page was asked for before the file was opened")
        match request:
            case Render(page, dpi):
                return self._source.render(page, dpi)
            case WritePdf(pages, whole):
                return Written(self._source.searchable_pdf(pages, whole=whole))


def _limit(limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))


def _allow_time(seconds: float) -> None:
    """Let the process use so much processor time from now on; SIGXCPU ends it after that."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


if __name__ == "__main__":
    main()
