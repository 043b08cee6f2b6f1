"""Documents at a time, and which are refused at the door."""

import asyncio

import pytest

from services.kit.admission import Priority
from services.kit.faults import Fault
from services.ocr.documents.places import Place, Places


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def enter(places: Places, *, priority: Priority = Priority.NORMAL, left: float | None = None, size: int = 1) -> Place:
    return places.enter(priority=priority, time_left_s=left, size_bytes=size)


def places(clock: Clock | None = None, *, at_a_time: int = 1, queue_limit: int = 2, bytes_limit: int = 100) -> Places:
    return Places(at_a_time=at_a_time, queue_limit=queue_limit, queue_bytes_limit=bytes_limit, clock=clock or Clock())


async def test_the_first_begins_at_once_and_the_others_learn_their_positions() -> None:
    all_places = places()
    with enter(all_places) as first:
        assert await first.next_position() is None
        with enter(all_places) as second:
            assert await second.next_position() == 0
            third = enter(all_places)
            assert await third.next_position() == 1
            waiting = asyncio.create_task(third.next_position())
        # The second left without having begun.
        assert await waiting == 0
    assert await third.next_position() is None
    assert (all_places.running_count, all_places.waiting_count) == (1, 0)


async def test_urgent_documents_go_first() -> None:
    all_places = places()
    first, normal, urgent = enter(all_places), enter(all_places), enter(all_places, priority=Priority.HIGH)
    with first:
        pass
    assert urgent.granted
    assert not normal.granted
    assert await normal.next_position() == 0


def test_a_full_queue_refuses() -> None:
    all_places = places()
    kept = [enter(all_places) for _ in range(3)]
    with pytest.raises(Fault) as refused:
        enter(all_places)
    assert refused.value.data.reason == "QUEUE_FULL"
    assert len(kept) == 3


def test_too_many_bytes_refuse_and_leave_nothing_behind() -> None:
    all_places = places(bytes_limit=100)
    kept = [enter(all_places), enter(all_places, size=80)]
    with pytest.raises(Fault) as refused:
        enter(all_places, size=30)
    assert refused.value.data.reason == "QUEUE_BYTES_FULL"
    assert all_places.waiting_count == 1
    assert len(kept) == 2


def test_pages_teach_how_long_a_document_takes() -> None:
    clock = Clock()
    all_places = places(clock)
    with enter(all_places) as place:
        all_places.check_deadline(place, page_count=10, time_left_s=0.5)  # nothing is known yet
        clock.now += 20
        place.completed = True
    assert place.queue_ms == 0
    with enter(all_places, left=3) as place:
        all_places.check_deadline(place, page_count=1, time_left_s=3)
        with pytest.raises(Fault) as refused:
            all_places.check_deadline(place, page_count=4, time_left_s=3)
        assert refused.value.data.reason == "DEADLINE_TOO_SHORT"
        assert "4 pages need about 8000 ms" in refused.value.data.message
        # At the door: two documents of one page each at least, two seconds each.
        with pytest.raises(Fault) as at_the_door:
            enter(all_places, left=1.9)
        assert at_the_door.value.data.reason == "DEADLINE_TOO_SHORT"


def test_a_document_that_was_given_up_teaches_nothing() -> None:
    clock = Clock()
    all_places = places(clock)
    with enter(all_places):
        clock.now += 1000
    enter(all_places, left=0.1)
