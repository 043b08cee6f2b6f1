"""Writing an artifact's files into a folder: taken up where a download broke off, and whole or not at all."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from inkwell import types
from inkwell.errors import InternalError

MANIFEST = "manifest.json"
_PARTIAL = ".partial"


class Download:
    """One file on its way. offset_bytes: what is there of it from an earlier try."""

    def __init__(self, folder: Path, file: types.ArtifactFile) -> None:
        """Raises InternalError for a path that leads out of the folder, OSError."""
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InternalError(
                f"the server named a file {file.path!r}, outside of the artifact", reason="PATH_OUTSIDE"
            )
        self.file = file
        self.target = folder.joinpath(*path.parts)
        self._partial = self.target.with_name(self.target.name + _PARTIAL)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        size = self._partial.stat().st_size if self._partial.exists() else 0
        # More than the whole is of another file.
        self.offset_bytes = size if size <= file.size_bytes else 0

    @property
    def done(self) -> bool:
        """Whether the file is there, whole and right."""
        return self.target.is_file() and _sha256(self.target) == self.file.sha256

    def open(self) -> IO[bytes]:
        """Where the content goes from `offset_bytes` on."""
        stream = self._partial.open("r+b" if self.offset_bytes else "wb")
        stream.seek(self.offset_bytes)
        stream.truncate()
        return stream

    def finish(self) -> None:
        """Check it and give it its name; raises InternalError, and removes it, if it is not what was announced."""
        if _sha256(self._partial) != self.file.sha256:
            self._partial.unlink()
            raise InternalError(
                f"{self.file.path}: what arrived is not what the artifact's manifest says; download it again",
                reason="CONTENT_DAMAGED",
            )
        os.replace(self._partial, self.target)


def files_of(artifact: types.Artifact) -> Iterable[types.ArtifactFile]:
    """All files, the manifest last: a folder with a manifest is complete."""
    content = artifact.manifest_json.encode()
    return (*artifact.files, types.ArtifactFile(MANIFEST, len(content), hashlib.sha256(content).hexdigest()))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
