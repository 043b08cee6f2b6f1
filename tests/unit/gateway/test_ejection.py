"""Who is left out for failing its calls, for how long, and how it comes back."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.ejection import EjectionRules, Record, Standing, speaks_against, verdict

RULES = EjectionRules()
Code = grpc.StatusCode


def record(*, good: int = 0, bad: int = 0, now: float = 0.0) -> Record:
    made = Record(RULES)
    for _ in range(good):
        made.succeeded(now)
    for _ in range(bad):
        made.failed(now)
    return made


@pytest.mark.parametrize(
    ("code", "said", "counts"),
    [
        (Code.UNAVAILABLE, True, True),
        (Code.INTERNAL, True, True),
        (Code.UNKNOWN, False, True),
        (Code.DEADLINE_EXCEEDED, False, True),  # it never said a word
        (Code.DEADLINE_EXCEEDED, True, None),
        (Code.RESOURCE_EXHAUSTED, True, None),
        (Code.CANCELLED, False, None),
        (Code.INVALID_ARGUMENT, True, False),
        (Code.NOT_FOUND, True, False),
    ],
)
def test_which_ends_speak_against_an_endpoint(code: grpc.StatusCode, said: bool, counts: bool | None) -> None:
    assert speaks_against(code, said_by_server=said) is counts


def test_failures_in_a_row_or_a_large_share_of_failures() -> None:
    well = [record(good=50)]
    assert verdict(record(good=100, bad=4), well, 0.0, RULES) is None
    assert verdict(record(good=100, bad=5), well, 0.0, RULES) == "in a row"
    flaky = record()
    for _ in range(15):
        flaky.succeeded(0.0)
        flaky.failed(0.0)
    assert verdict(flaky, well, 0.0, RULES) == "share"
    # Of a minute ago little is left.
    assert verdict(flaky, well, 60.0, RULES) is None


def test_a_failure_that_all_have_ejects_nobody() -> None:
    assert verdict(record(bad=50), [record(bad=50), record(bad=40, good=5)], 0.0, RULES) is None
    assert verdict(record(bad=50), [], 0.0, RULES) is None


@given(count=st.integers(1, 12), most=st.sampled_from([0.1, 0.3, 0.5]))
def test_at_most_a_share_of_the_pool_is_out_and_never_all(count: int, most: float) -> None:
    rules = EjectionRules(most_ejected=most)
    records = [record(bad=6) for _ in range(count)]
    healthy = [record(good=100) for _ in range(count)]
    for one in records:
        others = [r for r in (*records, *healthy) if r is not one]
        if verdict(one, others, 0.0, rules):
            one.eject(0.0)
    out = sum(r.standing is Standing.EJECTED for r in records)
    assert out == max(1, int(2 * count * most))


def test_each_ejection_lasts_twice_as_long_up_to_a_minute() -> None:
    one = record(bad=5)
    assert [one.eject(0.0) for _ in range(6)] == [5, 10, 20, 40, 60, 60]


def test_a_trial_that_goes_well_brings_it_back_and_one_that_fails_does_not() -> None:
    one = record(bad=5)
    one.eject(0.0)
    one.try_again()
    assert one.standing is Standing.ON_TRIAL
    one.failed(6.0)
    assert verdict(one, [], 6.0, RULES) == "trial"
    assert one.eject(6.0) == 10
    one.try_again()
    assert not one.succeeded(17.0)
    assert one.succeeded(17.0)
    assert (one.standing, one.recent(17.0)) == (Standing.IN, (0, 0))
    # Soon out again, it is out for longer; after five good minutes, as if nothing had been.
    assert one.eject(20.0) == 20
    one.try_again()
    one.succeeded(41.0)
    one.succeeded(41.0)
    assert one.eject(342.0) == 5


def test_who_is_out_is_not_put_out_again_by_calls_that_end_late() -> None:
    one = record(bad=5)
    one.eject(0.0)
    for _ in range(10):
        one.failed(1.0)
    assert verdict(one, [record(good=50)], 1.0, RULES) is None


def test_nobody_is_left_out_if_it_is_switched_off() -> None:
    assert verdict(record(bad=50), [record(good=50)], 0.0, EjectionRules(consecutive=0)) is None
