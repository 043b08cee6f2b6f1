"""Fixtures that more than one folder of tests needs."""

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

from services import local

# Tests never time things, and an example that took long on a busy machine is no failure.
settings.register_profile("inkwell", deadline=None)
settings.load_profile("inkwell")

# A shell has what it starts in the background ignore Ctrl-C, and the commands that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A store of this run's own: what its user has compiled would otherwise be what the services run.
_data = tempfile.TemporaryDirectory(prefix="inkwell-data-", ignore_cleanup_errors=True)
os.environ["XDG_DATA_HOME"] = _data.name


@pytest.fixture(scope="session")
def fleet() -> Iterator[dict[str, local.Service]]:
    """OCR, diffusion and the gateway as processes of their own, on the embedded models; by service name.

    Shared by all tests of the session, so nobody may harm it.
    """
    with local.running_on_free_ports(metrics=True) as services:
        yield services
