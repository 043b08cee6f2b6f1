"""What a store needs of the place that it keeps its artifacts in: a folder (folder.py) or a bucket (s3.py)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.runtimes.artifacts.manifest import File
from services.runtimes.artifacts.staging import Staging

ARTIFACTS, LEASES, USED = "artifacts", "leases", "used"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Note:
    """A small file beside the artifacts: a lease, or what `use` chose."""

    content: bytes
    changed_at: float  # by the place's own clock, seconds since 1970


class Place(Protocol):
    """Every method raises StoreError when the place fails. Threads and processes share a place."""

    where: str  # for people and as `open_store` takes it
    staging: Staging  # on this machine

    def locked(self) -> AbstractContextManager[None]:
        """One process at a time, on all machines; not to be entered twice. A dead owner's lock is taken over."""

    def now(self) -> float:
        """The time by the clock that `changed_at` and `ids` are told by, so that machines need no common one."""

    def ids(self) -> dict[str, float]:
        """The artifacts there are (their manifest is), and since when."""

    def manifest(self, artifact_id: str) -> bytes | None:
        """An artifact's manifest.json; None when there is no such artifact."""

    def chunks(self, artifact_id: str, file: File, offset: int) -> Iterator[bytes]:
        """A file's content from an offset on, in pieces of CHUNK_BYTES at most."""

    def folder(self, artifact_id: str, files: Sequence[File], manifest_json: bytes) -> Path:
        """The artifact's files on this machine."""

    def prepare(self, artifact_id: str, staging: Path, files: Sequence[File], manifest_json: bytes) -> None:
        """Brings an artifact's files where they will stay, invisible, and waits until they are safe there."""

    def appear(self, artifact_id: str, staging: Path, manifest_json: bytes) -> None:
        """Makes a prepared artifact visible, at once and whole. Call it locked."""

    def abandon(self, artifact_id: str) -> None:
        """Removes what `prepare` brought of an artifact that is not visible. Call it locked."""

    def delete(self, artifact_id: str) -> None:
        """Makes an artifact invisible, at once, then removes its files. Call it locked."""

    def notes(self, kind: str) -> dict[str, Note]:
        """All notes of a kind (LEASES, USED) by name."""

    def note(self, kind: str, name: str) -> bytes | None:
        """One note's content; None when there is none."""

    def write_note(self, kind: str, name: str, content: bytes) -> None:
        """Writes a note whole or not at all. Call it locked."""

    def renew_note(self, kind: str, name: str, content: bytes) -> None:
        """Sets `changed_at` to now."""

    def remove_note(self, kind: str, name: str) -> None:
        """Removes a note if it is there."""

    def sweep(self, alive: set[str]) -> int:
        """Removes what dead processes left; answers with its bytes. alive: artifacts with a lease. Call it locked."""
