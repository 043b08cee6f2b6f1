"""Fixtures that more than one folder of tests needs."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from services import local

# Tests never time things, and an example that took long on a busy machine is no failure.
settings.register_profile("inkwell", deadline=None)
settings.load_profile("inkwell")


@pytest.fixture(scope="session")
def fleet() -> Iterator[dict[str, local.Service]]:
    """OCR, diffusion and the gateway as processes of their own, on the embedded models; by service name.

    Shared by all tests of the session, so nobody may harm it.
    """
    with local.running_on_free_ports() as services:
        yield services
