"""Version 1 of the operations' tables as its own code made them, and what that code writes and reads.

Frozen: it stands for the processes and databases of that version, and is never changed.
"""

import sqlalchemy as sa


class Tables:
    """schema: of Postgres, None on SQLite."""

    def __init__(self, schema: str | None) -> None:
        self.metadata = sa.MetaData(schema=schema)
        self.operations = sa.Table(
            "inkwell_operations",
            self.metadata,
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("kind", sa.Text, nullable=False),
            sa.Column("owner", sa.Text, nullable=False),
            sa.Column("request", sa.Text, nullable=False),
            sa.Column("priority", sa.Integer, nullable=False),
            sa.Column("created_ms", sa.BigInteger, nullable=False),
            sa.Column("ended_ms", sa.BigInteger),
            sa.Column("last", sa.Integer, nullable=False),
            sa.Column("run", sa.Text),
            sa.Column("attempts", sa.Integer, nullable=False),
            sa.Column("position", sa.Integer),
            sa.Column("outcome", sa.Text),
            sa.Index("inkwell_operations_created", "created_ms", "id"),
        )
        self.events = sa.Table(
            "inkwell_operation_events",
            self.metadata,
            sa.Column("operation_id", sa.Text, primary_key=True),
            sa.Column("sequence", sa.Integer, primary_key=True),
            sa.Column("event", sa.Text, nullable=False),
        )
        self.processes = sa.Table(
            "inkwell_processes",
            self.metadata,
            sa.Column("id", sa.Text, primary_key=True),
            sa.Column("beat_ms", sa.BigInteger, nullable=False),
        )
        self.store = sa.Table(
            "inkwell_store", self.metadata, sa.Column("one", sa.Integer, primary_key=True), sa.Column("id", sa.Text)
        )

    def create(self, engine: sa.Engine) -> None:
        """What that version does when it starts, also on tables of a later one."""
        with engine.begin() as c:
            if self.metadata.schema is not None:
                c.execute(sa.schema.CreateSchema(self.metadata.schema, if_not_exists=True))
            self.metadata.create_all(c)

    def insert(self, engine: sa.Engine, row_id: str, *, kind: str, request: str, created_ms: int) -> None:
        """An operation that waits, as that version writes it down."""
        row = {"id": row_id, "kind": kind, "owner": "", "request": request, "priority": 2}
        row |= {"created_ms": created_ms, "last": 0, "attempts": 0}
        with engine.begin() as c:
            c.execute(sa.insert(self.operations).values(row))

    def end(self, engine: sa.Engine, row_id: str, outcome: str, ended_ms: int) -> None:
        """The end of one, with its events."""
        o = self.operations
        with engine.begin() as c:
            for sequence, event in enumerate(('{"type":"queued","position":0}', '{"type":"done"}'), start=1):
                c.execute(sa.insert(self.events).values(operation_id=row_id, sequence=sequence, event=event))
            c.execute(sa.update(o).where(o.c.id == row_id).values(outcome=outcome, ended_ms=ended_ms, last=2))

    def read(self, engine: sa.Engine, row_id: str) -> sa.Row[tuple[object, ...]]:
        """The row as that version reads it."""
        with engine.begin() as c:
            return c.execute(sa.select(self.operations).where(self.operations.c.id == row_id)).one()
