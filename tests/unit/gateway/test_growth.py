"""When a queue that grows says that there is too much to do."""

from collections.abc import Iterable

from services.gateway.growth import Growth


def goes_on(growth: Growth, rises: Iterable[tuple[float, int]]) -> list[bool]:
    return [growth.goes_on(waiting, now, for_s=0.1, by=16, a_second=10) for now, waiting in rises]


def test_calls_that_come_together_are_no_growth() -> None:
    assert not any(goes_on(Growth(), ((0.0015 * i, i) for i in range(1, 60))))


def test_a_queue_that_goes_on_growing_is_seen() -> None:
    seen = goes_on(Growth(), ((0.004 * i, i) for i in range(1, 60)))
    assert seen.index(True) == 25  # after 0.1 s
    assert all(seen[25:])


def test_a_slow_rise_has_to_be_a_large_one() -> None:
    seen = goes_on(Growth(), ((0.05 * i, i) for i in range(1, 60)))
    assert seen.index(True) == 16


def test_callers_that_come_one_by_one_are_no_growth() -> None:
    assert not any(goes_on(Growth(), ((0.2 * i, i) for i in range(1, 60))))


def test_as_many_as_there_were_before_are_no_growth() -> None:
    growth = Growth()
    assert not any(goes_on(growth, ((0.001 * i, i) for i in range(1, 60))))
    assert not any(goes_on(growth, ((1 + 0.01 * i, i) for i in range(1, 60))))


def test_more_callers_that_join_at_once_are_no_growth() -> None:
    growth = Growth()
    assert not any(goes_on(growth, ((0.001 * i, i) for i in range(1, 40))))
    assert not any(goes_on(growth, ((5 + 0.001 * i, 39 + i) for i in range(1, 40))))
    assert any(goes_on(growth, ((10 + 0.004 * i, 78 + i) for i in range(1, 40))))


def test_callers_that_come_as_fast_as_they_can_be_served_are_no_growth() -> None:
    growth = Growth()
    rises = [(0.008 * i, i) for i in range(1, 33)]  # 125 a second
    assert not any(growth.goes_on(waiting, now, for_s=0.1, by=12, a_second=500) for now, waiting in rises)
