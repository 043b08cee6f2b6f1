"""Whose step is next, where several have work: each gets the same time, however long its steps are."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from services.kit.engine_api import JobEvent


class Stepper(Protocol):
    """Something that works in steps."""

    def step(self) -> list[JobEvent]: ...


class Turns:
    """Chooses by the time that each has had since it became busy."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent: list[tuple[Stepper, float]] = []  # few, and not all of them can be hashed

    def step(self, busy: Sequence[Stepper]) -> list[JobEvent]:
        """Let one of them do a step; at least one must be given."""
        spent = [(part, seconds) for part, seconds in self._spent if any(part is other for other in busy)]
        # Who comes back from a rest has saved nothing up.
        least = min((seconds for _, seconds in spent), default=0.0)
        spent += [(part, least) for part in busy if not any(part is other for other, _ in spent)]
        spent.sort(key=lambda entry: entry[1])
        (chosen, seconds), *others = spent
        began = self._clock()
        events = chosen.step()
        # Behind those who had the same time, so that they come first.
        self._spent = [*others, (chosen, seconds + self._clock() - began)]
        return events
