"""Which checkpoint an artifact came from: sha-256 over the files that decide what a model computes.

Hashing a gigabyte takes a second or two, so results are kept in the user's cache, file by file, as long as a file's
size and times stay the same.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from services.runtimes.artifacts.user_folders import cache_folder

log = logging.getLogger(__name__)

# Configuration, tokenizers, image processors and weights; neither README.md nor pictures.
_SUFFIXES = frozenset(
    (".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".gguf")
)
# Of a folder that a training wrote: sample pages, logs, and snapshots that are checkpoints of their own.
_OTHER_FOLDERS = ("samples", "runs", "checkpoint-")
# The parts that one file is hashed in, so that several threads can work on one.
_PART_BYTES = 32 << 20
# A file changed this shortly before it was hashed could change again within the same tick of its clock.
_SETTLED_NS = 2_000_000_000
_CACHED_FILES_MOST = 10_000


def digest_of(folder: Path) -> str:
    """sha-256, hexadecimal, over the relative paths and contents of a checkpoint's files, whatever their order.

    Raises OSError when a file cannot be read, ValueError when there is none. A cache that cannot be written only costs
    time.
    """
    files = list(_files(folder, _SUFFIXES))
    if not files:
        raise ValueError(f"{folder}: it holds no files of a checkpoint")
    return _digest(folder, files)


def digest_of_all(folder: Path) -> str:
    """The same over all files of a folder but hidden ones. Raises OSError; ValueError when there is none."""
    files = list(_files(folder, None))
    if not files:
        raise ValueError(f"{folder}: it holds no files")
    return _digest(folder, files)


def _digest(folder: Path, paths: Iterable[Path]) -> str:
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    known = _read_cache()
    digests: dict[str, str] = {}
    fresh: dict[str, list[object]] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, path in files.items():
            # Hub folders hold links into a folder of blobs.
            real = os.path.realpath(path)
            before = _state(real)
            cached = known.get(real)
            if cached is not None and cached[:-1] == before:
                digests[name] = str(cached[-1])
                continue
            digests[name] = _file_digest(real, pool)
            if _state(real) == before and time.time_ns() - max(before[1:3]) > _SETTLED_NS:
                fresh[real] = [*before, digests[name]]
    if fresh:
        _add_to_cache(fresh)
    whole = sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _files(folder: Path, suffixes: Collection[str] | None) -> Iterator[Path]:
    """suffixes: of a checkpoint's files; None for all files of all folders."""
    skipped = (".",) if suffixes is None else (".", *_OTHER_FOLDERS)
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(skipped)]
        for name in names:
            is_wanted = suffixes is None or os.path.splitext(name)[1].lower() in suffixes
            if is_wanted and not name.startswith("."):
                yield Path(parent) / name


def _raise(error: OSError) -> None:
    raise error


def _state(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _file_digest(path: str, pool: ThreadPoolExecutor) -> str:
    """sha-256 over the sha-256 of the file's parts."""
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = pool.map(lambda start: _part_digest(descriptor, start), range(0, max(size, 1), _PART_BYTES))
        return sha256(b"".join(parts)).hexdigest()
    finally:
        os.close(descriptor)


def _part_digest(descriptor: int, start: int) -> bytes:
    digest, end = sha256(), start + _PART_BYTES
    while start < end and (chunk := os.pread(descriptor, min(1 << 20, end - start), start)):
        digest.update(chunk)
        start += len(chunk)
    return digest.digest()


def _cache_file() -> Path:
    return cache_folder() / "checkpoint-digests.json"


def _read_cache() -> dict[str, list[object]]:
    """Path -> state and digest."""
    try:
        content = json.loads(_cache_file().read_bytes())
    except (OSError, ValueError):  # none yet, or not ours
        return {}
    if not isinstance(content, dict):
        return {}
    return {path: entry for path, entry in content.items() if isinstance(entry, list) and len(entry) == 5}


def _add_to_cache(fresh: dict[str, list[object]]) -> None:
    file = _cache_file()
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _read_cache() | fresh
            if len(known) > _CACHED_FILES_MOST:
                known = {path: entry for path, entry in known.items() if os.path.exists(path)}
            try:
                unfinished.write_text(json.dumps(known))
                unfinished.rename(file)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    unfinished.unlink()
    except OSError as error:
        log.info("digests of checkpoints are not kept in %s: %s", file, error)
