"""Finding the lines of pages, one page after another on a thread of its own.

A page takes as long as some twenty lines. In the engine's steps it would hold up every line that is being read; beside
them it only takes its share of the cores.
"""

import queue
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from services.kit import faults
from services.kit.engine_api import Accepted, Failed, Finished, JobEvent, Raw
from services.kit.faults import Fault
from services.ocr.domain import LayoutJob
from services.ocr.engine.layout import MAX_LINES, Detector, find_lines

_encoder = msgspec.msgpack.Encoder()


class Pages:
    """The pages that wait or are being looked at. All methods are called on one thread.

    `detector` is None where documents are not read; `why_not` says why then. `wake` is called on another thread
    whenever `busy` may have become true.
    """

    def __init__(self, detector: Detector | None, why_not: str = "", *, max_lines: int = MAX_LINES) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._detector = detector
        self._max_lines = max_lines
        self._why_not = why_not
        self._waiting: deque[tuple[str, LayoutJob]] = deque()
        self._looked_at: str | None = None  # the job on the thread; None too when it was dropped there
        self._occupied = False
        self._accepted: list[JobEvent] = []
        self._done: queue.SimpleQueue[tuple[str, JobEvent]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pages")

    @property
    def busy(self) -> bool:
        """Whether `take_events` has something to tell."""
        return bool(self._accepted) or not self._done.empty()

    def submit(self, job_id: str, job: LayoutJob) -> None:
        """Take in a page; raises Fault (FAILED_PRECONDITION) where documents are not read."""
        if self._detector is None:
            raise faults.failed_precondition("DOCUMENTS_NOT_READ", f"this service reads no documents: {self._why_not}")
        self._waiting.append((job_id, job))
        self._begin()

    def cancel(self, job_id: str) -> bool:
        """Drop a page; False if it is not here. One that is being looked at is, to its end, and nobody is told."""
        if job_id == self._looked_at:
            self._looked_at = None
            return True
        for waiting in self._waiting:
            if waiting[0] == job_id:
                self._waiting.remove(waiting)
                return True
        return False

    def take_events(self) -> list[JobEvent]:
        """What came of the pages since the last time."""
        events, self._accepted = self._accepted, []
        while not self._done.empty():
            job_id, event = self._done.get()
            if job_id == self._looked_at:
                events.append(event)
            self._looked_at, self._occupied = None, False
            self._begin()
        return events

    def _begin(self) -> None:
        if self._occupied or not self._waiting:
            return
        job_id, job = self._waiting.popleft()
        self._looked_at, self._occupied = job_id, True
        self._accepted.append(Accepted(job_id))
        self._thread.submit(self._look, job_id, job)

    def _look(self, job_id: str, job: LayoutJob) -> None:
        """On the thread."""
        self._done.put((job_id, self._outcome(job_id, job)))
        self.wake()

    def _outcome(self, job_id: str, job: LayoutJob) -> JobEvent:
        assert self._detector is not None
        try:
            layout = find_lines(job.page, self._detector, rotation=job.rotation, max_lines=self._max_lines)
        except Fault as fault:
            return Failed(job_id, fault.data)
        except MemoryError:
            return Failed(job_id, _no_memory(job).data)
        except Exception:  # noqa: BLE001 - a defect met on one page must not end the thread of all
            traceback.print_exc()
            return Failed(job_id, faults.internal("finding the page's lines failed; the service's log has more").data)
        return Finished(job_id, Raw(_encoder.encode(layout)))


def _no_memory(job: LayoutJob) -> Fault:
    return faults.overloaded(
        "NO_MEMORY",
        f"the machine had no memory left to look at a page of {job.page.width} x {job.page.height} pixels",
        retry_after_ms=5000,
    )
