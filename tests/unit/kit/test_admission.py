"""The rules of the door and the queue, as examples and as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.admission import Admission, Priority, Ticket
from services.kit.faults import Fault, Kind


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, *, slots: int = 2, queue_limit: int = 10, queue_bytes_limit: int = 1000) -> Admission:
    return Admission(slots=slots, queue_limit=queue_limit, queue_bytes_limit=queue_bytes_limit, clock=clock)


def enter(admission: Admission, priority: Priority = Priority.NORMAL, *, cost: float = 1, size: int = 1) -> Ticket:
    ticket = admission.enter(priority=priority, cost=cost, time_left_s=None)
    admission.make_eligible(ticket, size)
    return ticket


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    admission = make(Clock(), queue_limit=3)
    for _ in range(3):
        enter(admission)
    with pytest.raises(Fault) as refused:
        enter(admission)
    assert refused.value.data.kind is Kind.OVERLOADED
    assert refused.value.data.reason == "QUEUE_FULL"
    assert refused.value.data.retry_after_ms is not None
    assert refused.value.data.retry_after_ms >= 50
    assert "limit is 3" in refused.value.data.message


def test_bytes_of_waiting_input_are_bounded_but_one_large_input_passes() -> None:
    admission = make(Clock(), queue_bytes_limit=100)
    enter(admission, size=500)
    late = admission.enter(priority=Priority.NORMAL, cost=1, time_left_s=None)
    with pytest.raises(Fault) as refused:
        admission.make_eligible(late, 1)
    assert refused.value.data.reason == "QUEUE_BYTES_FULL"
    admission.leave(late)
    assert admission.waiting_count == 1


def test_urgent_calls_go_first_but_waiting_makes_urgent() -> None:
    clock = Clock()
    admission = make(clock, slots=1)
    low = enter(admission, Priority.LOW)
    clock.now += 11  # two ageing steps of 5 s: as urgent as HIGH, and older
    high = enter(admission, Priority.HIGH)
    assert admission.grant_next() is low
    admission.leave(low)
    assert admission.grant_next() is high


def test_a_call_that_cannot_make_its_deadline_is_refused_at_the_door() -> None:
    clock = Clock()
    admission = make(clock, slots=1)
    first = enter(admission, cost=10)
    assert admission.grant_next() is first
    clock.now += 5  # 0.5 s per unit of cost
    admission.leave(first, completed=True)
    with pytest.raises(Fault) as refused:
        admission.enter(priority=Priority.NORMAL, cost=10, time_left_s=2.0)
    assert refused.value.data.reason == "DEADLINE_TOO_SHORT"
    admission.enter(priority=Priority.NORMAL, cost=10, time_left_s=6.0)


def test_refusing_everything_does_not_last_for_ever() -> None:
    clock = Clock()
    admission = make(clock, slots=1)
    slow = enter(admission)
    admission.grant_next()
    clock.now += 60
    admission.leave(slow, completed=True)
    with pytest.raises(Fault):
        admission.enter(priority=Priority.NORMAL, cost=1, time_left_s=1.0)
    clock.now += 300  # nothing was learned for ten half-lives
    admission.enter(priority=Priority.NORMAL, cost=1, time_left_s=1.0)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from(Priority), st.integers(0, 60)),
        st.tuples(st.just("grant"), st.none(), st.none()),
        st.tuples(st.just("leave"), st.integers(0, 50), st.booleans()),
        st.tuples(st.just("wait"), st.floats(0, 20), st.none()),
    ),
    max_size=60,
)


@given(actions)
def test_whatever_happens_the_books_balance(steps: list[tuple[str, object, object]]) -> None:
    clock = Clock()
    admission = make(clock, slots=3, queue_limit=5, queue_bytes_limit=100)
    inside: list[Ticket] = []
    for action, a, b in steps:
        match action:
            case "enter":
                if admission.waiting_count == 5:
                    with pytest.raises(Fault, match="QUEUE_FULL"):
                        admission.enter(priority=a, cost=1, time_left_s=None)  # type: ignore[arg-type]
                    continue
                ticket = admission.enter(priority=a, cost=1, time_left_s=None)  # type: ignore[arg-type]
                inside.append(ticket)
                try:
                    admission.make_eligible(ticket, b)  # type: ignore[arg-type]
                except Fault:
                    inside.remove(ticket)
                    admission.leave(ticket)
            case "grant":
                free = admission.running_count < 3
                waiting = admission.waiting_count
                assert (admission.grant_next() is not None) == (free and waiting > 0)
            case "leave" if inside:
                ticket = inside.pop(a % len(inside))  # type: ignore[operator]
                admission.leave(ticket, completed=bool(b))
                admission.leave(ticket)  # twice does nothing
            case "wait":
                clock.now += a  # type: ignore[operator]
        assert admission.waiting_count + admission.running_count == len(inside)
        assert admission.running_count <= 3
        assert [p for _, p in admission.positions()] == list(range(admission.waiting_count))
    for ticket in inside:
        admission.leave(ticket)
    assert (admission.waiting_count, admission.running_count) == (0, 0)


@given(st.lists(st.sampled_from(Priority), min_size=1, max_size=10))
def test_calls_of_one_priority_are_served_in_their_order(priorities: list[Priority]) -> None:
    admission = make(Clock(), slots=10, queue_limit=10)
    for priority in priorities:
        enter(admission, priority)
    served: list[Ticket] = []
    while (ticket := admission.grant_next()) is not None:
        served.append(ticket)
    assert served == sorted(served, key=lambda t: (-t.priority, t.number))
