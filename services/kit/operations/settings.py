"""Settings of services that have operations."""

from pathlib import Path

import sqlalchemy
from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from services.kit.settings import ServiceSettings

_FOLDER = Path("~/.local/share/inkwell/operations")


class OperationsSettings(ServiceSettings):
    """Inherited in place of ServiceSettings."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)  # the address may hold a password

    operations_database: str = Field(
        "",
        description="where operations are kept: an SQLite file, or postgresql://user:password@host/database, which"
        " several replicas may share; empty for a file in ~/.local/share/inkwell/operations",
    )
    operations_concurrency: int = Field(1, ge=1, le=256, description="operations that run here at a time")
    operations_queue_limit: int = Field(64, ge=1, le=10_000, description="operations that may wait for their turn")
    operations_kept_s: float = Field(
        7 * 86400.0, ge=1, description="seconds for which what came of an operation is kept"
    )
    operations_attempts: int = Field(
        10, ge=1, le=1000, description="times that an operation is begun when the process is lost while it runs"
    )

    operations_lost_after_s: float = Field(
        30.0,
        ge=0.1,
        description="seconds of silence after which a replica that shares the database counts as lost, and others run"
        " what it ran; its clock may differ by less than that",
    )

    @field_validator("operations_database")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if "://" in value:
            try:
                name = sqlalchemy.make_url(value).get_backend_name()
            except sqlalchemy.exc.ArgumentError:
                name = "?"
            if name not in ("sqlite", "postgresql"):
                raise ValueError("a path, sqlite:///path, or postgresql://user:password@host/database")
        return value


def database_url(settings: OperationsSettings, service: str) -> sqlalchemy.URL:
    """The setting as a URL with its driver; an SQLite file's folder is not made yet."""
    value = settings.operations_database or str(_FOLDER / f"{service}.sqlite")
    url = sqlalchemy.make_url(value) if "://" in value else sqlalchemy.URL.create("sqlite", database=value)
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    return url.set(drivername="sqlite", database=str(Path(url.database or f"{service}.sqlite").expanduser().resolve()))
