"""Which models can be compiled: those of the settings and of the model folder. No weights are read here."""

from collections.abc import Mapping
from pathlib import Path

from services.compiler.checkpoint import MARKS, kind_of
from services.compiler.settings import Settings
from services.kit.model_folder import folders_in
from services.runtimes.artifacts.manifest import Kind


def sources(settings: Settings) -> dict[str, str]:
    """Every known model's source by name; a name in the settings hides the folder of that name."""
    found = {folder.name: str(folder) for mark in MARKS for folder in folders_in(settings.model_folder, mark)}
    return found | settings.models


def kinds(sources: Mapping[str, str]) -> dict[str, Kind | None]:
    """What each model is; None for a hub repository, which is looked at when it is compiled."""
    return {name: kind_of(Path(source).expanduser()) for name, source in sources.items()}
