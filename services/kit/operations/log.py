"""What was asked for and what was said of it, in SQLite or Postgres: the truth that callers are told.

Blocking; every method is one transaction. A run of an operation holds a token: what it writes counts only while the row
still has that token, so a run that was given up elsewhere, or cancelled, can say nothing more. That makes each
operation's events 1, 2, 3 … without gaps, and lets it end once.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from services.kit.operations.kinds import Done, Event, Outcome, Queued
from services.kit.operations.schema import Schema

_event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_outcome_decoder: msgspec.json.Decoder[Outcome] = msgspec.json.Decoder(Outcome)

# Places in the queue that are told one by one; further back, only when a quarter of the way is done. Without that, a
# queue of n operations would write n² / 2 events.
_NEAR_PLACES = 16


class SupersededError(Exception):
    """This run no longer counts: the operation was cancelled, or another process runs it."""


@dataclass(frozen=True)
class Row:
    """An operation as it is stored. Times are milliseconds since 1970; request is JSON."""

    id: str
    kind: str
    owner: str
    request: str
    priority: int
    created_ms: int
    ended_ms: int | None
    last: int  # sequence of its last event
    run: str | None  # token of the run that may write
    attempts: int
    outcome: Outcome | None
    traceparent: str | None  # of the call that asked for it, None if that was not traced


@dataclass(frozen=True)
class Replica:
    """A replica of the database, as the database knows it."""

    name: str
    lag_bytes: int  # of the log, not yet applied there
    lag_s: float  # 0 while nothing is written


class Log:
    """The tables of one service. Raises sqlalchemy.exc.SQLAlchemyError when the database does not answer."""

    def __init__(
        self, url: sa.URL, *, schema: str | None, clock_ms: Callable[[], int] = lambda: int(time.time() * 1000)
    ) -> None:
        self._clock_ms = clock_ms
        self._engine = _sqlite(url) if url.get_backend_name() == "sqlite" else sa.create_engine(url, pool_pre_ping=True)
        self._schema = schema
        metadata = sa.MetaData(schema=schema)
        self._operations = sa.Table(
            "inkwell_operations",
            metadata,
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("kind", sa.Text, nullable=False),
            sa.Column("owner", sa.Text, nullable=False),
            sa.Column("request", sa.Text, nullable=False),
            sa.Column("priority", sa.Integer, nullable=False),  # 1 is served first
            sa.Column("created_ms", sa.BigInteger, nullable=False),
            sa.Column("ended_ms", sa.BigInteger),
            sa.Column("last", sa.Integer, nullable=False),
            sa.Column("run", sa.Text),
            sa.Column("attempts", sa.Integer, nullable=False),
            sa.Column("position", sa.Integer),  # last told place in the queue
            sa.Column("outcome", sa.Text),
            sa.Column("traceparent", sa.Text),
            sa.Index("inkwell_operations_created", "created_ms", "id"),
        )
        self._events = sa.Table(
            "inkwell_operation_events",
            metadata,
            sa.Column("operation_id", sa.Text, primary_key=True),
            sa.Column("sequence", sa.Integer, primary_key=True),
            sa.Column("event", sa.Text, nullable=False),
        )
        self._processes = sa.Table(
            "inkwell_processes",
            metadata,
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("beat_ms", sa.BigInteger, nullable=False),  # when it last said that it lives; 0 once it is gone
        )
        self._store = sa.Table(
            "inkwell_store", metadata, sa.Column("one", sa.Integer, primary_key=True), sa.Column("id", sa.Text)
        )
        self._metadata = metadata
        self._versions = Schema(schema)

    def create(self) -> None:
        """Make the tables that are missing, and bring older ones forward. Raises SchemaError for ones too new."""
        with self._engine.begin() as c:
            self._versions.lock(c)
            if self._schema is not None:
                c.execute(sa.schema.CreateSchema(self._schema, if_not_exists=True))
            fresh = self._versions.found(c) == (0, 0)
            self._versions.bring_forward(c)
            self._metadata.create_all(c)
            if fresh:
                self._versions.record(c, self._versions.newest)

    def version(self) -> tuple[int, int]:
        """The tables' version, 0 without tables, and the least that code has to know to use them."""
        with self._engine.begin() as c:
            return self._versions.found(c)

    def migrate(self, to: int) -> list[str]:
        """Take the tables to a version, forward or back; answers the statements. Raises SchemaError."""
        with self._engine.begin() as c:
            self._versions.lock(c)
            return self._versions.migrate(c, to)

    def store_id(self) -> str:
        """An id of these tables, the same for every process that uses them."""
        s = self._store
        with self._engine.begin() as c:
            with contextlib.suppress(sa.exc.IntegrityError), c.begin_nested():  # there since an earlier start
                c.execute(sa.insert(s).values(one=1, id=uuid.uuid4().hex))
            return str(c.scalar(sa.select(s.c.id)))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    # --- operations ---

    def insert(
        self,
        row_id: str,
        *,
        kind: str,
        owner: str,
        request: str,
        priority: int,
        most: int,
        traceparent: str | None = None,
    ) -> Row | None:
        """Add an operation unless its id is taken; answers the row under that id, None when `most` wait already."""
        o = self._operations
        with self._engine.begin() as c:
            there = self._row(c, row_id)
            if there is not None:
                return there
            if most <= (c.scalar(sa.select(sa.func.count()).select_from(o).where(self._waiting)) or 0):
                return None
            values = {
                "id": row_id,
                "kind": kind,
                "owner": owner,
                "request": request,
                "priority": priority,
                "created_ms": self._clock_ms(),
                "last": 0,
                "attempts": 0,
                "traceparent": traceparent,
            }
            try:
                with c.begin_nested():
                    c.execute(sa.insert(o).values(values))
            except sa.exc.IntegrityError:  # another replica was given the same id at the same moment
                pass
            return self._row(c, row_id)

    def get(self, row_id: str) -> Row | None:
        """The row, None if there is none."""
        with self._engine.begin() as c:
            return self._row(c, row_id)

    def page(self, *, owner: str, done: bool | None, before: tuple[int, str] | None, limit: int) -> list[Row]:
        """The owner's operations, newest first, from the one after `before` (created_ms, id) on."""
        o = self._operations
        query = sa.select(o).where(o.c.owner == owner).order_by(o.c.created_ms.desc(), o.c.id.desc()).limit(limit)
        if done is not None:
            query = query.where(o.c.outcome.is_not(None) if done else o.c.outcome.is_(None))
        if before is not None:
            query = query.where(sa.tuple_(o.c.created_ms, o.c.id) < sa.tuple_(*map(sa.literal, before)))
        with self._engine.begin() as c:
            return [_to_row(found) for found in c.execute(query)]

    def events(self, row_id: str, after: int, limit: int) -> list[tuple[int, Event]]:
        """At most `limit` events with a sequence above `after`, in order."""
        e = self._events
        query = (
            sa.select(e.c.sequence, e.c.event)
            .where(e.c.operation_id == row_id, e.c.sequence > after)
            .order_by(e.c.sequence)
            .limit(limit)
        )
        with self._engine.begin() as c:
            return [(sequence, _event_decoder.decode(event)) for sequence, event in c.execute(query)]

    # --- runs ---

    def begin(self, row_id: str, token: str, *, attempts: int, give_up: Outcome) -> Row | None:
        """Take the operation for the run `token`; None if it has ended, which it does with `give_up` after `attempts`.

        A run that held it until now is superseded.
        """
        o = self._operations
        with self._engine.begin() as c:
            taken = c.execute(
                sa.update(o)
                .where(o.c.id == row_id, o.c.outcome.is_(None), o.c.attempts < attempts)
                .values(run=token, attempts=o.c.attempts + 1, position=None)
            )
            if taken.rowcount == 0:
                self._end(c, give_up, o.c.id == row_id)
                return None
            return self._row(c, row_id)

    def append(self, row_id: str, token: str, event: Event) -> int:
        """Write the run's next event; answers its sequence. Raises SupersededError."""
        o = self._operations
        with self._engine.begin() as c:
            sequence = self._append(c, event, o.c.id == row_id, o.c.run == token)
        if sequence is None:
            raise SupersededError(row_id)
        return sequence

    def leave(self, row_id: str, token: str) -> None:
        """Put the operation back into the queue, as if the run had never begun."""
        o = self._operations
        with self._engine.begin() as c:
            c.execute(
                sa.update(o)
                .where(o.c.id == row_id, o.c.run == token, o.c.outcome.is_(None))
                .values(run=None, attempts=o.c.attempts - 1)
            )

    def finish(self, row_id: str, token: str | None, outcome: Outcome) -> bool:
        """End the operation, with its last event; False if it has ended, or the run is superseded. None: whoever."""
        o = self._operations
        with self._engine.begin() as c:
            return self._end(c, outcome, o.c.id == row_id, *([] if token is None else [o.c.run == token]))

    def current(self, tokens: dict[str, str]) -> set[str]:
        """Of runs (operation id → token), the ids whose run still counts."""
        o = self._operations
        query = sa.select(o.c.id, o.c.run).where(o.c.id.in_(list(tokens)), o.c.outcome.is_(None))
        with self._engine.begin() as c:
            return {row_id for row_id, run in c.execute(query) if tokens[row_id] == run}

    def lasts(self, row_ids: Iterable[str]) -> dict[str, int]:
        """The sequence of each one's last event."""
        o = self._operations
        with self._engine.begin() as c:
            found = c.execute(sa.select(o.c.id, o.c.last).where(o.c.id.in_(list(row_ids))))
            return {row_id: last for row_id, last in found}  # noqa: C416 - rows, not pairs

    # --- the queue ---

    def line_up(self) -> list[str]:
        """Tell those that wait the places that have changed; answers whom."""
        o = self._operations
        told = []
        with self._engine.begin() as c:
            query = sa.select(o.c.id, o.c.position).where(self._waiting).order_by(o.c.priority, o.c.created_ms, o.c.id)
            for place, (row_id, before) in enumerate(c.execute(query).all()):
                changed = before is None or (place != before and (place < _NEAR_PLACES or place <= before * 3 // 4))
                if changed and self._append(c, Queued(place), o.c.id == row_id, o.c.run.is_(None)) is not None:
                    c.execute(sa.update(o).where(o.c.id == row_id).values(position=place))
                    told.append(row_id)
        return told

    def waiting(self, *, since_ms: int) -> list[tuple[str, int]]:
        """Ids and priorities of those that have waited for so long."""
        o = self._operations
        query = sa.select(o.c.id, o.c.priority).where(self._waiting, o.c.created_ms <= self._clock_ms() - since_ms)
        with self._engine.begin() as c:
            return [(row_id, priority) for row_id, priority in c.execute(query)]

    # --- forgetting ---

    def expired(self, kept_ms: int, limit: int) -> list[str]:
        """Ids of those that ended so long ago."""
        o = self._operations
        query = sa.select(o.c.id).where(o.c.ended_ms <= self._clock_ms() - kept_ms).limit(limit)
        with self._engine.begin() as c:
            return list(c.scalars(query))

    def forget(self, row_ids: Iterable[str]) -> int:
        """Remove operations that have ended, and their events; answers how many."""
        o, e = self._operations, self._events
        with self._engine.begin() as c:
            ended = sa.select(o.c.id).where(o.c.id.in_(list(row_ids)), o.c.outcome.is_not(None))
            ids = list(c.scalars(ended))
            c.execute(sa.delete(e).where(e.c.operation_id.in_(ids)))
            return c.execute(sa.delete(o).where(o.c.id.in_(ids))).rowcount

    # --- processes ---

    def beat(self, process: str) -> None:
        """Say that the process lives."""
        self._set_beat(process, self._clock_ms())

    def retire(self, process: str) -> None:
        """Say that the process is gone: whoever looks next takes over what it left."""
        self._set_beat(process, 0)

    def retire_all(self) -> None:
        """The same of every process; only for one that knows to be alone."""
        with self._engine.begin() as c:
            c.execute(sa.update(self._processes).values(beat_ms=0))

    def claim_lost(self, *, silent_ms: int) -> list[str]:
        """Processes that have been silent for so long, none of which another process claims for as long again."""
        p = self._processes
        now = self._clock_ms()
        lost = p.c.beat_ms <= now - silent_ms
        with self._engine.begin() as c:
            found = list(c.scalars(sa.select(p.c.id).where(lost)))
            return [
                process
                for process in found
                if c.execute(sa.update(p).where(p.c.id == process, lost).values(beat_ms=now)).rowcount == 1
            ]

    def remove_process(self, process: str) -> None:
        """Forget a process that has nothing left."""
        with self._engine.begin() as c:
            c.execute(sa.delete(self._processes).where(self._processes.c.id == process))

    def _set_beat(self, process: str, beat_ms: int) -> None:
        p = self._processes
        with self._engine.begin() as c:
            if c.execute(sa.update(p).where(p.c.id == process).values(beat_ms=beat_ms)).rowcount == 0:
                c.execute(sa.insert(p).values(id=process, beat_ms=beat_ms))

    # --- the database ---

    def replicas(self) -> list[Replica]:
        """The replicas that follow this database, as far as its user may know: Postgres tells members of pg_monitor.

        Those of one name are one, as far behind as the last of them.
        """
        if self._engine.dialect.name != "postgresql":
            return []
        # A base backup and pg_receivewal apply nothing, and are as far as what they have on disk.
        query = sa.text(
            "SELECT application_name,"
            " coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), coalesce(replay_lsn, flush_lsn))), 0),"
            " coalesce(max(extract(epoch FROM coalesce(replay_lag, flush_lag))), 0)"
            " FROM pg_stat_replication WHERE state IS NOT NULL AND NOT pg_is_in_recovery() GROUP BY application_name"
        )
        with self._engine.begin() as c:
            return [
                Replica(name, max(0, int(lag_bytes)), max(0.0, float(lag_s)))
                for name, lag_bytes, lag_s in c.execute(query)
            ]

    # --- parts of transactions ---

    @property
    def _waiting(self) -> sa.ColumnElement[bool]:
        return sa.and_(self._operations.c.outcome.is_(None), self._operations.c.run.is_(None))

    def _row(self, c: sa.Connection, row_id: str) -> Row | None:
        found = c.execute(sa.select(self._operations).where(self._operations.c.id == row_id)).one_or_none()
        return None if found is None else _to_row(found)

    def _append(self, c: sa.Connection, event: Event, *conditions: sa.ColumnElement[bool]) -> int | None:
        o = self._operations
        # The update locks the row, so two writers cannot get the same number.
        counted = c.execute(
            sa.update(o).where(o.c.outcome.is_(None), *conditions).values(last=o.c.last + 1).returning(o.c.id, o.c.last)
        ).one_or_none()
        if counted is None:
            return None
        text = msgspec.json.encode(event).decode()
        c.execute(sa.insert(self._events).values(operation_id=counted.id, sequence=counted.last, event=text))
        return int(counted.last)

    def _end(self, c: sa.Connection, outcome: Outcome, *conditions: sa.ColumnElement[bool]) -> bool:
        o = self._operations
        if self._append(c, Done(), *conditions) is None:
            return False
        text = msgspec.json.encode(outcome).decode()
        c.execute(sa.update(o).where(*conditions).values(outcome=text, ended_ms=self._clock_ms(), run=None))
        return True


def _to_row(found: sa.Row[Any]) -> Row:
    values = found._asdict()
    del values["position"]
    outcome = values.pop("outcome")
    return Row(**values, outcome=None if outcome is None else _outcome_decoder.decode(outcome))


def _sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # no transactions of Python's own making; see `begin`
        connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for writers
        connection.execute("PRAGMA busy_timeout=30000")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # At once for writing: a transaction that reads first and then has to wait for another writer would fail.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
