"""Whose turn it is, as examples and as properties."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.fairness import FairQueue, Waiting
from services.kit.admission import Priority
from tests.support.clock import Clock

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def make(clock: Clock | None = None) -> FairQueue:
    return FairQueue(clock=clock or Clock(), ageing_s=5.0)


def drained(queue: FairQueue) -> list[str]:
    """Who is served, in order."""
    served = []
    while (taken := queue.take()) is not None:
        served.append(taken.caller)
    return served


def test_a_caller_with_one_call_does_not_wait_for_all_of_another() -> None:
    queue = make()
    for _ in range(10):
        queue.enter("many", NORMAL)
    queue.enter("one", NORMAL)
    assert queue.ahead_of("other", NORMAL) == 2
    assert drained(queue).index("one") <= 1


def test_calls_of_one_caller_keep_their_order() -> None:
    queue = make()
    entered = [queue.enter("a", NORMAL) for _ in range(5)]
    assert [queue.take() for _ in range(5)] == entered
    assert queue.take() is None


def test_urgent_calls_go_first_whoever_sent_them() -> None:
    queue = make()
    for priority in (LOW, NORMAL, HIGH):
        queue.enter(priority.name, priority)
        queue.enter("all", priority)
    served = []
    while (taken := queue.take()) is not None:
        served.append(taken.priority)
    assert served == sorted(served, reverse=True)


def test_an_urgent_call_is_not_held_back_by_an_old_call_of_its_own_caller() -> None:
    clock = Clock()
    queue = make(clock)
    queue.enter("a", LOW)
    clock.now += 6
    queue.enter("b", NORMAL)
    queue.enter("a", HIGH)
    assert drained(queue)[0] == "a"


def test_waiting_makes_urgent() -> None:
    clock = Clock()
    queue = make(clock)
    queue.enter("patient", LOW)
    clock.now += 11  # two steps of 5 s: as urgent as HIGH, and longer without a turn
    queue.enter("urgent", HIGH)
    assert drained(queue) == ["patient", "urgent"]


def test_what_was_not_used_while_away_is_not_saved_up() -> None:
    queue = make()
    for _ in range(20):
        queue.enter("busy", NORMAL)
    for _ in range(10):
        queue.take()
    for _ in range(10):
        queue.enter("late", NORMAL)
    first = Counter(drained(queue)[:10])
    assert first["late"] in (5, 6)


def test_who_left_is_not_served_and_leaving_twice_is_nothing() -> None:
    queue = make()
    first, second = queue.enter("a", NORMAL), queue.enter("a", NORMAL)
    queue.leave(first)
    queue.leave(first)
    assert len(queue) == 1
    assert queue.take() is second
    queue.leave(second)
    assert len(queue) == queue.caller_count == 0


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=2))
def test_callers_that_wait_are_served_in_equal_parts(lengths: dict[str, int]) -> None:
    queue = make()
    for caller, length in lengths.items():
        for _ in range(length):
            queue.enter(caller, NORMAL)
    served: Counter[str] = Counter()
    for _ in range(sum(lengths.values())):
        taken = queue.take()
        assert taken is not None
        served[taken.caller] += 1
        still = [served[caller] for caller, length in lengths.items() if served[caller] < length]
        # Among those who still wait, nobody is more than one turn ahead, and nobody is behind one that has finished.
        assert max(still, default=0) - min(still, default=0) <= 1
    assert served == lengths


@given(st.integers(2, 20), st.sampled_from(list(Priority)), st.integers(1, 5))
def test_no_stream_of_new_callers_keeps_a_call_waiting(room: int, priority: Priority, own: int) -> None:
    clock = Clock()
    queue = make(clock)
    mine = [queue.enter("mine", LOW) for _ in range(own)]
    new = 0
    # One call is served each second, and all room is always taken by callers never seen before.
    for _ in range(10 + 2 * own * (room + own)):
        while len(queue) < room + own:
            queue.enter(f"new {new}", priority)
            new += 1
        clock.now += 1
        queue.take()
        if mine[-1].gone:
            return
    raise AssertionError(f"{sum(not m.gone for m in mine)} of {own} calls were never served")


class _Model:
    """The queue as a plain list."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.queue = make(self.clock)
        self.waiting: list[Waiting] = []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.sampled_from("abc"), st.sampled_from(list(Priority))),
            st.tuples(st.just("take")),
            st.tuples(st.just("leave"), st.integers(0, 100)),
            st.tuples(st.just("charge"), st.sampled_from("abcd")),
            st.tuples(st.just("pass"), st.floats(-1, 10)),
        ),
        max_size=100,
    )
)
def test_every_call_is_served_or_leaves_once(steps: list[tuple[str, ...]]) -> None:
    model = _Model()
    for step in steps:
        match step:
            case ("enter", caller, priority):
                model.waiting.append(model.queue.enter(caller, priority))  # type: ignore[arg-type]
            case ("take",):
                taken = model.queue.take()
                assert (taken is None) == (not model.waiting)
                if taken is not None:
                    model.waiting.remove(taken)
            case ("leave", which) if model.waiting:
                model.queue.leave(model.waiting.pop(int(which) % len(model.waiting)))
            case ("charge", caller):
                model.queue.charge(caller)
            case ("pass", seconds):
                model.clock.now += float(seconds)
        assert len(model.queue) == len(model.waiting) == len(list(model.queue))
        assert all(model.queue.waiting_of(c) == sum(w.caller == c for w in model.waiting) for c in "abcd")
        if not model.waiting:
            assert model.queue.caller_count == 0
