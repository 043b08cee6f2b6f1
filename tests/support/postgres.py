"""A Postgres server of its own for tests, where Debian's postgresql is installed."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database; skips the test where there is no Postgres."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("postgresql is not installed")
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="inkwell-postgres-") as folder:
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)

        def run(*command: str) -> None:
            subprocess.run(command, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL)

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run("initdb", "-D", "data", "-U", "inkwell", "-A", "trust", "--no-sync")
        run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", f"-p {port} -k {folder} -c fsync=off", "start")
        try:
            yield f"postgresql://inkwell@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", "data", "-m", "immediate", "stop")
