"""Finds checkpoints: diffusers folders, hub repositories pinned at a revision, single files.

No weight is read here. Every file is there, whole and no pickle before the first number is loaded.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import pipelines as diffusers_pipelines
from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class
from huggingface_hub import snapshot_download
from torch import nn

from services.runtimes import safetensors_files
from services.runtimes.checkpoints import Checkpoint, CheckpointError, CheckpointMissingError, hub_errors, resolve

INDEX = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SINGLE_FILE = ".safetensors"
_PICKLE_ADVICE = "which can run code when loaded; convert them to safetensors"
# The weight files' names without ending, of diffusers and of transformers.
_STEMS = ("diffusion_pytorch_model", "model")
_INDEX_ENDING = ".safetensors.index.json"
# Of a repository: configurations, tokenizers, and the indexes of weights in shards.
_SMALL_FILES = [INDEX, "*/*.json", "*/*.txt", "*/*.model"]
# In checkpoints of the original layouts the names of a part's tensors begin like this.
_DENOISERS = ("unet", "transformer")
# Transformers come under the first of these, or alone in their file and then under none.
_DENOISER_PREFIXES = ("model.diffusion_model.", "joint_blocks.", "double_blocks.")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_CLIP_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.clip_")
_T5_PREFIX = "text_encoders.t5xxl."
# A second set of weights that training leaves behind, and nothing reads.
_UNUSED_PREFIX = "model_ema."


class ModelError(Exception):
    """A model cannot be served; the message says which part, and why."""


class ModelMissingError(ModelError):
    """There is nothing where the model should be."""


@dataclass(frozen=True)
class Part:
    """A module of a pipeline. variant: "fp16" for weights in files named so, None for plain names."""

    name: str
    cls: type[nn.Module]
    library: str
    in_file: bool  # of a single file, not of the folder
    variant: str | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint that was looked at.

    folder: model_index.json, configurations, tokenizers, and the weights of the parts that are not in `file`.
    """

    folder: Path
    index: dict[str, Any]  # model_index.json
    file: Path | None
    parts: tuple[Part, ...]
    number_count: int  # numbers in all parts' weights
    file_bytes: int


def find(source: str, config: str | None = None) -> Source:
    """Look at a checkpoint, fetching it from the hub if it is not in its cache yet.

    source: a diffusers folder, one .safetensors file of a whole checkpoint, or a hub model pinned as
    owner/name@revision. config: for a .safetensors file, the folder or hub model whose configurations and tokenizers it
    goes with.

    Raises ModelError (ModelMissingError where there is nothing): a pickle, a file that is not whole, a part without
    files, a class that the libraries do not have.
    """
    location = Path(source).expanduser()
    if location.suffix in PICKLES:
        raise ModelError(f"{source} is a pickle, {_PICKLE_ADVICE}")
    if location.suffix == _SINGLE_FILE:
        if not location.is_file():
            raise ModelMissingError(f"there is no file {source}")
        return _find_single_file(location, config)
    if location.is_dir():
        return _find_folder(location)
    return _find_folder(_fetch(source, whole=True))


def find_rest(folder: Path, without: Collection[str]) -> Source:
    """A diffusers folder whose parts of these names have no weights there, but a config.json. Raises ModelError."""
    return _find_folder(folder, without)


def is_refiner(index: dict[str, Any]) -> bool:
    """True for a model that only finishes what another began: SDXL's, which is conditioned on an aesthetics score."""
    return bool(index.get("requires_aesthetics_score"))


def check_module_folder(folder: Path, what: str) -> int:
    """Numbers in a module's weights. Raises ModelError unless the folder has them, whole, and a config.json."""
    check_weights(folder, what, None)
    return _count(_weight_files(folder, None), what)


# --- finding ---


def _find_folder(folder: Path, without: Collection[str] = ()) -> Source:
    index = _read_index(folder)
    parts = []
    for name, cls, library in _described_parts(folder, index):
        if name in without:
            continue
        variant = _variant_of(folder / name)
        check_weights(folder / name, name, variant)
        parts.append(Part(name, cls, library, in_file=False, variant=variant))
    return _source(folder, index, None, parts, 0)


def _find_single_file(file: Path, config: str | None) -> Source:
    if config is None:
        raise ModelError(
            f"{file.name} is a single file and needs `config`: the diffusers folder, or hub model pinned as"
            " owner/name@revision, whose configurations and tokenizers it goes with"
        )
    local = Path(config).expanduser()
    folder = local if local.is_dir() else _fetch(config, whole=False)
    try:
        tensors = safetensors_files.tensors_in(file)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if not any(name.startswith(_DENOISER_PREFIXES) for name in tensors):
        raise ModelError(f"{file.name} holds no diffusion model in a layout that diffusers knows")
    index = _read_index(folder)
    parts = []
    for name, cls, library in _described_parts(folder, index):
        if name == "safety_checker":  # in no single file, and left out by diffusers too
            index[name] = [None, None]
            continue
        in_file = _holds(tensors, name, cls)
        variant = None
        if not in_file:
            variant = _variant_of(folder / name)
            try:
                check_weights(folder / name, name, variant)
            except ModelError as error:
                raise ModelError(
                    f"{name}: {file.name} does not hold it, and the configuration's folder has no weights for it"
                    f" either ({error})"
                ) from None
        parts.append(Part(name, cls, library, in_file=in_file, variant=variant))
    count = sum(tensor.number_count for name, tensor in tensors.items() if not name.startswith(_UNUSED_PREFIX))
    return _source(folder, index, file, parts, count)


def _source(folder: Path, index: dict[str, Any], file: Path | None, parts: list[Part], in_file: int) -> Source:
    """Put what was found together; `in_file` numbers are in the single file."""
    files = [
        (part, file) for part in parts if not part.in_file for file in _weight_files(folder / part.name, part.variant)
    ]
    number_count = in_file + sum(_count([weights], part.name) for part, weights in files)
    paths = [weights for _, weights in files] + ([file] if file else [])
    return Source(folder, index, file, tuple(parts), number_count, sum(path.stat().st_size for path in paths))


def _holds(tensors: Iterable[str], name: str, cls: type[nn.Module]) -> bool:
    prefixes: tuple[str, ...]
    if name in _DENOISERS:
        prefixes = _DENOISER_PREFIXES
    elif name == "vae":
        prefixes = _VAE_PREFIXES
    elif cls.__name__.startswith("T5"):
        prefixes = (_T5_PREFIX,)
    else:
        prefixes = _CLIP_PREFIXES
    return any(tensor.startswith(prefixes) for tensor in tensors)


def _fetch(source: str, *, whole: bool) -> Path:
    """The folder of a hub repository in the hub's cache: no code, no pickles, and no weights unless `whole`."""
    try:
        checkpoint = resolve(source)
        if checkpoint.revision is None:
            return Path(checkpoint.location)
        with hub_errors(source):
            folder = _snapshot(checkpoint, _SMALL_FILES)
        if not whole:
            return folder
        parts = [name for name in _read_index(folder) if (folder / name / "config.json").is_file()]
        with hub_errors(source):
            wanted = [
                f"{part}/{stem}{kind}.safetensors" for part in parts for stem in _STEMS for kind in ("", "-*-of-*")
            ]
            folder = _snapshot(checkpoint, wanted)
            if lacking := [part for part in parts if not _weight_files(folder / part, None)]:
                folder = _snapshot(checkpoint, [f"{part}/*.fp16*.safetensors" for part in lacking])
        return folder
    except CheckpointMissingError as error:
        raise ModelMissingError(str(error)) from error
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def _snapshot(checkpoint: Checkpoint, patterns: list[str]) -> Path:
    return Path(snapshot_download(checkpoint.location, revision=checkpoint.revision, allow_patterns=patterns))


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a diffusers folder: it has no {INDEX}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(index, dict):
        raise ModelError(f"{file} is not a JSON object")
    return index


def _described_parts(folder: Path, index: dict[str, Any]) -> list[tuple[str, type[nn.Module], str]]:
    """The modules that the index names, with their class and its library; the other parts are only looked for."""
    modules = []
    for name, described in index.items():
        if name.startswith("_") or not isinstance(described, list) or described == [None, None]:
            continue
        cls, library = _class_of(name, described)
        if not (folder / name).is_dir():
            raise ModelError(f"{name}: {folder / name} is missing, and {INDEX} names it")
        if issubclass(cls, nn.Module):
            if not (folder / name / "config.json").is_file():
                raise ModelError(f"{name}: {folder / name} has no config.json")
            modules.append((name, cls, library))
        elif issubclass(cls, transformers.PreTrainedTokenizerBase):
            _check_tokenizer(folder / name, name, cls)
    return modules


def _check_tokenizer(folder: Path, name: str, cls: Any) -> None:
    """Raise ModelError without a vocabulary: the library would make a tokenizer that knows no word."""
    files = dict(cls.vocab_files_names)
    whole = files.pop("tokenizer_file", "tokenizer.json")
    if not (folder / whole).is_file() and not all((folder / file).is_file() for file in files.values()):
        raise ModelError(
            f"{name}: {folder} has no vocabulary; there should be {whole} or {' and '.join(files.values())}"
        )


def _class_of(name: str, described: list[Any]) -> tuple[type[Any], str]:
    library, class_name = described if len(described) == 2 else (None, None)
    if not isinstance(library, str) or not isinstance(class_name, str):
        raise ModelError(f"{name}: {INDEX} should name its library and class, and says {described}")
    if library == "diffusers":
        module: Any = diffusers
    elif library == "transformers":
        module = transformers
    else:
        module = getattr(diffusers_pipelines, library, None)
    if module is None:
        raise ModelError(
            f"{name}: its class is {library}.{class_name}, which is neither of diffusers nor of transformers;"
            " code that comes with a checkpoint is not run"
        )
    if library == "transformers":
        class_name = _maybe_remap_transformers_class(class_name) or class_name  # indexes older than the library
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        raise ModelError(f"{name}: {library} has no class {class_name} in the version that is installed here")
    return cls, library


def _variant_of(folder: Path) -> str | None:
    """The variant of the only weights there are, None for the plain ones."""
    if any((folder / f"{stem}{ending}").is_file() for stem in _STEMS for ending in (".safetensors", _INDEX_ENDING)):
        return None
    return "fp16" if any(folder.glob("*.fp16*.safetensors")) else None


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The weight files that are loaded of a module's folder, as its shard index lists them if there is one."""
    infix = f".{variant}" if variant else ""
    for stem in _STEMS:
        whole = folder / f"{stem}{infix}.safetensors"
        if whole.is_file():
            return [whole]
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            try:
                shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is not an index of weight files: {error}") from error
    return []


def check_weights(folder: Path, what: str, variant: str | None) -> None:
    """Raise ModelError unless a module's folder has its config.json and whole safetensors files."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{what}: {folder} is not a diffusers model folder: it has no config.json")
    files = _weight_files(folder, variant)
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ModelError(f"{what} has only pickled weights ({', '.join(pickles)}), {_PICKLE_ADVICE}")
        raise ModelError(f"{what}: {folder} has no weights; there should be a {_STEMS[0]}.safetensors or such")
    for file in files:
        if not file.is_file():
            raise ModelError(f"{what}: {file.name} is missing in {folder}, and the index of the weights names it")
    _count(files, what)


def _count(files: Iterable[Path], what: str) -> int:
    try:
        return sum(map(safetensors_files.number_count, files))
    except ValueError as error:
        raise ModelError(f"{what}: {error}") from None
