"""`python -m services.kit.operations.migrate SERVICE DATABASE [--to VERSION]`: take operations' tables to a version.

Without --to it only says which version they have. Services bring their tables forward by themselves as they start; this
is for going back to an Inkwell that could not use the newer ones (docs/upgrades.md). An SQLite file must be in nobody's
use.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import sqlalchemy as sa
from pydantic import ValidationError

from services.kit.operations.log import Log
from services.kit.operations.schema import VERSION, SchemaError
from services.kit.operations.settings import OperationsSettings, database_url
from services.kit.operations.workflows import lock


def main(arguments: list[str] | None = None) -> None:
    """Exits with 1 if it cannot be done, and says why."""
    parser = argparse.ArgumentParser(prog="python -m services.kit.operations.migrate", description=__doc__)
    parser.add_argument("service", help="whose operations they are, such as compiler")
    parser.add_argument("database", help="as OPERATIONS_DATABASE: an SQLite file or postgresql://…; '' for the default")
    parser.add_argument("--to", type=int, metavar="VERSION", help=f"this Inkwell's own is {VERSION}")
    asked = parser.parse_args(arguments)
    try:
        _migrate(asked.service, asked.database, asked.to)
    except (OSError, sa.exc.SQLAlchemyError, ValidationError) as error:
        print(f"migrate: {getattr(error, '__cause__', None) or error}", file=sys.stderr)
        raise SystemExit(1) from None


def _migrate(service: str, database: str, to: int | None) -> None:
    url = database_url(OperationsSettings(operations_database=database), service)
    file = Path(url.database or "") if url.get_backend_name() == "sqlite" else None
    if file is not None and not file.is_file():
        raise SchemaError(f"there is no file {file}")
    with contextlib.ExitStack() as exits:
        if file is not None:
            exits.enter_context(lock(file))
        log = Log(url, schema=None if file is not None else f"inkwell_{service}")
        exits.callback(log.close)
        if to is not None:
            for statement in log.migrate(to):
                print(statement)
        version, needed = log.version()
        print(f"version {version}; usable from {needed} on" if version else "no tables yet")


if __name__ == "__main__":
    main()
