"""Which models can be compiled: those of the settings and of the model folder. No weights are read here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.compiler.settings import Settings
from services.kit.model_folder import folders_in
from services.runtimes.artifacts.manifest import Kind

# What a folder of each kind holds.
_MARKS = ("config.json", "model_index.json")


def sources(settings: Settings) -> dict[str, str]:
    """Every known model's source by name; a name in the settings hides the folder of that name."""
    found = {folder.name: str(folder) for mark in _MARKS for folder in folders_in(settings.model_folder, mark)}
    return found | settings.models


def kinds(sources: Mapping[str, str]) -> dict[str, Kind | None]:
    """What each model is; None for a hub repository, which is looked at when it is compiled."""
    return {name: kind_of(Path(source).expanduser()) for name, source in sources.items()}


def kind_of(folder: Path) -> Kind | None:
    """What a checkpoint's folder holds; None for what is neither, and for a folder that is not there."""
    if (folder / "model_index.json").is_file():
        return "diffusion"
    config = _config(folder / "config.json")
    if config.get("model_type") == "vision-encoder-decoder":
        return "trocr"
    # A part that is loaded by itself, beside a pipeline.
    return "diffusion" if str(config.get("_class_name", "")).endswith("ControlNetModel") else None


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
