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

_HIGHEST = int(max(Priority))
# Callers that do not wait and are remembered all the same, before it is looked which of them are owed nothing.
_KEPT = 16


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
        self._competing = 0  # callers that wait
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
        known = self._caller(caller)
        if not known.count:
            self._competing += 1
        known.add(waiting)
        self._waiting += 1
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """A call gives up; without effect if it was given a place or left before."""
        if waiting.gone:
            return
        caller = self._callers[waiting.caller]
        caller.remove(waiting)
        self._left(caller)
        self._forget()

    def take(self) -> Waiting | None:
        """Remove and answer the call whose turn it is; None if none waits."""
        # Written out, as it is gone through for every caller that waits whenever a call goes in.
        now = self._clock()
        best: _Caller | None = None
        taken: Waiting | None = None
        best_level, best_at = -1, 0.0
        for caller in self._callers.values():
            if not caller.count:
                continue
            # The caller's most urgent call decides about its turn, its head about what is done with it. Of each
            # priority the call that came first: no other can come before it.
            level = head_level = -1
            head: Waiting | None = None
            for priority, queued in enumerate(caller.waiting):
                if not queued:
                    continue
                waiting = next(iter(queued.values()))
                entered = waiting.entered_at
                level = max(level, self._lifted(priority, now - max(entered, caller.turn_at)))
                lifted = self._lifted(priority, now - entered)
                if head is None or lifted > head_level or (lifted == head_level and waiting.number < head.number):
                    head, head_level = waiting, lifted
            assert head is not None
            if (
                taken is None
                or level > best_level
                or (level == best_level and (caller.at, head.number) < (best_at, taken.number))
            ):
                best, taken, best_level, best_at = caller, head, level, caller.at
        if best is None or taken is None:
            return None
        best.remove(taken)
        self._left(best)
        best.turn_at = now
        self._charge(best)
        self._forget()
        return taken

    def _left(self, caller: _Caller) -> None:
        self._waiting -= 1
        if not caller.count:
            self._competing -= 1

    def _lifted(self, priority: int, waited_s: float) -> int:
        if waited_s < self._ageing_s:
            return priority
        return min(priority + int(waited_s / self._ageing_s), _HIGHEST)

    def _caller(self, name: str) -> _Caller:
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(name, self._now)
        elif not caller.count:
            # Turns that it did not use while it was away are not saved up.
            caller.at = max(caller.at, self._now)
        return caller

    def _charge(self, caller: _Caller) -> None:
        competing = self._competing if caller.count else self._competing + 1
        caller.at += 1.0
        self._now += 1.0 / competing

    def _forget(self) -> None:
        if not self._waiting:
            # Nobody competes, so nobody is owed anything.
            self._callers.clear()
        elif len(self._callers) > 2 * self._competing + _KEPT:
            self._forget_settled()

    def _forget_settled(self) -> None:
        for name in [c.name for c in self._callers.values() if not c.count and c.at <= self._now]:
            del self._callers[name]
