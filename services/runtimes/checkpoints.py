"""Where a checkpoint comes from: a folder, or a hub repository at a pinned revision."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is fetched of a hub repository: configuration, tokenizer and weights, but no code and no pickles.
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md")
_PICKLES = ("*.bin", "*.pt")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why and what would be."""


class CheckpointMissingError(CheckpointError):
    """There is nothing where the checkpoint should be."""


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
    raise CheckpointMissingError(
        f"{source}: there is no such folder, and a hub repository is written owner/name@revision"
    )


def fetch(checkpoint: Checkpoint, *, allow_pickled_weights: bool = False) -> Path:
    """The checkpoint's folder, downloaded into the hub's cache if it is not there yet.

    Raises CheckpointMissingError when the hub has no such repository or revision, CheckpointError when it cannot be
    reached.
    """
    if checkpoint.revision is None:
        return Path(checkpoint.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    patterns = [*_WANTED, *(_PICKLES if allow_pickled_weights else ())]
    with hub_errors(f"{checkpoint.location}@{checkpoint.revision}"):
        return Path(snapshot_download(checkpoint.location, revision=checkpoint.revision, allow_patterns=patterns))


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the hub's library raises while fetching `what` into CheckpointError and CheckpointMissingError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{what}: the repository is gated; set HF_TOKEN to a token that may read it") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise CheckpointMissingError(f"{what}: the hub has no such repository or revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"{what}: it is not in the hub's cache and the hub cannot be reached") from error
    except Exception as error:  # network, disk, a broken answer: the library raises many kinds
        raise CheckpointError(f"{what}: fetching it from the hub failed: {type(error).__name__}: {error}") from error


def require_weights(folder: Path, *, allow_pickled_weights: bool) -> None:
    """Raise CheckpointError if the folder has no weights that may be loaded."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if allow_pickled_weights and pickled:
        return
    if pickled:
        raise CheckpointError(
            f"{folder}: no *.safetensors file; pickled weights are refused, because loading one can run code (convert"
            " them, or allow pickles in the settings if you trust their source)"
        )
    raise CheckpointError(f"{folder}: it has no weights; there should be *.safetensors files")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises CheckpointError unless it describes a vision encoder with a TrOCR decoder."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: its config.json is no JSON object")
    kind = config.get("model_type")
    if kind != "vision-encoder-decoder":
        raise CheckpointError(
            f"{folder}: its config.json has model_type {kind!r}; this service runs vision-encoder-decoder models with a"
            " trocr decoder"
        )
    for part in ("encoder", "decoder"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{folder}: its config.json describes no {part}")
    kind = config["decoder"].get("model_type")
    if kind != "trocr":
        raise CheckpointError(
            f"{folder}: its decoder has model_type {kind!r}; this service runs trocr decoders"
            " (VisionEncoderDecoderModel with TrOCRForCausalLM)"
        )
    return config


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the folder's weight files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
