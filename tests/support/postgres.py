"""A Postgres server of its own for tests, where Debian's postgresql is installed."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.local import free_ports


@dataclass
class Postgres:
    """A server; `address` is of an empty database."""

    folder: str
    port: int
    user: str | None

    @property
    def address(self) -> str:
        return f"postgresql://inkwell@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c fsync=off"
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        """At once: connections are cut."""
        self.run("pg_ctl", "-D", "data", "-m", "immediate", "stop")

    def run(self, *command: str) -> None:
        subprocess.run(command, user=self.user, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server; skips the test where there is no Postgres."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("postgresql is not installed")
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="inkwell-postgres-") as folder:
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        server = Postgres(folder, free_ports(1)[0], user)
        server.run("initdb", "-D", "data", "-U", "inkwell", "-A", "trust", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()
