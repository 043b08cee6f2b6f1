"""Where a checkpoint comes from: a folder, or a hub repository at a pinned revision."""

from dataclasses import dataclass
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why and what would be."""


@dataclass(frozen=True)
class Checkpoint:
    """A resolved source. `location` is a folder or a hub id, `revision` is None for a folder."""

    location: str
    revision: str | None


def resolve(source: str) -> Checkpoint:
    """Read "folder" or "owner/name@revision"; raises CheckpointError for neither.

    The revision is required, so that what is served does not change because a repository did.
    """
    if Path(source).expanduser().is_dir():
        return Checkpoint(str(Path(source).expanduser().resolve()), None)
    name, at, revision = source.partition("@")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        if not (at and revision):
            raise CheckpointError(f"{source}: a hub repository needs its revision; write {name}@<commit or tag>")
        return Checkpoint(name, revision)
    raise CheckpointError(f"{source}: there is no such folder, and a hub repository is written owner/name@revision")


def require_safetensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a local folder has no safetensors weights; the hub is asked for nothing else anyway."""
    if checkpoint.revision is None and not any(Path(checkpoint.location).glob("*.safetensors")):
        raise CheckpointError(
            f"{checkpoint.location}: no *.safetensors file; pickled weights are refused, because loading one can run"
            " code (convert them, or allow pickles in the settings if you trust their source)"
        )
