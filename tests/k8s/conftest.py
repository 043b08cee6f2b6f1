"""Every test of the manifests takes what it looks at rendered."""

import shutil

import pytest

from tests.k8s.rendered import BUILDS, Build, Object, rendered


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip those that render when nothing here can."""
    if shutil.which("kubectl") is None:
        for item in items:
            if "objects" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="kubectl, which renders kustomize, is missing"))


@pytest.fixture(params=BUILDS, ids=str, scope="session")
def build(request: pytest.FixtureRequest) -> Build:
    """Each overlay and combination in turn."""
    found: Build = request.param
    return found


@pytest.fixture(scope="session")
def objects(build: Build) -> tuple[Object, ...]:
    """What the build renders to."""
    return rendered(build)
