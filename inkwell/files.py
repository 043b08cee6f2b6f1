"""Bytes from files, into files."""

import os
import tempfile
from pathlib import Path
from typing import TypeAlias

from inkwell.errors import FieldViolation, TooLarge

Source: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str]
"""An encoded file: its bytes, or its path."""


def load(source: Source, *, field: str = "image.content", most: int | None = None) -> bytes:
    """The bytes of a file that goes into a request as `field`.

    Raises OSError, and TooLarge, without reading it, when it is longer than `most` bytes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        _check_length(source.nbytes if isinstance(source, memoryview) else len(source), field, most)
        return bytes(source)
    with Path(source).open("rb") as file:
        _check_length(os.fstat(file.fileno()).st_size, field, most)
        return file.read()


def _check_length(length: int, field: str, most: int | None) -> None:
    if most is not None and length > most:
        text = f"{length} bytes; at most {most} travel in one request"
        violation = FieldViolation(field, text)
        raise TooLarge(f"{field}: {text}", reason="MESSAGE_TOO_LARGE", fields=(violation,))


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to a temporary neighbour and rename it to `path`, so that no reader ever sees half a file.

    Permissions are those of the file that is replaced, or of any new file. Raises OSError.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, _mode_for(target))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _mode_for(target: Path) -> int:
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
