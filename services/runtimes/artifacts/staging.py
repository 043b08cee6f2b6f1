"""Folders that something is made in before it appears elsewhere in the same file system by one rename.

Each has a lock file beside it that its process holds (flock): the kernel lets go of it however the process ends, so
that what the dead left behind is told from what is being made.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path


class Staging:
    """The staging folders below one folder. Threads and processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[Path, int] = {}  # descriptors that hold this process's folders

    def new(self) -> Path:
        """An empty folder of this process's own; it lasts until `discard`, or a `sweep` after the process ended.

        Raises OSError.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = self.root / secrets.token_hex(8)
            lock = _lock_of(folder)
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # A sweep may have been quicker than the lock, and taken the file away.
                if not _is_at(descriptor, lock):
                    os.close(descriptor)
                    continue
                folder.mkdir()
            except BaseException:
                _close(descriptor)
                lock.unlink(missing_ok=True)
                raise
            self._locks[folder] = descriptor
            return folder

    def holds(self, folder: Path) -> bool:
        """Whether the folder is one of these, of whichever process."""
        return folder.parent == self.root

    def discard(self, folder: Path) -> None:
        """Removes a staging folder, if it is still there. Never raises: a sweep takes what could not be removed."""
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            with contextlib.suppress(OSError):
                _lock_of(folder).unlink(missing_ok=True)
        descriptor = self._locks.pop(folder, None)
        if descriptor is not None:
            _close(descriptor)

    def sweep(self) -> int:
        """Removes what ended processes left behind; answers with its bytes."""
        freed = 0
        if not self.root.is_dir():
            return 0
        for lock in self.root.glob("*.lock"):
            try:
                descriptor = os.open(lock, os.O_RDWR)
            except OSError:  # just removed by its owner, or not ours to remove
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, lock):
                    freed += _remove(lock.with_suffix(""))
                    lock.unlink(missing_ok=True)
            except OSError:  # its owner lives
                pass
            finally:
                os.close(descriptor)
        for folder in self.root.iterdir():
            # Only a folder whose lock was removed has none: the lock comes first and goes last.
            if folder.is_dir() and not _lock_of(folder).exists():
                freed += _remove(folder)
        return freed


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (found.st_ino, found.st_dev) == (ours.st_ino, ours.st_dev)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _remove(folder: Path) -> int:
    size = size_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size


def size_of(folder: Path) -> int:
    """Bytes of all files below the folder; what vanishes meanwhile is not counted."""
    size = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                size += (Path(parent) / name).lstat().st_size
    return size


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` for everything below the folder and the folder itself, children first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))
