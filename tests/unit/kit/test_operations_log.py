"""The log of operations: one end, events without gaps, places in the queue, and who takes over from whom."""

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from services.kit.operations.kinds import Cancelled, Done, Outcome, Progress, Queued, Succeeded
from services.kit.operations.log import Log, Row, SupersededError
from services.kit.operations.settings import OperationsSettings, database_url


class Clock:
    now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Iterator[Log]:
    log = open_log(tmp_path, clock)
    yield log
    log.close()


def open_log(folder: Path, clock: Clock) -> Log:
    log = Log(sa.URL.create("sqlite", database=str(folder / "log.sqlite")), schema=None, clock_ms=clock)
    log.create()
    return log


def insert(log: Log, row_id: str, *, most: int = 1000, priority: int = 2, owner: str = "") -> Row | None:
    return log.insert(row_id, kind="k", owner=owner, request='{"a":1}', priority=priority, most=most)


def begin(log: Log, row_id: str, token: str, *, attempts: int = 10, give_up: Outcome | None = None) -> Row | None:
    return log.begin(row_id, token, attempts=attempts, give_up=give_up or Cancelled())


SUCCEEDED = Succeeded(msgspec.Raw(b'{"total":3}'))


def test_an_operation_ends_once(log: Log, clock: Clock) -> None:
    insert(log, "a")
    assert begin(log, "a", "run")
    clock.now_ms += 5
    assert log.finish("a", "run", SUCCEEDED)
    row = log.get("a")
    assert row is not None
    assert isinstance(row.outcome, Succeeded)
    assert bytes(row.outcome.response) == b'{"total":3}'
    assert (row.created_ms, row.ended_ms, row.last) == (1_000_000, 1_000_005, 1)
    assert not log.finish("a", "run", SUCCEEDED)
    assert not log.finish("a", None, Cancelled())
    assert begin(log, "a", "another") is None
    with pytest.raises(SupersededError):
        log.append("a", "run", Progress(1, 1))
    assert log.events("a", 0, 10) == [(1, Done())]


def test_a_run_that_was_taken_over_says_nothing_more(log: Log) -> None:
    insert(log, "a")
    begin(log, "a", "first")
    assert log.append("a", "first", Progress(1, 2)) == 1
    again = begin(log, "a", "second")
    assert again is not None
    assert again.attempts == 2
    with pytest.raises(SupersededError):
        log.append("a", "first", Progress(2, 2))
    assert not log.finish("a", "first", SUCCEEDED)
    log.leave("a", "first")
    assert log.current({"a": "first"}) == set()
    assert log.current({"a": "second"}) == {"a"}
    assert log.append("a", "second", Progress(1, 2)) == 2
    assert log.finish("a", "second", SUCCEEDED)
    assert [sequence for sequence, _ in log.events("a", 0, 10)] == [1, 2, 3]


def test_an_operation_that_is_lost_too_often_ends(log: Log) -> None:
    insert(log, "a")
    for token in ("first", "second"):
        assert begin(log, "a", token, attempts=2)
    log.leave("a", "second")  # which is no attempt
    assert begin(log, "a", "third", attempts=2)
    assert begin(log, "a", "fourth", attempts=2, give_up=SUCCEEDED) is None
    assert isinstance(log.get("a").outcome, Succeeded)  # type: ignore[union-attr]


@given(writers=st.integers(2, 4), each=st.integers(1, 8))
def test_events_of_writers_at_the_same_time_have_no_gaps(
    tmp_path_factory: pytest.TempPathFactory, writers: int, each: int
) -> None:
    log = open_log(tmp_path_factory.mktemp("log"), Clock())
    insert(log, "a")
    begin(log, "a", "run")

    def write() -> None:
        for number in range(each):
            log.append("a", "run", Progress(number + 1, each))

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = writers * each
    assert [sequence for sequence, _ in log.events("a", 0, 1000)] == list(range(1, total + 1))
    assert log.lasts(["a", "b"]) == {"a": total}
    log.close()


def test_ids_are_taken_once_and_the_queue_has_an_end(log: Log) -> None:
    first = insert(log, "a", owner="me", most=2)
    assert insert(log, "a", owner="you", most=2) == first
    assert insert(log, "b", most=2)
    assert insert(log, "c", most=2) is None
    assert insert(log, "b", most=2), "one that is there needs no place"
    begin(log, "a", "run")
    assert insert(log, "c", most=2)


def test_places_are_told_when_they_change(log: Log, clock: Clock) -> None:
    ids = [f"{number:02}" for number in range(40)]
    for row_id in ids:
        clock.now_ms += 1
        insert(log, row_id)
    assert log.line_up() == ids
    assert log.line_up() == []
    urgent = "urgent"
    insert(log, urgent, priority=1)
    begin(log, ids[0], "run")
    log.finish(ids[1], None, Cancelled())
    log.line_up()
    assert log.events(urgent, 0, 10) == [(1, Queued(0))]
    assert log.events(ids[2], 0, 10) == [(1, Queued(2)), (2, Queued(1))]
    # Far back, not every step is told; but the last steps are.
    assert log.events(ids[39], 0, 10) == [(1, Queued(39))]
    for row_id in [urgent, *ids[2:]]:
        begin(log, row_id, "run")
        log.line_up()
    told = [event.position for _, event in log.events(ids[39], 0, 100) if isinstance(event, Queued)]
    assert told == sorted(told, reverse=True)
    assert told[-16:] == list(range(15, -1, -1))
    assert len(told) < 25


def test_pages_go_from_new_to_old_and_are_the_owners_only(log: Log, clock: Clock) -> None:
    for number in range(6):
        clock.now_ms += number % 2  # two at the same moment
        insert(log, str(number), owner="me")
    insert(log, "theirs", owner="you")
    log.finish("3", None, Cancelled())

    def ids(rows: list[Row]) -> list[str]:
        return [row.id for row in rows]

    everything = log.page(owner="me", done=None, before=None, limit=10)
    assert ids(everything) == ["5", "4", "3", "2", "1", "0"]
    paged: list[str] = []
    before: tuple[int, str] | None = None
    while page := log.page(owner="me", done=None, before=before, limit=1):
        paged += ids(page)
        before = (page[-1].created_ms, page[-1].id)
    assert paged == ids(everything)
    assert ids(log.page(owner="me", done=True, before=None, limit=10)) == ["3"]
    assert "3" not in ids(log.page(owner="me", done=False, before=None, limit=10))


def test_what_ended_long_ago_is_forgotten_and_nothing_else(log: Log, clock: Clock) -> None:
    for row_id in ("old", "new", "running"):
        insert(log, row_id)
    log.finish("old", None, Cancelled())
    clock.now_ms += 1000
    log.finish("new", None, Cancelled())
    assert log.expired(1000, 10) == ["old"]
    assert log.forget(["old", "running"]) == 1
    assert log.get("old") is None
    assert log.events("old", 0, 10) == []
    assert log.get("running") is not None
    assert log.expired(1000, 10) == []


def test_a_lost_process_is_taken_over_by_one_other(log: Log, clock: Clock) -> None:
    log.beat("lost")
    log.beat("alive")
    clock.now_ms += 900
    log.beat("alive")
    assert log.claim_lost(silent_ms=1000) == []
    clock.now_ms += 100
    assert log.claim_lost(silent_ms=1000) == ["lost"]
    assert log.claim_lost(silent_ms=1000) == [], "somebody else claimed it already"
    clock.now_ms += 1000
    log.beat("alive")
    assert log.claim_lost(silent_ms=1000) == ["lost"], "whoever claimed it was lost, too"
    log.remove_process("lost")
    log.retire("alive")
    assert log.claim_lost(silent_ms=1000) == ["alive"], "it said that it ends"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("", "sqlite:////home/x/.local/share/inkwell/operations/compiler.sqlite"),
        ("/data/o.sqlite", "sqlite:////data/o.sqlite"),
        ("~/o.sqlite", "sqlite:////home/x/o.sqlite"),
        ("sqlite:////data/o.sqlite", "sqlite:////data/o.sqlite"),
        ("postgresql://u:p@db:5432/inkwell", "postgresql+psycopg://u:***@db:5432/inkwell"),
    ],
)
def test_where_operations_are_kept(value: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert str(database_url(OperationsSettings(operations_database=value), "compiler")) == shown


@pytest.mark.parametrize("value", ["mysql://u:secret@db/inkwell", "http://u:secret@db"])
def test_other_databases_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="postgresql://user:password@host/database") as refused:
        OperationsSettings(operations_database=value)
    assert "secret" not in str(refused.value)
