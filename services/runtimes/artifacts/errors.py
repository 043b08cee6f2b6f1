"""What can go wrong with an artifact store, in words that say what would help."""

import enum
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Reason(enum.StrEnum):
    """The families of store errors, for whoever turns them into a status."""

    INVALID = "invalid"  # the caller's words: an id, a page token, a path, a manifest
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"  # the first digits of more than one artifact
    IN_USE = "in_use"  # somebody runs it, or `use` chose it
    DAMAGED = "damaged"  # a stored file is not what its manifest says
    FULL = "full"  # no space left
    DENIED = "denied"  # read-only, or the credentials do not allow it
    UNAVAILABLE = "unavailable"  # the store cannot be reached or broke off; later it may work


class StoreError(Exception):
    """An operation of the store that failed; the message says what, where, and what would help."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def explained(what: str, where: Path) -> Iterator[None]:
    """Turns the OSError of a local file operation into a StoreError. what: "publishing the artifact"; where: folder."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, what, where) from error


def from_os_error(error: OSError, what: str, where: Path) -> StoreError:
    """The StoreError for a failed operation on local files."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            Reason.FULL,
            f"{what}: no space is left in {where}{_free(where)}; delete artifacts or other files there, or choose"
            " another artifact store",
        )
    if error.errno == errno.EFBIG:
        return StoreError(
            Reason.FULL,
            f"{what}: a file in {where} would become larger than the file system or the limits of this process allow"
            " (ulimit -f); raise the limit or choose another artifact store",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            Reason.DENIED,
            f"{what}: {where} may not be written or read by this process ({said}: {error.filename or where}); give the"
            " service's user the right to, or choose another artifact store",
        )
    return StoreError(Reason.UNAVAILABLE, f"{what}: {said} ({error.filename or where})")


def _free(where: Path) -> str:
    try:
        return f" ({shutil.disk_usage(where).free:,} bytes are free)"
    except OSError:
        return ""
