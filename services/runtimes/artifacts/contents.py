"""The files of an artifact: which paths are allowed, and their sha-256."""

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import FILE_NAME, FORMAT, File, Manifest, artifact_id, decode

# S3 keys have 1,024 bytes; the rest is for the prefix and the id.
_PATH_BYTES_MOST = 700


def path_fault(path: str) -> str:
    """Why an artifact cannot have a file of this path; empty if it can."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts):
        return "it has to be relative, without '.', '..' or an empty part"
    if "\\" in path or any(ord(character) < 32 or ord(character) == 127 for character in path):
        return "backslashes and control characters are not allowed"
    if len(path.encode("utf-8", "surrogateescape")) > _PATH_BYTES_MOST:
        return f"it is longer than {_PATH_BYTES_MOST} bytes"
    if path == FILE_NAME:
        return f"{FILE_NAME} is written by the store"
    return ""


def sha256_of(file: Path) -> str:
    """The sha-256 of a file's content, hexadecimal. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files_in(folder: Path) -> tuple[File, ...]:
    """All files below the folder but manifest.json, sorted by path, hashed.

    Raises StoreError for anything that is no plain file or folder (a link could show what lies outside), OSError.
    """
    paths = paths_in(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda path: sha256_of(folder / path), paths))
    return tuple(
        File(path, (folder / path).stat().st_size, digest) for path, digest in zip(paths, digests, strict=True)
    )


def paths_in(folder: Path) -> list[str]:
    """The paths of all files below the folder but manifest.json, sorted. Raises StoreError as `files_in`, OSError."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            mode = (Path(parent) / name).lstat().st_mode
            path = (Path(parent) / name).relative_to(folder).as_posix()
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise StoreError(Reason.INVALID, f"{path}: an artifact holds files and folders, no links or devices")
            if stat.S_ISREG(mode) and path != FILE_NAME:
                if fault := path_fault(path):
                    raise StoreError(Reason.INVALID, f"{path!r} cannot be a file of an artifact: {fault}")
                found.append(path)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def check_files(manifest: Manifest) -> None:
    """Raises StoreError unless the manifest's paths are allowed, unique, and those that it refers to are there."""
    listed: set[str] = set()
    for file in manifest.files:
        if fault := path_fault(file.path):
            raise StoreError(Reason.INVALID, f"files: {file.path!r} cannot be a file of an artifact: {fault}")
        if file.path in listed:
            raise StoreError(Reason.INVALID, f"files: {file.path} is listed twice")
        listed.add(file.path)
    for graph in manifest.graphs:
        if graph.file not in listed:
            raise StoreError(Reason.INVALID, f"graphs: {graph.component}: {graph.file} is not among the files")
    if manifest.model_folder and not any(PurePosixPath(path).is_relative_to(manifest.model_folder) for path in listed):
        raise StoreError(Reason.INVALID, f"model_folder: there is no file in {manifest.model_folder}")


def check_manifest(manifest: Manifest) -> None:
    """Raises StoreError for a manifest that may not be published; `files` included."""
    if manifest.format != FORMAT:
        raise StoreError(Reason.INVALID, f"format: {manifest.format}, this version writes {FORMAT}")
    for name in ("model", "source_digest", "recipe"):
        if not getattr(manifest, name):
            raise StoreError(Reason.INVALID, f"{name}: it is empty")
    failed = [check.name for check in manifest.checks if not check.passed]
    if failed:
        raise StoreError(Reason.INVALID, f"checks: an artifact that failed is not published: {', '.join(failed)}")
    try:
        offset = datetime.fromisoformat(manifest.created_at).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise StoreError(
            Reason.INVALID,
            f"created_at: {manifest.created_at!r} is no time in UTC such as {datetime.now(UTC).isoformat()}",
        )
    check_files(manifest)


def read_manifest(content: bytes, expected_id: str, where: str) -> Manifest:
    """The manifest that lies in a store. Raises StoreError when it is not what its id says or cannot be understood."""
    if artifact_id(content) != expected_id:
        raise StoreError(
            Reason.DAMAGED,
            f"artifact {expected_id[:12]} in {where}: its {FILE_NAME} was changed or damaged; delete the artifact and"
            " compile it again",
        )
    try:
        manifest = decode(content)
        if manifest.format > FORMAT:
            raise ValueError(f"it has format {manifest.format}, this version reads up to {FORMAT}; update Inkwell")
        check_files(manifest)
    except (ValueError, StoreError) as error:
        raise StoreError(
            Reason.DAMAGED, f"artifact {expected_id[:12]} in {where}: its {FILE_NAME} cannot be used: {error}"
        ) from error
    return manifest


def differences(expected: Iterable[File], found: Iterable[File]) -> list[str]:
    """How files differ from what a manifest says, a line each; empty if they do not."""
    left = {file.path: file for file in found}
    problems = []
    for file in expected:
        other = left.pop(file.path, None)
        if other is None:
            problems.append(f"{file.path}: missing")
        elif other.size_bytes != file.size_bytes:
            problems.append(f"{file.path}: {other.size_bytes} bytes, should be {file.size_bytes}")
        elif other.sha256 != file.sha256:
            problems.append(f"{file.path}: its content has changed (sha-256 {other.sha256[:12]}…)")
    return problems + [f"{path}: not in the manifest" for path in left]
