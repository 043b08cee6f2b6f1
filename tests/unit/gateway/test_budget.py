"""Retries are a bounded share of the calls."""

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.budget import RetryBudget
from tests.support.clock import Clock


def test_a_full_bucket_pays_for_all_calls_of_an_endpoint_that_died() -> None:
    budget = RetryBudget(ratio=0.2, reserve=32, refill_per_s=0, clock=Clock())
    assert [budget.take() for _ in range(33)] == [True] * 32 + [False]


def test_calls_and_time_fill_it_again() -> None:
    clock = Clock()
    budget = RetryBudget(ratio=0.25, reserve=2, refill_per_s=0.5, clock=clock)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.call()
    assert [budget.take() for _ in range(2)] == [True, False]
    clock.now += 2
    assert [budget.take() for _ in range(2)] == [True, False]
    clock.now -= 1000  # a clock that was set back neither gives nor takes
    assert not budget.take()


@given(
    st.lists(st.sampled_from(["call", "retry", "second"]), max_size=300),
    st.floats(0, 1),
    st.integers(1, 20),
    st.floats(0, 5),
)
def test_never_more_retries_than_saved_earned_and_given(
    events: list[str], ratio: float, reserve: int, refill: float
) -> None:
    clock = Clock()
    budget = RetryBudget(ratio=ratio, reserve=reserve, refill_per_s=refill, clock=clock)
    calls = seconds = made = 0
    for event in events:
        if event == "call":
            budget.call()
            calls += 1
        elif event == "second":
            clock.now += 1
            seconds += 1
        else:
            made += budget.take()
        assert made <= reserve + ratio * calls + refill * seconds + 1e-6
        assert 0 <= budget.left <= reserve
