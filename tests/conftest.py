"""Fixtures that more than one folder of tests needs."""

from collections.abc import Iterator

import pytest

from services import local


@pytest.fixture(scope="session")
def fleet() -> Iterator[dict[str, local.Service]]:
    """OCR, diffusion and the gateway as processes of their own, on the embedded models; by service name.

    Shared by all tests of the session, so nobody may harm it.
    """
    with local.running_on_free_ports() as services:
        yield services
