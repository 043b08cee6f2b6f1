"""What callers get at a gate in front of a simulated server: no time passes but the simulation's."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from services.gateway.gate import Bounds, Gate, Ticket
from services.gateway.limiter import AdaptiveLimit, Said
from services.kit.admission import Priority
from services.kit.faults import Fault
from tests.support.clock import Clock

SECONDS = 120.0


@dataclass
class Seen:
    admitted: list[float] = field(default_factory=list)  # seconds from coming to being answered
    refused: Counter[str] = field(default_factory=Counter)  # by caller

    @property
    def p99(self) -> float:
        return sorted(self.admitted)[int(0.99 * len(self.admitted))]

    @property
    def goodput(self) -> float:
        return len(self.admitted) / SECONDS


@dataclass(order=True)
class _Event:
    at: float
    number: int
    caller: str = field(compare=False)
    done: "_Call | None" = field(compare=False)  # None: a call comes


@dataclass(eq=False)
class _Call:
    caller: str
    came: float
    again: bool  # its caller waits for the answer, and then calls again
    given: float = 0.0
    ticket: Ticket | None = None


def make(clock: Clock, *, slots: int, says: bool) -> Gate:
    gate = Gate("ocr", Bounds(), AdaptiveLimit(least=2, initial=64, most=1000, clock=clock), clock=clock)
    gate.set_endpoints(1, Said(slots=slots, all_said=True) if says else Said())
    return gate


def simulate(
    gate: Gate,
    clock: Clock,
    *,
    slots: int,
    call_s: float,
    offered: Iterable[tuple[float, str]] = (),
    waiting_for_answers: Iterable[tuple[float, str]] = (),
    seed: int = 1,
) -> Seen:
    """Two minutes of calls at a server of so many equal workers.

    offered: when calls come, and whose; whatever becomes of them. waiting_for_answers: when callers come who make one
    call after the other.
    """
    rng = random.Random(seed)
    numbers = itertools.count()
    start, seen = clock.now, Seen()
    waits: dict[Ticket, _Call] = {}
    at_server: list[_Call] = []
    busy = 0
    loops = list(waiting_for_answers)
    events = [_Event(start + at, next(numbers), who, None) for at, who in (*offered, *loops)]
    loop_starts = {e.number for e in events[len(events) - len(loops) :]}
    heapq.heapify(events)

    def begin(call: _Call) -> None:
        call.given = clock.now
        at_server.append(call)

    def work() -> None:
        nonlocal busy
        while at_server and busy < slots:
            busy += 1
            seconds = call_s * rng.uniform(0.95, 1.05)
            heapq.heappush(events, _Event(clock.now + seconds, next(numbers), "", at_server.pop(0)))

    def come(call: _Call) -> None:
        try:
            call.ticket = gate.enter(call.caller, Priority.NORMAL, time_left_s=10.0)
        except Fault:
            seen.refused[call.caller] += 1
            return
        if call.ticket.inside:
            begin(call)
        else:
            waits[call.ticket] = call

    while events:  # those under way at the end are seen through
        event = heapq.heappop(events)
        clock.now = event.at
        call = event.done
        if call is None:
            come(_Call(event.caller, clock.now, again=event.number in loop_starts))
        else:
            busy -= 1
            assert call.ticket is not None
            if clock.now < start + SECONDS:
                seen.admitted.append(clock.now - call.came)
            gate.sample(call.ticket, "m", began=call.given, seconds=clock.now - call.given)
            gate.leave(call.ticket, completed=True)
            while (ticket := gate.grant_next()) is not None:
                begin(waits.pop(ticket))
            if call.again and clock.now < start + SECONDS:
                come(_Call(call.caller, clock.now, again=True))
        work()
    return seen


def evenly(rate: float, *callers: str, first: float = 0.0) -> list[tuple[float, str]]:
    times = (first + i / rate for i in range(int(rate * (SECONDS - first))))
    return list(zip(times, itertools.cycle(callers), strict=False))


def together(count: int, caller: str, *, within_s: float, at: float = 0.0) -> list[tuple[float, str]]:
    return [(at + within_s * i / count, caller) for i in range(count)]


@pytest.mark.parametrize(
    ("slots", "call_s", "callers"),
    [
        (4, 0.1, ("a",)),
        (4, 0.1, ("a", "b", "c")),
        (4, 0.1, tuple(f"host {i}" for i in range(400))),
    ],
)
def test_ten_times_the_capacity_leaves_those_who_are_let_in_as_well_off_as_at_the_capacity(
    slots: int, call_s: float, callers: tuple[str, ...]
) -> None:
    clock, capacity = Clock(), slots / call_s
    gate = make(clock, slots=slots, says=True)
    before = simulate(
        gate, clock, slots=slots, call_s=call_s, waiting_for_answers=together(2 * slots, "a", within_s=0.01)
    )
    seen = simulate(gate, clock, slots=slots, call_s=call_s, offered=evenly(10 * capacity, *callers))
    assert not before.refused
    assert before.goodput >= 0.98 * capacity
    assert seen.goodput >= 0.95 * capacity
    assert seen.p99 <= 2 * before.p99


def test_so_it_is_where_the_endpoint_does_not_say_how_much_it_works_on() -> None:
    clock = Clock()
    gate = make(clock, slots=4, says=False)
    simulate(gate, clock, slots=4, call_s=0.1, offered=evenly(160, "a"))  # in which the limit is learned
    seen = simulate(gate, clock, slots=4, call_s=0.1, offered=evenly(160, "a"))
    assert seen.goodput >= 0.93 * 40
    assert seen.p99 <= 0.4


@pytest.mark.parametrize("within_s", [0.0, 0.05, 30.0])
@pytest.mark.parametrize(("slots", "call_s"), [(4, 0.1), (2, 0.02), (16, 0.5)])
def test_sixty_callers_that_wait_for_their_answers_are_all_served(slots: int, call_s: float, within_s: float) -> None:
    clock = Clock()
    callers = together(60, "a", within_s=within_s)
    seen = simulate(make(clock, slots=slots, says=True), clock, slots=slots, call_s=call_s, waiting_for_answers=callers)
    assert not seen.refused
    assert seen.goodput >= 0.85 * slots / call_s


def test_callers_that_wait_for_their_answers_are_served_beside_one_who_asks_too_much() -> None:
    clock = Clock()
    gate = make(clock, slots=4, says=True)
    patient = [(0.001 * i, f"host {i}") for i in range(6)]
    greedy = evenly(160, "greedy", first=5.0)
    seen = simulate(gate, clock, slots=4, call_s=0.1, offered=greedy, waiting_for_answers=patient)
    assert seen.goodput >= 0.95 * 40
    assert set(seen.refused) == {"greedy"}
