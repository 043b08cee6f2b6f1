"""How far a document has come, and how long it will take from here."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Progress is told when a page begins or ends, and in between at most this often, seconds.
TOLD_EVERY_S = 0.5


@dataclass
class Course:
    """Counts over the whole document."""

    page_count: int
    clock: Callable[[], float] = time.monotonic
    pages_started: int = 0
    pages_done: int = 0
    lines_found: int = 0
    lines_done: int = 0
    _began: float = field(init=False)
    _told: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def elapsed_ms(self) -> float:
        """Since the document began."""
        return (self.clock() - self._began) * 1000

    @property
    def share_done(self) -> float:
        """0 to 1, pages not yet seen counted with as many lines as those seen."""
        if self.lines_found == 0 or self.pages_started == 0:
            return self.pages_done / self.page_count
        expected = self.lines_found * self.page_count / self.pages_started
        return self.lines_done / expected

    @property
    def eta_ms(self) -> int:
        """Milliseconds until the end at the pace so far; 0 while nothing is done, and at the end."""
        share = min(1.0, self.share_done)
        return round(self.elapsed_ms * (1 - share) / share) if share > 0 else 0

    def due(self) -> bool:
        """Whether it is time to tell again; answering yes counts as telling."""
        now = self.clock()
        if now - self._told < TOLD_EVERY_S:
            return False
        self._told = now
        return True
