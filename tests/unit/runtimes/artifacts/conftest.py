"""Stores in both kinds of places, and a way to reach into each behind the store's back."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest

from services.runtimes.artifacts.store import Store, open_store
from tests.support import s3


class Raw(Protocol):
    """What lies in a store's place. Keys are relative, such as "leases/…"."""

    location: str

    def names(self, prefix: str = "") -> list[str]:
        """Of what is stored, sorted; staging folders and locks are not."""

    def read(self, key: str) -> bytes:
        """An object's content."""

    def write(self, key: str, content: bytes) -> None:
        """Puts an object there."""

    def remove(self, key: str) -> None:
        """Takes an object away."""

    def age(self, prefix: str, seconds: float) -> None:
        """Lets all objects whose keys begin so be older than they are."""


@dataclass
class RawFolder:
    """A folder."""

    location: str

    def names(self, prefix: str = "") -> list[str]:
        root = Path(self.location)
        found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return sorted(key for key in found if key.startswith(prefix) and not key.startswith((".", "staging/")))

    def read(self, key: str) -> bytes:
        return (Path(self.location) / key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        path = Path(self.location) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def remove(self, key: str) -> None:
        (Path(self.location) / key).unlink()

    def age(self, prefix: str, seconds: float) -> None:
        for key in self.names(prefix):
            path = Path(self.location) / key
            changed = path.stat().st_mtime - seconds
            os.utime(path, (changed, changed))


@dataclass
class RawBucket:
    """A bucket of moto's server, which is in this process."""

    location: str
    prefix: str = "some/where/"

    def _objects(self) -> dict[str, Any]:
        from moto.s3.models import s3_backends

        keys = s3_backends["123456789012"]["aws"].buckets["inkwell"].keys
        return {key.removeprefix(self.prefix): keys[key] for key in keys if key.startswith(self.prefix)}

    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")

    def names(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._objects() if key.startswith(prefix) and key != "lock")

    def read(self, key: str) -> bytes:
        content: bytes = self._objects()[key].value
        return content

    def write(self, key: str, content: bytes) -> None:
        self._client().put_object(Bucket="inkwell", Key=self.prefix + key, Body=content)

    def remove(self, key: str) -> None:
        self._client().delete_object(Bucket="inkwell", Key=self.prefix + key)

    def age(self, prefix: str, seconds: float) -> None:
        for key, found in self._objects().items():
            if key.startswith(prefix):
                found.last_modified -= timedelta(seconds=seconds)


@pytest.fixture(scope="package")
def s3_server() -> Iterator[s3.S3Server]:
    """One server for all tests; `bucket` empties it."""
    with pytest.MonkeyPatch.context() as patch, s3.running(patch) as server:
        yield server


@pytest.fixture
def bucket(s3_server: s3.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RawBucket]:
    """An empty bucket, and a cache folder of the test's own."""
    import boto3
    from moto.s3.models import s3_backends

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boto3.client("s3").create_bucket(Bucket="inkwell")
    s3_server.watch()
    yield RawBucket("s3://inkwell/some/where")
    s3_server.watch()
    s3_backends["123456789012"]["aws"].reset()


@pytest.fixture(params=["folder", "s3"])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Raw:
    """Each kind of place in turn."""
    if request.param == "s3":
        found: RawBucket = request.getfixturevalue("bucket")
        return found
    return RawFolder(str(tmp_path / "store"))


@pytest.fixture
def store(raw: Raw) -> Store:
    """An empty store in the place."""
    return open_store(raw.location)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting takes root: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
