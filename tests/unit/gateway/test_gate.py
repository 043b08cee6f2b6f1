"""Who goes in, who waits and who is refused, as examples and as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.gate import Bounds, CallerBound, Gate, Ticket
from services.gateway.limiter import AdaptiveLimit
from services.kit.admission import Priority
from services.kit.faults import Fault, FaultData, Kind
from tests.support.clock import Clock

NORMAL = Priority.NORMAL


def make(clock: Clock | None = None, *, limit: int = 2, endpoints: int = 1, **bounds: float) -> Gate:
    clock = clock or Clock()
    gate = Gate("ocr", Bounds(**bounds), AdaptiveLimit(least=1, initial=limit, most=limit, clock=clock), clock=clock)  # type: ignore[arg-type]
    gate.set_endpoints(endpoints)
    return gate


def enter(gate: Gate, caller: str = "a", *, time_left_s: float | None = None, admitted: bool = False) -> Ticket:
    return gate.enter(caller, NORMAL, time_left_s=time_left_s, admitted=admitted)


def refused(gate: Gate, caller: str = "a", *, time_left_s: float | None = None) -> FaultData:
    with pytest.raises(Fault) as raised:
        enter(gate, caller, time_left_s=time_left_s)
    return raised.value.data


def teach(gate: Gate, clock: Clock, seconds: float) -> None:
    """Calls take that long."""
    for _ in range(50):
        ticket = enter(gate)
        clock.now += seconds
        gate.leave(ticket, completed=True)


def test_calls_go_in_up_to_the_limit_and_wait_beyond() -> None:
    gate = make(limit=2)
    first, second, third = (enter(gate) for _ in range(3))
    assert (first.inside, second.inside, third.inside) == (True, True, False)
    assert gate.grant_next() is None
    gate.leave(first)
    assert gate.grant_next() is third
    assert third.inside
    gate.leave(second)
    gate.leave(third)
    gate.leave(third)
    assert (gate.under_way, gate.waiting) == (0, 0)


def test_who_comes_later_does_not_overtake_those_who_wait() -> None:
    gate = make(limit=1)
    inside, waits = enter(gate, "a"), enter(gate, "b")
    gate.leave(inside)
    assert not enter(gate, "c").inside
    assert gate.grant_next() is waits


def test_without_an_endpoint_calls_wait_and_with_one_they_are_let_in() -> None:
    gate = make(limit=2, endpoints=0)
    waiting = [enter(gate) for _ in range(3)]
    assert gate.grant_next() is None
    gate.set_endpoints(1)
    assert [gate.grant_next() for _ in range(3)] == [*waiting[:2], None]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    gate = make(limit=1, queue_limit=4)
    for caller in "abcde":
        enter(gate, caller)
    data = refused(gate, "f")
    assert (data.kind, data.reason) == (Kind.OVERLOADED, "QUEUE_FULL")
    assert "4 calls wait for pool ocr and the limit is 4" in data.message
    assert data.retry_after_ms is not None
    assert data.retry_after_ms >= 100
    assert enter(gate, "f", admitted=True).waiting is not None  # what was let in before is not refused


def test_one_caller_leaves_room_for_others() -> None:
    gate = make(limit=1, queue_limit=10)
    for _ in range(6):
        enter(gate, "greedy")
    assert refused(gate, "greedy").reason == "CALLER_QUEUE_FULL"
    for caller in "abcde":
        assert enter(gate, caller).waiting is not None
    assert refused(gate, "f").reason == "QUEUE_FULL"


def test_a_deadline_shorter_than_the_wait_is_refused_at_the_door() -> None:
    clock = Clock()
    gate = make(clock, limit=1)
    teach(gate, clock, 2.0)
    enter(gate)
    enter(gate)
    data = refused(gate, time_left_s=3.9)
    assert (data.kind, data.reason) == (Kind.DEADLINE, "DEADLINE_TOO_SHORT")
    assert enter(gate, time_left_s=4.1).waiting is not None


def test_callers_that_wait_for_their_answers_are_all_served_however_long_they_go_on() -> None:
    clock = Clock()
    gate = make(clock, limit=4)
    teach(gate, clock, 0.1)
    inside = [ticket for _ in range(40) if (ticket := enter(gate)).inside]
    for _ in range(1000):
        clock.now += 0.025
        gate.leave(inside.pop(0), completed=True)
        granted = gate.grant_next()
        assert granted is not None
        inside.append(granted)
        enter(gate)  # whoever has an answer asks again
    assert gate.waiting == 36


def test_who_came_to_a_bound_is_let_in_to_short_waits_only_until_the_queue_is_gone() -> None:
    clock = Clock()
    gate = make(clock, limit=10, queue_limit=40, overload_ends_s=1.0)
    teach(gate, clock, 0.1)
    inside = [enter(gate) for _ in range(10)]
    for _ in range(20):
        enter(gate)  # half of the queue: what one caller may have
    assert refused(gate).reason == "CALLER_QUEUE_FULL"
    for _ in range(17):
        gate.leave(inside.pop(0))
        granted = gate.grant_next()
        assert granted is not None
        inside.append(granted)
    # Three wait, and as many may of one who asks for no more than there is.
    data = refused(gate)
    assert data.reason == "WAIT_TOO_LONG"
    assert "40 ms for pool ocr and the limit is 25 ms while there are more calls than it can serve" in data.message
    assert enter(gate, "b").waiting is not None
    assert enter(gate, "b").waiting is not None

    def empty() -> None:
        while inside:
            gate.leave(inside.pop())
            while (granted := gate.grant_next()) is not None:
                gate.leave(granted)

    # A break is not the end.
    empty()
    clock.now += 0.5
    inside += [enter(gate) for _ in range(12)][:10]
    assert refused(gate).reason == "WAIT_TOO_LONG"
    empty()
    clock.now += 1.0
    inside += [enter(gate) for _ in range(20)][:10]
    empty()


def test_a_full_queue_makes_overload_for_all() -> None:
    clock = Clock()
    gate = make(clock, limit=10, queue_limit=8)
    teach(gate, clock, 0.1)
    for _ in range(10):
        enter(gate)
    waiting = [enter(gate, caller) for caller in "abcdefgh"]
    assert refused(gate, "i").reason == "QUEUE_FULL"
    gate.leave(waiting[0])
    assert refused(gate, "i").reason == "WAIT_TOO_LONG"


def test_the_longest_wait_is_bounded() -> None:
    clock = Clock()
    gate = make(clock, limit=1, wait_s=10.0)
    teach(gate, clock, 3.0)
    for _ in range(4):
        enter(gate)
    assert refused(gate).reason == "WAIT_TOO_LONG"


def test_streams_are_bounded_by_number_and_do_not_wait() -> None:
    gate = make(limit=1, stream_limit=2)
    streams = [gate.enter("a", NORMAL, time_left_s=None, counted=False) for _ in range(2)]
    assert all(ticket.inside for ticket in streams)
    with pytest.raises(Fault) as raised:
        gate.enter("a", NORMAL, time_left_s=None, counted=False)
    assert raised.value.data.reason == "TOO_MANY_STREAMS"
    assert enter(gate).inside
    gate.leave(streams[0])
    assert gate.enter("a", NORMAL, time_left_s=None, counted=False).inside


def test_a_retry_is_let_in_over_the_limit_and_counted() -> None:
    gate = make(limit=1)
    first, moved = enter(gate), gate.move_in("b", counted=True)
    assert gate.under_way == 2
    gate.leave(first)
    assert not enter(gate).inside
    gate.leave(moved)
    assert gate.grant_next() is not None


def test_a_caller_may_have_so_many_calls_and_is_forgotten_with_the_last() -> None:
    bound = CallerBound(2)
    bound.enter("a")
    bound.enter("a")
    bound.enter("b")
    with pytest.raises(Fault) as raised:
        bound.enter("a")
    assert raised.value.data.reason == "CALLER_LIMIT"
    bound.leave("a")
    bound.enter("a")
    for caller in "aab":
        bound.leave(caller)
    assert len(bound) == 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.integers(0, 3)),
            st.tuples(st.just("stream"), st.integers(0, 3)),
            st.tuples(st.just("move"), st.integers(0, 3)),
            st.tuples(st.just("leave"), st.integers(0, 100)),
            st.tuples(st.just("leave completed"), st.integers(0, 100)),
            st.tuples(st.just("endpoints"), st.integers(0, 3)),
            st.tuples(st.just("pass"), st.integers(0, 5)),
        ),
        max_size=150,
    )
)
def test_every_place_is_given_back_and_no_bound_is_passed(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    gate = make(clock, limit=3, queue_limit=8, stream_limit=3)
    here: list[Ticket] = []
    refusals: set[Kind] = set()
    for what, number in steps:
        caller = "abcd"[number % 4]
        try:
            match what:
                case "enter":
                    here.append(enter(gate, caller, time_left_s=5.0 if number else None))
                case "stream":
                    here.append(gate.enter(caller, NORMAL, time_left_s=None, counted=False))
                case "move":
                    here.append(gate.move_in(caller, counted=True))
                case "leave" | "leave completed" if here:
                    gate.leave(here.pop(number % len(here)), completed=what == "leave completed")
                case "endpoints":
                    gate.set_endpoints(number)
                case "pass":
                    clock.now += number
        except Fault as fault:
            refusals.add(fault.data.kind)
        while gate.grant_next() is not None:
            pass
        assert gate.under_way == sum(t.inside and t.counted for t in here)
        assert gate.streams == sum(t.inside and not t.counted for t in here) <= 3
        assert gate.waiting == sum(not t.inside for t in here) <= 8
        # Nobody waits while there is a place.
        assert not gate.waiting or gate.under_way >= gate.limit
    for ticket in here:
        gate.leave(ticket)
    assert refusals <= {Kind.OVERLOADED, Kind.DEADLINE}
    assert (gate.under_way, gate.streams, gate.waiting, gate.grant_next()) == (0, 0, 0, None)
