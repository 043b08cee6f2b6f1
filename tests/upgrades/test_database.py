"""The operations' database from one version to the next and back, with what is in it, while both are running."""

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from services.kit.operations import migrate
from services.kit.operations.kinds import Done, Queued, Succeeded
from services.kit.operations.log import Log
from services.kit.operations.schema import MIGRATIONS, VERSION, Migration, Schema, SchemaError
from tests.support.child_work import Todo
from tests.support.operations import serving
from tests.support.postgres import postgres
from tests.upgrades.tables_1 import Tables

OUTCOME = '{"type":"succeeded","response":{"steps":3}}'
# Kept for a week, so not so long ago.
NOW_MS = int(time.time() * 1000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "operations.sqlite"


def url(file: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(file))


@pytest.fixture
def engine(file: Path) -> Iterator[sa.Engine]:
    opened = sa.create_engine(url(file))
    yield opened
    opened.dispose()


@pytest.fixture
def tables(engine: sa.Engine) -> Tables:
    """A database of version 1, with an operation that has ended and one that waits."""
    made = Tables(None)
    made.create(engine)
    request = msgspec.json.encode(Todo(steps=2)).decode()
    for row_id in (ENDED, WAITING):
        # Long enough ago that whoever starts now looks for what was left waiting.
        made.insert(engine, row_id, kind="work", request=request, created_ms=NOW_MS - 60_000)
    made.end(engine, ENDED, OUTCOME, NOW_MS)
    return made


ENDED, WAITING, NEW = (str(uuid.UUID(int=number)) for number in (1, 2, 3))


def columns(engine: sa.Engine, *, schema: str | None = None) -> dict[str, list[tuple[str, str, bool]]]:
    """Of every table of ours: the columns' names, types and whether they may be empty."""
    inspector = sa.inspect(engine)
    return {
        table: [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table, schema=schema)]
        for table in sorted(inspector.get_table_names(schema=schema))
        if table.startswith("inkwell_")
    }


def opened(file: Path) -> Log:
    log = Log(url(file), schema=None)
    log.create()
    return log


def test_a_new_database_has_the_newest_version(file: Path) -> None:
    log = opened(file)
    assert log.version() == (VERSION, 1)
    log.close()


def test_what_version_1_wrote_is_all_there_after_the_way_forward(file: Path, tables: Tables) -> None:
    log = opened(file)
    assert log.version() == (VERSION, 1)
    ended, waiting = log.get(ENDED), log.get(WAITING)
    assert ended is not None
    assert waiting is not None
    assert (ended.outcome, ended.traceparent) == (Succeeded(msgspec.Raw(b'{"steps":3}')), None)
    assert log.events(ENDED, 0, 10) == [(1, Queued(0)), (2, Done())]
    assert waiting.outcome is None
    assert log.waiting(since_ms=0) == [(WAITING, 2)]
    log.close()


def test_a_database_that_went_forward_is_as_one_that_is_new(file: Path, engine: sa.Engine, tables: Tables) -> None:
    opened(file).close()
    fresh = sa.create_engine("sqlite://")
    with fresh.begin() as c:
        Log(url(file), schema=None)._metadata.create_all(c)
    went, new = columns(engine), columns(fresh)
    assert {"inkwell_schema"} == went.keys() - new.keys()
    assert {name: sorted(went[name]) for name in new} == {name: sorted(new[name]) for name in new}


def test_the_way_back_leaves_what_version_1_made(file: Path, engine: sa.Engine, tables: Tables) -> None:
    before = columns(engine)
    log = opened(file)
    assert log.insert(
        NEW, kind="work", owner="", request="{}", priority=2, most=9, traceparent=f"00-{1:032x}-{1:016x}-01"
    )
    assert log.migrate(1) == ["ALTER TABLE inkwell_operations DROP COLUMN traceparent"]
    assert log.version() == (1, 1)
    log.close()
    assert columns(engine) == before
    assert tables.read(engine, ENDED).outcome == OUTCOME
    assert tables.read(engine, NEW).kind == "work"  # what was written meanwhile stays
    opened(file).close()
    assert tables.read(engine, NEW).kind == "work"


def test_a_process_of_version_1_goes_on_beside_one_of_today(file: Path, engine: sa.Engine, tables: Tables) -> None:
    log = opened(file)
    tables.create(engine)  # it starts again
    tables.insert(engine, NEW, kind="work", request="{}", created_ms=NOW_MS)
    row = log.get(NEW)
    assert row is not None
    assert row.traceparent is None
    tables.end(engine, NEW, OUTCOME, NOW_MS)
    assert log.events(NEW, 0, 10) == [(1, Queued(0)), (2, Done())]
    assert log.version() == (VERSION, 1)
    log.close()


async def test_a_service_of_today_does_what_version_1_was_asked_for(file: Path, tables: Tables) -> None:
    async with serving(file) as caller:
        ended = await caller.get(f"operations/test/{ENDED}")
        assert ended.done
        assert [each.WhichOneof("event") for each in await caller.events(ended.name)] == ["queued", "done"]
        left = await caller.events(f"operations/test/{WAITING}")
        assert left[-1].done.HasField("response")


def test_on_postgres_it_goes_forward_once_and_back(postgres_url: sa.URL) -> None:
    engine = sa.create_engine(postgres_url)
    tables = Tables("inkwell_test")
    tables.create(engine)
    tables.insert(engine, ENDED, kind="work", request="{}", created_ms=NOW_MS)
    before = columns(engine, schema="inkwell_test")
    logs = [Log(postgres_url, schema="inkwell_test") for _ in range(4)]
    with ThreadPoolExecutor(len(logs)) as together:  # replicas that start at once
        list(together.map(Log.create, logs))
    assert {log.version() for log in logs} == {(VERSION, 1)}
    assert logs[0].insert(NEW, kind="work", owner="", request="{}", priority=2, most=9, traceparent="t")
    logs[0].migrate(1)
    assert columns(engine, schema="inkwell_test") == before
    assert [tables.read(engine, row_id).kind for row_id in (ENDED, NEW)] == ["work", "work"]
    for log in logs:
        log.close()
    engine.dispose()


@pytest.fixture
def postgres_url() -> Iterator[sa.URL]:
    with postgres() as server:
        yield sa.make_url(server.address).set(drivername="postgresql+psycopg")


BREAKING = Migration(3, ["ALTER TABLE {operations} ADD COLUMN more TEXT"], [], breaks_older=True)


def newer(monkeypatch: pytest.MonkeyPatch, file: Path, migration: Migration) -> None:
    """Bring a database to a version of tomorrow."""
    later = Schema(None, (*MIGRATIONS, migration))
    log = opened(file)
    with log._engine.begin() as c:
        later.migrate(c, migration.version)
    log.close()


def test_tables_that_are_newer_are_used_if_they_can_be(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer(monkeypatch, file, Migration(3, BREAKING.forward, []))
    log = opened(file)
    assert log.version() == (3, 1)
    assert log.insert(NEW, kind="work", owner="", request="{}", priority=2, most=9)
    log.close()


def test_and_refused_if_not_saying_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer(monkeypatch, file, BREAKING)
    with pytest.raises(SchemaError, match=f"has to know version 3; .* --to {VERSION}"):
        opened(file)


async def test_a_service_does_not_start_on_tables_that_are_too_new(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer(monkeypatch, file, BREAKING)
    with pytest.raises(OSError, match="has to know version 3"):
        async with serving(file):
            pass


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    migrate.main(["test", *arguments])
    return capsys.readouterr().out


def test_the_command_tells_the_version_and_takes_it_back(
    file: Path, tables: Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, str(file)) == "version 1; usable from 1 on\n"
    forward = run(capsys, str(file), "--to", "2").splitlines()
    assert forward == ["ALTER TABLE inkwell_operations ADD COLUMN traceparent TEXT", "version 2; usable from 1 on"]
    assert run(capsys, str(file), "--to", "1").splitlines()[-1] == "version 1; usable from 1 on"


@pytest.mark.parametrize("arguments", [("{file}", "--to", "9"), ("{file}.missing",)])
def test_the_command_refuses_what_it_cannot_do(
    file: Path, tables: Tables, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(capsys, *(argument.format(file=file) for argument in arguments))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("migrate: there is no ")


async def test_the_command_leaves_a_file_alone_that_is_in_use(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(file):
        with pytest.raises(SystemExit):
            run(capsys, str(file), "--to", "1")
    assert "is in use by process" in capsys.readouterr().err


def test_each_migration_has_a_way_back() -> None:
    assert [migration.version for migration in MIGRATIONS] == list(range(2, VERSION + 1))
    assert all(migration.forward and migration.back for migration in MIGRATIONS)
