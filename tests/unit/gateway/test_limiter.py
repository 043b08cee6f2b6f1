"""What the limit learns, from servers simulated event by event: no time passes but the simulation's."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.limiter import AdaptiveLimit, Said
from tests.support.clock import Clock


@dataclass
class Seen:
    """Of the second half of a simulation."""

    goodput: float  # answers a second
    latency_s: float  # mean
    limit: float  # mean


def simulate(
    limit: AdaptiveLimit,
    clock: Clock,
    *,
    slots: Callable[[float], int],
    seconds: Callable[[random.Random, int], float],
    for_s: float,
    offered: int = 10_000,
    seed: int = 1,
) -> Seen:
    """Keep as many calls under way as the limit allows, up to `offered`, at a server of `slots(time)` workers.

    seconds: how long a worker takes, given how many are at work.
    """
    rng = random.Random(seed)
    began_at = clock.now
    numbers = itertools.count()
    queue: list[tuple[float, int]] = []  # given to the server and not begun
    done: list[tuple[float, int, float]] = []  # (end, number, given at)
    answers, latencies, limits = 0, 0.0, 0.0
    under_way = 0
    while clock.now - began_at < for_s:
        while under_way < min(limit.limit, offered):
            queue.append((clock.now, next(numbers)))
            under_way += 1
        while queue and len(done) < slots(clock.now - began_at):
            given, number = queue.pop(0)
            heapq.heappush(done, (clock.now + seconds(rng, len(done) + 1), number, given))
        clock.now, _, given = heapq.heappop(done)
        took = clock.now - given
        limit.sample("m", began=given, seconds=took, under_way=under_way, waiting=offered - under_way)
        under_way -= 1
        if clock.now - began_at > for_s / 2:
            answers, latencies, limits = answers + 1, latencies + took, limits + limit.limit
    return Seen(answers / (for_s / 2), latencies / answers, limits / answers)


def make(clock: Clock, *, initial: int = 64, least: int = 2, most: int = 1000) -> AdaptiveLimit:
    return AdaptiveLimit(least=least, initial=initial, most=most, clock=clock)


def jitter(mean_s: float, share: float = 0.2) -> Callable[[random.Random, int], float]:
    return lambda rng, _busy: mean_s * rng.uniform(1 - share, 1 + share)


@pytest.mark.parametrize(("slots", "initial"), [(4, 64), (8, 2), (16, 64), (40, 64), (100, 20)])
def test_a_server_that_is_offered_too_much_is_kept_busy_and_not_queued_at(slots: int, initial: int) -> None:
    clock = Clock()
    seen = simulate(make(clock, initial=initial), clock, slots=lambda _: slots, seconds=jitter(0.1), for_s=120)
    assert seen.goodput >= 0.95 * slots / 0.1
    assert seen.latency_s <= 1.6 * 0.1


def test_calls_whose_times_differ_much_do_not_starve_the_server() -> None:
    clock = Clock()
    seen = simulate(
        make(clock), clock, slots=lambda _: 16, seconds=lambda rng, _: rng.expovariate(10) + 1e-4, for_s=200
    )
    assert seen.goodput >= 0.85 * 160
    assert seen.latency_s <= 2 * 0.1


def test_a_server_that_works_on_more_at_once_is_given_more_at_once() -> None:
    # Alone a call takes 100 ms, among 16 it takes 250 ms: 64 a second instead of 10.
    def batched(_rng: random.Random, busy: int) -> float:
        return 0.09 + 0.01 * busy

    clock = Clock()
    limit = make(clock)
    simulate(limit, clock, slots=lambda _: 16, seconds=batched, for_s=60, offered=1)  # a quiet night teaches 100 ms
    seen = simulate(limit, clock, slots=lambda _: 16, seconds=batched, for_s=240)
    assert seen.goodput >= 0.8 * 16 / 0.25


def test_what_the_endpoints_say_they_work_on_at_a_time_is_never_withheld() -> None:
    clock = Clock()
    limit = make(clock, initial=64)
    limit.scale(1, Said(slots=16))
    assert limit.limit == 24  # where to begin
    for _ in range(20):
        clock.now += 1
        limit.overloaded()
    assert limit.limit == 16
    limit.scale(2, Said(slots=32))
    assert limit.limit == 32


def test_what_was_guessed_or_learned_before_the_endpoints_spoke_is_given_up_for_what_they_say() -> None:
    clock = Clock()
    limit = make(clock, initial=64)
    simulate(limit, clock, slots=lambda _: 4, seconds=jitter(0.05), for_s=60, offered=3)
    assert limit.limit == 64
    limit.scale(1, Said(slots=4, all_said=True))
    assert limit.limit == 6
    seen = simulate(limit, clock, slots=lambda _: 4, seconds=jitter(0.05), for_s=60)
    assert seen.goodput >= 0.98 * 4 / 0.05
    assert seen.limit <= 6


def test_one_endpoint_that_says_nothing_leaves_the_limit_open_above() -> None:
    clock = Clock()
    limit = make(clock, initial=64)
    simulate(limit, clock, slots=lambda _: 4, seconds=jitter(0.05), for_s=60, offered=3)
    limit.scale(2, Said(slots=4))
    assert limit.limit == 128


def test_a_server_that_becomes_slower_and_faster_is_followed() -> None:
    clock = Clock()
    limit = make(clock)
    fast = simulate(limit, clock, slots=lambda _: 16, seconds=jitter(0.05), for_s=60)
    slow = simulate(limit, clock, slots=lambda _: 4, seconds=jitter(0.05), for_s=60)
    again = simulate(limit, clock, slots=lambda _: 16, seconds=jitter(0.05), for_s=60)
    assert slow.latency_s <= 2 * 0.05
    assert slow.goodput >= 0.93 * 4 / 0.05
    assert again.goodput >= 0.93 * 16 / 0.05
    assert fast.limit > slow.limit < again.limit


def test_a_model_that_takes_four_times_as_long_is_not_taken_for_a_queue() -> None:
    clock = Clock()
    limit = make(clock)
    simulate(limit, clock, slots=lambda _: 16, seconds=jitter(0.05), for_s=60)
    seen = simulate(limit, clock, slots=lambda _: 16, seconds=jitter(0.2), for_s=200)
    assert seen.goodput >= 0.93 * 16 / 0.2


def test_little_load_leaves_the_limit_as_it_is() -> None:
    clock = Clock()
    limit = make(clock)
    simulate(limit, clock, slots=lambda _: 16, seconds=jitter(0.05), for_s=60, offered=3)
    assert limit.limit == 64


def test_a_change_in_what_is_asked_is_not_a_change_in_how_fast_it_is_answered() -> None:
    clock = Clock()
    limit = make(clock)
    for method, seconds in (("short", 0.01), ("long", 3.0)):
        for _ in range(200):
            began = clock.now
            clock.now += seconds
            limit.sample(method, began=began, seconds=seconds, under_way=1, waiting=0)
    assert limit.limit == 64


def test_endpoints_that_come_and_go_scale_it() -> None:
    limit = make(Clock(), initial=10)
    limit.scale(3)
    assert limit.limit == 30
    limit.scale(0)
    limit.scale(1)
    assert limit.limit == 10


def test_a_full_endpoint_lowers_it_once_for_all_that_meet_it() -> None:
    clock = Clock()
    limit = make(clock, initial=100)
    for _ in range(50):
        limit.overloaded()
    assert limit.limit == 90
    clock.now += 1
    limit.overloaded()
    assert limit.limit == 81


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(-5, 100), st.integers(1, 2000), st.integers(0, 300), st.integers(0, 5)),
        max_size=200,
    ),
    st.integers(1, 10),
    st.integers(10, 50),
    st.integers(50, 500),
)
def test_it_stays_within_its_bounds_whatever_is_measured(
    samples: list[tuple[float, float, int, int, int]], least: int, initial: int, most: int
) -> None:
    clock = Clock()
    limit = make(clock, least=least, initial=initial, most=most)
    endpoints = 1
    for passed, seconds, under_way, waiting, ready in samples:
        clock.now += passed
        for _ in range(8):
            limit.sample("m", began=clock.now, seconds=seconds, under_way=under_way, waiting=waiting)
        if waiting % 7 == 0:
            limit.overloaded()
        limit.scale(ready)
        endpoints = ready or endpoints
        assert max(1, int(0.7 * (least * endpoints))) <= limit.limit <= most * endpoints
