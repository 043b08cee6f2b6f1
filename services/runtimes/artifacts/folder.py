"""A store in a folder: artifacts/ID/…, leases/, used/, staging/ and .lock.

An artifact is made in staging/ and renamed to artifacts/ID once all its files are on the disk, so it is there whole or
not at all. The folder may lie on a file system that machines share, if renames and flock work on it (NFS 4).
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from services.runtimes.artifacts.errors import Reason, StoreError, explained
from services.runtimes.artifacts.manifest import FILE_NAME, File
from services.runtimes.artifacts.place import ARTIFACTS, CHUNK_BYTES, Note
from services.runtimes.artifacts.staging import Staging, sync, sync_all

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{64}")
_NOTE = ".json"
_UNFINISHED = ".part"


class Folder:
    """A `Place` on a local or shared file system. Nothing is created before something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)
        self.staging = Staging(root / "staging")

    @contextmanager
    def locked(self) -> Iterator[None]:
        with explained("locking the artifact store", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            with explained("locking the artifact store", self.root):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # which lets go of the lock

    def now(self) -> float:
        try:
            clock = self.root / ".clock"
            clock.touch()
            return clock.stat().st_mtime
        except OSError:  # nothing may be written here, so nothing is judged by its age here either
            return time.time()

    def ids(self) -> dict[str, float]:
        found = {}
        with explained("listing artifacts", self.root):
            try:
                entries = list(os.scandir(self.root / ARTIFACTS))
            except FileNotFoundError:
                return {}
            for entry in entries:
                if _ID.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted just now
                        found[entry.name] = os.stat(Path(entry.path) / FILE_NAME).st_mtime
        return found

    def manifest(self, artifact_id: str) -> bytes | None:
        with explained("reading a manifest", self.root):
            try:
                return (self._of(artifact_id) / FILE_NAME).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def chunks(self, artifact_id: str, file: File, offset: int) -> Iterator[bytes]:
        what = f"reading {file.path} of artifact {artifact_id[:12]}"
        path = self._of(artifact_id) / file.path
        with explained(what, self.root):
            # A link that somebody put there could lead anywhere.
            if path.resolve() != self._of(artifact_id).resolve() / file.path:
                raise StoreError(Reason.DAMAGED, f"{what}: it is a link now; delete the artifact and compile it again")
            try:
                opened = path.open("rb")
            except FileNotFoundError:
                raise StoreError(
                    Reason.DAMAGED, f"{what}: the file is gone; delete the artifact and compile it again"
                ) from None
        with opened, explained(what, self.root):
            opened.seek(offset)
            while chunk := opened.read(CHUNK_BYTES):
                yield chunk

    def folder(self, artifact_id: str, files: Sequence[File], manifest_json: bytes) -> Path:
        folder = self._of(artifact_id)
        if problem := size_problem(folder, files):
            raise StoreError(
                Reason.DAMAGED,
                f"artifact {artifact_id[:12]} in {self.root}: {problem}; delete the artifact and compile it again",
            )
        return folder

    def prepare(self, artifact_id: str, staging: Path, files: Sequence[File], manifest_json: bytes) -> None:
        with explained(f"publishing artifact {artifact_id[:12]}", self.root):
            (self.root / ARTIFACTS).mkdir(parents=True, exist_ok=True)
            (staging / FILE_NAME).write_bytes(manifest_json)
            # Some libraries let nobody else read what they write; this one file was made by the user's own rules.
            mode = (staging / FILE_NAME).stat().st_mode
            for file in files:
                (staging / file.path).chmod(mode)
            sync_all(staging)

    def appear(self, artifact_id: str, staging: Path, manifest_json: bytes) -> None:
        with explained(f"publishing artifact {artifact_id[:12]}", self.root):
            staging.rename(self._of(artifact_id))
            sync(self.root / ARTIFACTS)

    def abandon(self, artifact_id: str) -> None:
        """Nothing: what was prepared lies in the staging folder still."""

    def delete(self, artifact_id: str) -> None:
        with explained(f"deleting artifact {artifact_id[:12]}", self.root):
            rubbish = self.staging.new()
            try:
                self._of(artifact_id).rename(rubbish / artifact_id)
                sync(self.root / ARTIFACTS)
            finally:
                self.staging.discard(rubbish)

    def notes(self, kind: str) -> dict[str, Note]:
        found = {}
        with explained("reading the artifact store", self.root):
            for file in (self.root / kind).glob(f"*{_NOTE}"):
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    found[file.name.removesuffix(_NOTE)] = Note(file.read_bytes(), file.stat().st_mtime)
        return found

    def note(self, kind: str, name: str) -> bytes | None:
        with explained("reading the artifact store", self.root):
            try:
                return self._note(kind, name).read_bytes()
            except FileNotFoundError:
                return None

    def write_note(self, kind: str, name: str, content: bytes) -> None:
        file = self._note(kind, name)
        unfinished = file.with_suffix(_UNFINISHED)
        with explained("writing to the artifact store", self.root):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with unfinished.open("wb") as opened:
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
                unfinished.rename(file)
                sync(file.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
                raise

    def renew_note(self, kind: str, name: str, content: bytes) -> None:
        with explained("renewing a lease", self.root):
            try:
                os.utime(self._note(kind, name))
            except FileNotFoundError:
                # Taken for dead, such as after this machine slept.
                with self.locked():
                    self.write_note(kind, name, content)

    def remove_note(self, kind: str, name: str) -> None:
        with explained("writing to the artifact store", self.root):
            self._note(kind, name).unlink(missing_ok=True)

    def sweep(self, alive: set[str]) -> int:
        freed = self.staging.sweep()
        with explained("cleaning the artifact store", self.root):
            # Notes are written while locked, so nobody is writing one now.
            for unfinished in self.root.glob(f"*/*{_UNFINISHED}"):
                freed += unfinished.stat().st_size
                unfinished.unlink(missing_ok=True)
        return freed

    def _of(self, artifact_id: str) -> Path:
        return self.root / ARTIFACTS / artifact_id

    def _note(self, kind: str, name: str) -> Path:
        return self.root / kind / f"{name}{_NOTE}"


def size_problem(folder: Path, files: Sequence[File]) -> str:
    """What is missing or of another size in an artifact's folder; empty if nothing is. Reads no content."""
    for file in files:
        try:
            size = (folder / file.path).stat().st_size
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            return f"{file.path} " + ("is missing" if missing else f"cannot be read ({error.strerror})")
        if size != file.size_bytes:
            return f"{file.path} has {size} bytes, should have {file.size_bytes}"
    return ""
