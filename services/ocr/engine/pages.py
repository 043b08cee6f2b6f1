"""Finding the lines of pages, a page a step."""

from collections import deque

import msgspec

from services.kit import faults
from services.kit.engine_api import Accepted, Failed, Finished, JobEvent, Raw
from services.kit.faults import Fault
from services.ocr.domain import LayoutJob
from services.ocr.engine.layout import MAX_LINES, Detector, find_lines

_encoder = msgspec.msgpack.Encoder()


class Pages:
    """The pages that wait for it. `detector` is None where documents are not read; `why_not` says why then."""

    def __init__(self, detector: Detector | None, why_not: str = "", *, max_lines: int = MAX_LINES) -> None:
        self._detector = detector
        self._max_lines = max_lines
        self._why_not = why_not
        self._waiting: deque[tuple[str, LayoutJob]] = deque()
        self._accepted: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting)

    def submit(self, job_id: str, job: LayoutJob) -> None:
        """Take in a page; raises Fault (FAILED_PRECONDITION) where documents are not read."""
        if self._detector is None:
            raise faults.failed_precondition("DOCUMENTS_NOT_READ", f"this service reads no documents: {self._why_not}")
        self._waiting.append((job_id, job))

    def cancel(self, job_id: str) -> bool:
        """Drop a page; False if it is not here."""
        for waiting in self._waiting:
            if waiting[0] == job_id:
                self._waiting.remove(waiting)
                self._accepted.discard(job_id)
                return True
        return False

    def step(self) -> list[JobEvent]:
        """Accept the next page, or find the lines of one that is."""
        assert self._detector is not None
        job_id, job = self._waiting[0]
        if job_id not in self._accepted:
            self._accepted.add(job_id)
            return [Accepted(job_id)]
        self._waiting.popleft()
        self._accepted.remove(job_id)
        try:
            layout = find_lines(job.page, self._detector, rotation=job.rotation, max_lines=self._max_lines)
        except Fault as fault:
            return [Failed(job_id, fault.data)]
        return [Finished(job_id, Raw(_encoder.encode(layout)))]
