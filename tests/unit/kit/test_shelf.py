"""What is kept of calls with an id: found again within the limits, and nothing beyond them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.faults import Fault, Kind
from services.kit.shelf import Entry, Shelf


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, *, count_limit: int = 4, bytes_limit: int = 100, keep_s: float = 60) -> Shelf[str]:
    return Shelf(count_limit=count_limit, bytes_limit=bytes_limit, keep_s=keep_s, clock=clock)


def find(shelf: Shelf[str], request_id: str, asked: bytes = b"a", caller: str = "") -> str | None:
    entry = shelf.find(caller, request_id, asked, field="metadata inkwell-request-id")
    return None if entry is None else entry.call


def answered(shelf: Shelf[str], request_id: str, size: int = 1) -> Entry[str]:
    entry = shelf.put("", request_id, b"a", f"call {request_id}")
    shelf.grow(entry, size)
    shelf.end(entry)
    return entry


def test_a_call_is_found_from_its_beginning_until_it_is_old() -> None:
    clock = Clock()
    shelf = make(clock)
    entry = shelf.put("", "one", b"a", "call one")
    clock.now += 1000  # one that is under way does not age
    assert find(shelf, "one") == "call one"
    shelf.end(entry)
    clock.now += 59
    assert find(shelf, "one") == "call one"
    clock.now += 1
    assert find(shelf, "one") is None
    assert (len(shelf), shelf.bytes_held) == (0, 0)


def test_another_request_under_the_same_id_is_refused() -> None:
    shelf = make(Clock())
    answered(shelf, "one")
    with pytest.raises(Fault) as refused:
        find(shelf, "one", b"b")
    assert (refused.value.data.kind, refused.value.data.reason) == (Kind.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert refused.value.data.fields[0].field == "metadata inkwell-request-id"


def test_callers_do_not_meet() -> None:
    shelf = make(Clock())
    shelf.put("ann", "one", b"a", "of ann")
    assert find(shelf, "one", b"b", caller="bob") is None
    shelf.put("bob", "one", b"b", "of bob")
    assert find(shelf, "one", b"a", caller="ann") == "of ann"


def test_what_ended_first_makes_room() -> None:
    shelf = make(Clock(), count_limit=3)
    shelf.put("", "under way", b"a", "call under way")
    for name in ("one", "two", "three"):
        answered(shelf, name)
    assert [find(shelf, name) for name in ("under way", "one", "two", "three")] == [
        "call under way", None, "call two", "call three",
    ]  # fmt: skip


def test_an_answer_that_is_too_large_is_not_kept_and_drives_out_no_more_than_it_must() -> None:
    shelf = make(Clock(), bytes_limit=10)
    running = shelf.put("", "running", b"a", "call running")
    shelf.grow(running, 4)
    large = shelf.put("", "large", b"a", "call large")
    shelf.grow(large, 7)
    assert not large.kept
    assert (find(shelf, "large"), find(shelf, "running")) == (None, "call running")
    shelf.grow(large, 7)
    shelf.end(large)
    assert shelf.bytes_held == 4


# (what, which call, bytes or seconds)
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "grow", "end", "remove", "wait"]), st.integers(0, 7), st.integers(0, 60)),
    max_size=60,
)


@given(STEPS, st.integers(1, 4), st.integers(0, 100))
def test_limits_hold_whatever_happens_and_what_stands_is_what_was_put(
    steps: list[tuple[str, int, int]], count_limit: int, bytes_limit: int
) -> None:
    clock = Clock()
    shelf = make(clock, count_limit=count_limit, bytes_limit=bytes_limit, keep_s=60)
    entries: dict[int, Entry[str]] = {}
    for what, which, amount in steps:
        entry = entries.get(which)
        if what == "put" and find(shelf, str(which)) is None:
            entries[which] = shelf.put("", str(which), b"a", str(which))
        elif what == "wait":
            clock.now += amount
        elif entry is not None and entry.ended_at is None:
            if what == "grow":
                shelf.grow(entry, amount)
            elif what == "end":
                shelf.end(entry)
            elif what == "remove":
                shelf.remove(entry)
        assert len(shelf) <= count_limit
        assert shelf.bytes_held <= bytes_limit
        found = {name for name in range(8) if find(shelf, str(name)) is not None}
        assert found == {
            name
            for name, each in entries.items()
            if each.kept and (each.ended_at is None or clock.now - each.ended_at < 60)
        }
        assert shelf.bytes_held == sum(entries[name].bytes_held for name in found)
