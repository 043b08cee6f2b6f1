"""The expected wait at an endpoint, and the choice of the least."""

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.gateway import balance
from services.gateway.balance import BalanceRules
from services.gateway.ejection import EjectionRules, Record
from services.gateway.endpoint import State
from services.kit.orca import Load

RULES = BalanceRules(stale_s=5.0, slow_start_s=10.0)
NOW = 1000.0


@dataclass(eq=False)
class At:
    """Stands for an endpoint where only the choice matters."""

    load: Load | None = None
    in_flight: int = 0
    in_flight_then: int = 0
    heard_at: float = NOW
    ready_at: float = -math.inf
    reporting: bool = True
    turn: int = 0
    state: State = State.READY
    record: Record = field(default_factory=lambda: Record(EjectionRules()))


@dataclass
class Pool:
    endpoints: list[Any]


def wait(endpoint: At, now: float = NOW) -> float:
    return balance.expected_wait_s(endpoint, now, RULES)  # type: ignore[arg-type]


def chosen(*endpoints: At, tried: tuple[At, ...] = ()) -> Any:
    return balance.choose([[Pool(list(endpoints))]], tried, NOW, RULES)  # type: ignore[arg-type]


def test_a_free_slot_is_no_wait() -> None:
    assert wait(At(Load(4, 3, 0, 0.0, 2.0))) == 0
    # What we have sent since is in the slots too.
    assert wait(At(Load(4, 3, 0, 0.0, 2.0), in_flight=6, in_flight_then=5)) == 0.5
    assert wait(At(Load(4, 3, 0, 0.0, 2.0), in_flight=8, in_flight_then=5)) == 1.5
    # And what has ended since is not.
    assert wait(At(Load(4, 4, 1, 1.0, 2.0), in_flight=1, in_flight_then=3)) == 0


def test_the_endpoint_knows_best_how_long_its_queue_is() -> None:
    assert wait(At(Load(4, 4, 1, 30.0, 2.0))) == 30
    assert wait(At(Load(4, 4, 1, 30.0, 2.0), in_flight=2)) == 31


def test_a_wait_is_weighed_and_not_the_number_of_calls() -> None:
    slow = At(Load(1, 1, 0, 20.0, 40.0))
    quick = At(Load(1, 1, 5, 1.5, 0.2))
    assert chosen(slow, quick) is quick


def test_of_the_free_the_one_with_the_most_room() -> None:
    small, large = At(Load(2, 1, 0, 0.0, 1.0)), At(Load(8, 2, 0, 0.0, 1.0))
    assert chosen(small, large) is large


def test_who_no_longer_reports_counts_as_saturated() -> None:
    silent = At(Load(8, 0, 0, 0.0, 1.0), heard_at=NOW - 5.1)
    busy = At(Load(1, 1, 50, 100.0, 2.0))
    assert chosen(silent, busy) is busy
    assert chosen(silent, busy, tried=(busy,)) is silent
    # Of several, our own calls decide.
    other = At(Load(8, 8, 99, 99.0, 1.0), heard_at=NOW - 6, in_flight=1)
    silent.in_flight = 2
    assert chosen(silent, other) is other


def test_who_never_reported_is_judged_by_our_own_calls() -> None:
    idle, busy = At(reporting=False, heard_at=-math.inf), At(reporting=False, heard_at=-math.inf, in_flight=1)
    assert chosen(busy, idle) is idle
    assert (wait(idle), wait(busy)) == (0, 1)


def test_a_cold_endpoint_is_given_one_call_and_then_more_and_more() -> None:
    def taken(age_s: float) -> int:
        """Of 16 calls that come at once, those that go to the cold one."""
        warm = At(Load(8, 0, 0, 0.0, 1.0))
        cold = At(Load(8, 0, 0, 0.0, 1.0), ready_at=NOW - age_s)
        for turn in range(16):
            one = chosen(warm, cold)
            one.in_flight += 1
            one.turn = turn + 1
        return cold.in_flight

    counts = [taken(age) for age in (0, 2, 5, 8, 10)]
    assert counts == sorted(counts)
    assert counts[0] <= 2
    assert counts[-1] == 8


def test_those_left_out_are_the_last_resort_and_those_on_trial_get_one_call_at_a_time() -> None:
    good, bad = At(Load(1, 1, 9, 90.0, 9.0)), At(Load(8, 0, 0, 0.0, 1.0))
    bad.record.eject(NOW)
    assert chosen(good, bad) is good
    assert chosen(good, bad, tried=(good,)) is bad
    bad.record.try_again()
    assert chosen(good, bad) is bad
    bad.in_flight = 1
    assert chosen(good, bad) is good


def test_another_tier_comes_before_those_left_out() -> None:
    ejected, fallback = At(), At()
    ejected.record.eject(NOW)
    tiers: Any = [[Pool([ejected])], [Pool([fallback])]]
    chosen: Any = balance.choose(tiers, (), NOW, RULES)
    assert chosen is fallback
    tried: Any = [fallback]
    chosen = balance.choose(tiers, tried, NOW, RULES)
    assert chosen is ejected


loads = st.none() | st.builds(
    Load,
    slots=st.integers(1, 64),
    running=st.integers(0, 64),
    waiting=st.integers(0, 1000),
    wait_s=st.floats(0, 1e4),
    call_s=st.floats(0, 100),
)
endpoints = st.builds(
    At,
    load=loads,
    in_flight=st.integers(0, 100),
    in_flight_then=st.integers(0, 100),
    heard_at=st.floats(NOW - 20, NOW),
    ready_at=st.floats(NOW - 20, NOW),
    reporting=st.booleans(),
    state=st.sampled_from(State),
)


@given(st.lists(endpoints, max_size=6))
def test_whoever_is_ready_is_found_and_waits_are_finite(some: list[At]) -> None:
    one = chosen(*some)
    ready = [e for e in some if e.state is State.READY]
    assert (one is None) == (not ready)
    assert all(0 <= wait(e) < math.inf for e in some)
    fresh = [e for e in ready if not balance.stale(e, NOW, RULES)]  # type: ignore[arg-type]
    if fresh:
        assert one in fresh
        assert wait(one) == min(map(wait, fresh))


@given(endpoints, st.integers(1, 10))
def test_more_calls_never_make_the_wait_shorter(endpoint: At, more: int) -> None:
    before = wait(endpoint)
    endpoint.in_flight += more
    assert wait(endpoint) >= before
