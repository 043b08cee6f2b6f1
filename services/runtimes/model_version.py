"""A short name for the exact weights that serve, so that replies and reports can say which they were."""

import os
from hashlib import sha256
from pathlib import Path

_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DIGITS = 12
# Of each file that many blocks are looked at, evenly spread: a megabyte a file, where hashing all of a large checkpoint
# takes seconds. Training changes nearly every number, so nearly every block.
_BLOCKS = 256
_BLOCK_BYTES = 4096


def of_artifact(artifact_id: str) -> str:
    """The first digits of an artifact's id, which is a digest itself."""
    return artifact_id[:_DIGITS]


def of_checkpoint(place: Path) -> str:
    """12 hexadecimal digits over the names, sizes and sampled contents of a checkpoint's file, or its folder's files.

    Raises OSError for a file that cannot be read.
    """
    folder = place if place.is_dir() else place.parent
    found = (p for p in place.rglob("*") if _is_own(p.relative_to(place))) if place.is_dir() else (place,)
    whole = sha256()
    for file in sorted(p for p in found if p.suffix.lower() in _SUFFIXES and p.is_file()):
        size = file.stat().st_size
        whole.update(f"{file.relative_to(folder).as_posix()}\0{size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            last = max(0, size - _BLOCK_BYTES)
            for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                whole.update(os.pread(stream.fileno(), _BLOCK_BYTES, start))
    return whole.hexdigest()[:_DIGITS]


def _is_own(file: Path) -> bool:
    # Not of a snapshot that a training left in the folder, nor a cache.
    return not any(part.startswith((".", "checkpoint-")) for part in file.parts)
