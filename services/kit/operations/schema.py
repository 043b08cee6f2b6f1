"""The versions of the operations' tables, and the ways from one to the next and back.

Services bring their database forward as they start. Replicas of two versions share a database while a deployment rolls,
so a step forward leaves the older version able to work, or says that it does not (`breaks_older`). Going back is for
`services.kit.operations.migrate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

# Any number, the same for all: two replicas that start at once do not both change the tables.
_ADVISORY_LOCK = 0x696E6B77656C6C


class SchemaError(OSError):
    """The database cannot be used by this version, or not be brought to that one."""


@dataclass(frozen=True)
class Migration:
    """The way to `version` from the one before, and back. {table} and the like are full names; one statement each.

    breaks_older: code that does not know this version can no longer use the tables.
    """

    version: int
    forward: Sequence[str]
    back: Sequence[str]
    breaks_older: bool = False


MIGRATIONS = (
    # 1 has no way to it: those are the tables without a version.
    Migration(
        2,
        forward=["ALTER TABLE {operations} ADD COLUMN traceparent TEXT"],
        back=["ALTER TABLE {operations} DROP COLUMN traceparent"],
    ),
)
VERSION = MIGRATIONS[-1].version


class Schema:
    """Which version the tables in a database have. `schema`: of Postgres, None on SQLite."""

    def __init__(self, schema: str | None, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self._schema = schema
        self._migrations = migrations
        self._table = sa.Table(
            "inkwell_schema",
            sa.MetaData(schema=schema),
            sa.Column("one", sa.Integer, primary_key=True),
            sa.Column("version", sa.Integer, nullable=False),
            # The least version that code has to know to use these tables.
            sa.Column("needed", sa.Integer, nullable=False),
        )

    @property
    def newest(self) -> int:
        """The version that this code was written for."""
        return self._migrations[-1].version

    def lock(self, c: sa.Connection) -> None:
        """Until the transaction ends nobody else changes tables. SQLite has that from its begin."""
        if c.dialect.name == "postgresql":
            c.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))

    def found(self, c: sa.Connection) -> tuple[int, int]:
        """The tables' version and the one that code has to know; (0, 0) if there are none."""
        inspector = sa.inspect(c)
        if not inspector.has_table("inkwell_operations", schema=self._schema):
            return 0, 0
        if not inspector.has_table(self._table.name, schema=self._schema):
            return 1, 1
        row = c.execute(sa.select(self._table.c.version, self._table.c.needed)).one()
        return row.version, row.needed

    def record(self, c: sa.Connection, version: int) -> None:
        """Write down that the tables have this version now."""
        self._table.create(c, checkfirst=True)
        needed = max([1, *(m.version for m in self._migrations if m.breaks_older and m.version <= version)])
        c.execute(sa.delete(self._table))
        c.execute(sa.insert(self._table).values(one=1, version=version, needed=needed))

    def bring_forward(self, c: sa.Connection) -> None:
        """Bring tables that exist to the newest version, or leave newer ones that this code can use as they are.

        Raises SchemaError for tables that are too new.
        """
        version, needed = self.found(c)
        if needed > self.newest:
            raise SchemaError(
                f"its tables have version {version}, and whoever uses them has to know version {needed}; this is an"
                f" older Inkwell, which knows {self.newest}: run the newer one, or have that take the tables back with"
                f" python -m services.kit.operations.migrate --to {self.newest}"
            )
        if 0 < version < self.newest:
            self.migrate(c, self.newest)

    def migrate(self, c: sa.Connection, to: int) -> list[str]:
        """Take tables that exist to a version, forward or back; answers the statements that did it.

        Raises SchemaError for a version that this code does not know.
        """
        version, _ = self.found(c)
        known = [1, *(m.version for m in self._migrations)]
        for each in (version, to):
            if each not in known:
                raise SchemaError(
                    f"there is no way to or from version {each}; known here: {', '.join(map(str, known))}"
                )
        if to >= version:
            steps = [s for m in self._migrations if version < m.version <= to for s in m.forward]
        else:
            steps = [s for m in reversed(self._migrations) if to < m.version <= version for s in m.back]
        prefix = "" if self._schema is None else f'"{self._schema}".'
        done = [step.format(operations=f"{prefix}inkwell_operations") for step in steps]
        for statement in done:
            c.execute(sa.text(statement))
        if to == 1:
            self._table.drop(c, checkfirst=True)  # as that version left it
        else:
            self.record(c, to)
        return done
