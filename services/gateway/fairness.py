"""Whose turn it is: calls that wait, taken from their callers in turn and by priority.

Pure bookkeeping without threads or asyncio, and with a clock from outside, so that its rules can be tested as
properties. The turns are stride scheduling (Waldspurger and Weihl, 1995) with equal shares: each caller has a `pass`,
the one with the least is next, and each call it is given moves its pass on.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.kit.admission import Priority


@dataclass(eq=False, slots=True)
class Waiting:
    """One call in the queue."""

    number: int
    caller: str
    priority: Priority
    entered_at: float
    gone: bool = False


class _Caller:
    def __init__(self, name: str, at: float) -> None:
        self.name = name
        self.at = at  # its pass
        self.turn_at = -math.inf  # when it was last given a call, in seconds of the clock
        self.count = 0  # calls that wait
        self.waiting: tuple[dict[int, Waiting], ...] = tuple({} for _ in Priority)  # by priority, in order of arrival

    def add(self, waiting: Waiting) -> None:
        self.waiting[waiting.priority][waiting.number] = waiting
        self.count += 1

    def remove(self, waiting: Waiting) -> None:
        waiting.gone = True
        del self.waiting[waiting.priority][waiting.number]
        self.count -= 1

    def first(self) -> Iterator[Waiting]:
        # Of each priority the one that came first: no other can come before it.
        for queued in self.waiting:
            if queued:
                yield next(iter(queued.values()))


class FairQueue:
    """Calls that wait for one pool.

    ageing_s: every so many seconds of waiting lift a call by one priority. Among callers it is the time since the
    caller had its last turn that counts, not the age of each of its calls: a caller with a long queue of old calls
    would otherwise go before everyone who came later.
    """

    def __init__(self, *, clock: Callable[[], float], ageing_s: float) -> None:
        self._clock = clock
        self._ageing_s = ageing_s
        self._numbers = itertools.count(1)
        self._callers: dict[str, _Caller] = {}
        self._waiting = 0
        # The pass of a caller that comes anew. It moves on by one call shared among those who wait, so that a stream
        # of new callers cannot keep an old one waiting for ever.
        self._now = 0.0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Waiting]:
        for caller in self._callers.values():
            for queued in caller.waiting:
                yield from queued.values()

    @property
    def caller_count(self) -> int:
        """Callers that are remembered: those who wait, and those who were given more than their share."""
        return len(self._callers)

    def waiting_of(self, caller: str) -> int:
        """How many calls of that caller wait."""
        known = self._callers.get(caller)
        return known.count if known is not None else 0

    def ahead_of(self, caller: str, priority: Priority) -> int:
        """How many of the calls that wait now would be served before a new one of that caller.

        For callers that take turns: of each other one as many as this caller has itself, and those more urgent.
        """
        own = self.waiting_of(caller)
        ahead = own
        for other in self._callers.values():
            if other.name == caller or not other.count:
                continue
            urgent = sum(len(queued) for queued in other.waiting[priority + 1 :])
            ahead += max(urgent, min(other.count, own + 1))
        return ahead

    def charge(self, caller: str) -> None:
        """A call of that caller went in without waiting: it counts as a turn."""
        if self._waiting:
            self._charge(self._caller(caller))
            self._forget()

    def enter(self, caller: str, priority: Priority) -> Waiting:
        """A call waits from now on."""
        waiting = Waiting(next(self._numbers), caller, priority, self._clock())
        self._caller(caller).add(waiting)
        self._waiting += 1
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """A call gives up; without effect if it was given a place or left before."""
        if waiting.gone:
            return
        self._callers[waiting.caller].remove(waiting)
        self._waiting -= 1
        self._forget()

    def take(self) -> Waiting | None:
        """Remove and answer the call whose turn it is; None if none waits."""
        now = self._clock()
        best: tuple[tuple[int, float, int], _Caller, Waiting] | None = None
        for caller in self._callers.values():
            if not caller.count:
                continue
            # The caller's most urgent call decides about its turn, its head about what is done with it.
            level = 0
            head: tuple[int, int, Waiting] | None = None
            for waiting in caller.first():
                level = max(level, self._lifted(waiting.priority, now - max(waiting.entered_at, caller.turn_at)))
                place = (-self._lifted(waiting.priority, now - waiting.entered_at), waiting.number, waiting)
                if head is None or place[:2] < head[:2]:
                    head = place
            assert head is not None
            key = (-level, caller.at, head[1])
            if best is None or key < best[0]:
                best = (key, caller, head[2])
        if best is None:
            return None
        _, caller, taken = best
        caller.remove(taken)
        self._waiting -= 1
        caller.turn_at = now
        self._charge(caller)
        self._forget()
        return taken

    def _lifted(self, priority: Priority, waited_s: float) -> int:
        return min(int(priority) + int(max(0.0, waited_s) / self._ageing_s), int(Priority.HIGH))

    def _caller(self, name: str) -> _Caller:
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(name, self._now)
        elif not caller.count:
            # Turns that it did not use while it was away are not saved up.
            caller.at = max(caller.at, self._now)
        return caller

    def _charge(self, caller: _Caller) -> None:
        competing = sum(1 for other in self._callers.values() if other.count or other is caller)
        caller.at += 1.0
        self._now += 1.0 / max(1, competing)

    def _forget(self) -> None:
        if not self._waiting:
            # Nobody competes, so nobody is owed anything.
            self._callers.clear()
            return
        for name in [c.name for c in self._callers.values() if not c.count and c.at <= self._now]:
            del self._callers[name]
