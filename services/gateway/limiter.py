"""How many calls a pool is given at a time, learned from how long they take.

A server that is given more calls than it can work on only makes them wait, and no caller is served sooner. Where that
begins is measured: now and then, while the limit binds, it is lowered to `PROBE` times itself for a moment. If calls
are no faster then, what they wait for is work, and the limit may grow. If they are faster by as much as the limit is
smaller, the difference was a queue, and the smaller limit stays. Between probes the limit follows latency, which may
be `TOLERANCE` times that of the last probes.

Gradient limits as in Netflix's concurrency-limits and Envoy's adaptive concurrency filter; those compare with the least
latency ever seen or with that of next to no load, which throttles servers that batch, and servers whose work changed.

Pure bookkeeping without asyncio, and with a clock from outside.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

# Latency at the limit that is accepted, relative to that at PROBE times the limit. For a server of c equal workers the
# limit settles near TOLERANCE x c: the workers never idle for want of calls, and a call waits for 0.3 of one at most.
TOLERANCE = 1.3
PROBE = 0.7
# How latency follows the limit, as an exponent: 1 where calls only wait longer for it, 0 where they do not at all. At
# the limit that is aimed at it is log(TOLERANCE) / log(1 / PROBE) = 0.74.
_QUEUED = 0.88
# Windows from one probe to the next: few at first, twice as many each time that no queue is found. Those at the end
# cost (1 - PROBE x TOLERANCE) / 21 of the throughput.
_PROBE_SOON = 4
_PROBE_EVERY = 20
_CLEARLY = 0.8
_SAID = 1.5  # times what the endpoints say they work on at a time: where the limit begins, and no more than that
_GROW = 1.05  # a window
_SHRINK_MOST = 0.7  # a window
_BACK_OFF = 0.9  # when an endpoint said that it is full itself
# A window lasts until its mean logarithm is known to about _SURE, within these numbers of calls and for this long.
_SURE = 0.08
_LEAST_SAMPLES = 16
_MOST_SAMPLES = 128
_LEAST_SECONDS = 0.25
_NO_NOISE = 0.25  # a difference of logarithms that is more than chance


@dataclass(frozen=True, slots=True)
class Said:
    """What the ready endpoints of a pool say of themselves, together.

    slots: calls that they work on at a time; 0 if none says so. all_said: none has left it open. call_s: seconds that a
    call takes in a slot, in the mean; 0 while not known.
    """

    slots: int = 0
    all_said: bool = False
    call_s: float = 0.0


NOTHING_SAID = Said()


@dataclass(slots=True)
class _Window:
    began: float
    settled: bool  # no call from before a smaller limit is under way any more
    count: int = 0
    seconds: float = 0.0
    binding: int = 0  # samples that ended while the limit was reached
    squares: float = 0.0  # of how far the logarithms of seconds are from those expected
    by_method: dict[str, tuple[int, float]] = field(default_factory=dict)  # number and sum of log(seconds)


class AdaptiveLimit:
    """The limit of one pool.

    least, most: bounds of the limit, in calls for each endpoint; initial: where it begins, for endpoints that do not
    say how many calls they work on at a time. clock: seconds.

    Latencies are compared within a method only, so that a change in what is asked is not taken for a change in how fast
    it is answered, and as means of logarithms, so that one very long call does not outweigh all others.
    """

    def __init__(self, *, least: int, initial: int, most: int, clock: Callable[[], float]) -> None:
        self._least, self._most = least, most
        self._clock = clock
        self._endpoints = 1
        self._floor = 0
        self._ceiling = math.inf
        self._exact = float(initial)
        self._base: dict[str, float] = {}  # by method: log of the seconds that a call takes without a queue
        self._probing = False
        self._since_probe = _PROBE_SOON  # where it begins is a guess: look as soon as it binds
        self._probe_every = _PROBE_SOON
        self._was_binding = False
        self._before: tuple[dict[str, float], int] = ({}, 1)  # of the window before the probe: means, and the limit
        self._backed_off_at = -math.inf
        self._window = _Window(clock(), settled=True)

    @property
    def limit(self) -> int:
        """Calls that may be under way, at least 1."""
        wanted = self._exact * PROBE if self._probing else self._exact
        return max(1, self._floor, math.floor(wanted))

    @property
    def probing(self) -> bool:
        """Whether the limit is lowered just now to measure."""
        return self._probing

    def scale(self, endpoints: int, said: Said = NOTHING_SAID) -> None:
        """The pool now has that many endpoints; a limit for none stays what it was for the last.

        The limit is never less than the calls that they say they work on at a time. As long as nothing has been
        measured, it begins at 1.5 times that; and if all have said it the limit is never more, whatever was measured
        or guessed before they did: what is beyond that can only wait there, and is more easily refused here.
        """
        self._floor = floor = said.slots
        self._ceiling = math.ceil(_SAID * floor) if said.all_said else math.inf
        if endpoints and endpoints != self._endpoints:
            self._exact *= endpoints / self._endpoints
            self._endpoints = endpoints
            self._begin_window(probing=False)
        if floor and not self._base and self._backed_off_at == -math.inf:
            self._exact = _SAID * floor
        self._clamp()

    def sample(self, method: str, *, began: float, seconds: float, under_way: int, waiting: int) -> None:
        """A call was answered.

        began: on the clock, when it was given to the endpoint. seconds: what the endpoint took, without what its caller
        did. under_way: calls that were, this one included. waiting: calls that wait for a place.
        """
        window = self._window
        if not window.settled:
            if under_way - 1 <= self.limit:
                window.settled, window.began = True, self._clock()
            return
        if began < window.began:
            return  # it was given when another limit stood
        logarithm = math.log(max(seconds, 1e-6))
        count, total = window.by_method.get(method, (0, 0.0))
        if count:
            # Welford's way to a variance, summed over the methods.
            window.squares += count / (count + 1) * (logarithm - total / count) ** 2
        window.by_method[method] = (count + 1, total + logarithm)
        window.count += 1
        window.seconds += seconds
        window.binding += waiting > 0 or under_way >= self.limit
        elapsed = self._clock() - window.began
        noise = window.squares / window.count / _SURE**2
        enough = min(_MOST_SAMPLES, max(_LEAST_SAMPLES, self.limit, noise))
        # Long enough for long calls too, or only the short ones would be counted.
        if window.count >= enough and elapsed >= max(_LEAST_SECONDS, 2 * window.seconds / window.count):
            self._close_window()

    def overloaded(self) -> None:
        """An endpoint refused a call because its own queue is full."""
        now = self._clock()
        # Once for all the calls that meet the same full queue.
        if now - self._backed_off_at >= _LEAST_SECONDS:
            self._backed_off_at = now
            self._exact *= _BACK_OFF
            self._clamp()

    def _close_window(self) -> None:
        window = self._window
        if self._probing:
            self._close_probe(window)
            return
        gradient = TOLERANCE / _times_slower(window, self._base)
        self._learn(window)
        binding = window.binding >= window.count / 2
        # A window in which the load came to the limit shows latency on its way, and is compared with nothing.
        steady, self._was_binding = binding and self._was_binding, binding
        self._since_probe += 1
        # Calls that are clearly slower than they should be may be so for good from now on.
        due = (steady and self._since_probe >= self._probe_every) or (
            gradient < _CLEARLY and self._since_probe >= _PROBE_SOON
        )
        if due and math.floor(self._exact * PROBE) < self.limit and self._exact > self._floor:
            self._before = (_means(window), self.limit)
            self._begin_window(probing=True)
            return
        if gradient < 1.0:
            self._exact *= max(_SHRINK_MOST, gradient)
        elif binding:
            self._exact = max(self._exact * _GROW, self._exact + 0.5)
        self._clamp()
        self._begin_window(probing=False)

    def _close_probe(self, window: _Window) -> None:
        means, limit = self._before
        lower = self.limit
        self._since_probe = 0
        if lower < limit:
            self._probe_every = min(_PROBE_EVERY, 2 * self._probe_every)
            if math.log(_times_faster(window, means)) >= _QUEUED * math.log(limit / lower):
                self._exact *= PROBE
                self._clamp()
                self._since_probe = self._probe_every = _PROBE_SOON  # and look further down at once
            self._learn(window)
        self._begin_window(probing=False)

    def _learn(self, window: _Window) -> None:
        for method, seen in _means(window).items():
            base = self._base.setdefault(method, seen)
            weight = 0.1 if seen < base else 0.0
            if self._probing:
                weight = 1.0 if abs(seen - base) > _NO_NOISE else 0.5
            self._base[method] = base + weight * (seen - base)

    def _begin_window(self, *, probing: bool) -> None:
        lower = probing and not self._probing
        self._probing = probing
        self._window = _Window(self._clock(), settled=not lower)

    def _clamp(self) -> None:
        most = min(self._most * self._endpoints, self._ceiling)
        self._exact = max(min(self._exact, most), self._least * self._endpoints)


def _means(window: _Window) -> dict[str, float]:
    # By method: the mean logarithm of the seconds.
    return {method: total / count for method, (count, total) in window.by_method.items()}


def _times_slower(window: _Window, base: dict[str, float]) -> float:
    # Than `base`, over all calls of the window; a method that `base` does not have counts as 1.
    logs = sum(total - count * base.get(method, total / count) for method, (count, total) in window.by_method.items())
    return math.exp(logs / window.count)


def _times_faster(window: _Window, base: dict[str, float]) -> float:
    return 1.0 / _times_slower(window, base)
