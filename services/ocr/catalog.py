"""Which models there are: those of the settings and the folders in the model folder, whether loaded or not.

The front process and the engine both look here; a folder that was just written is known at the next look.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.kit.model_folder import folders_in
from services.ocr.languages import is_tag
from services.ocr.settings import Settings

_CARD_BYTES_MOST = 64 * 1024  # of README.md; the front matter stands at its beginning


@dataclass(frozen=True)
class KnownModel:
    """A model that can be loaded."""

    name: str
    source: str  # a folder, or a hub id with its revision


def known_models(settings: Settings) -> dict[str, KnownModel]:
    """Every known model by name, those of the settings first; a name there hides the folder of that name."""
    models = {name: KnownModel(name, source) for name, source in settings.models.items()}
    for folder in folders_in(settings.model_folder, "config.json"):
        models.setdefault(folder.name, KnownModel(folder.name, str(folder)))
    return models


def folder_of(source: str) -> Path | None:
    """The folder that a source names; None when it is a hub repository or nothing."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def languages_of(name: str, folder: Path | None, settings: Settings) -> tuple[str, ...]:
    """The languages set for the model, else what its model card declares; () when neither says any."""
    if name in settings.languages:
        return tuple(settings.languages[name])
    return card_languages(folder) if folder else ()


def card_languages(folder: Path) -> tuple[str, ...]:
    """`language:` in the front matter of README.md, one tag or a list; what is no language tag is left out."""
    declared = _front_matter(folder / "README.md").get("language", ())
    if isinstance(declared, str):
        declared = (declared,)
    if not isinstance(declared, Sequence):
        return ()
    # YAML reads an unquoted "no" (Norwegian) as false.
    tags = ("no" if tag is False else tag for tag in declared)
    return tuple(dict.fromkeys(tag for tag in tags if isinstance(tag, str) and is_tag(tag)))


def _front_matter(card: Path) -> dict[str, Any]:
    try:
        with card.open("rb") as file:
            text = file.read(_CARD_BYTES_MOST).decode("utf-8", "replace")
    except OSError:
        return {}
    begin, _, rest = text.partition("\n")
    matter, end, _ = rest.partition("\n---")
    if begin.strip() != "---" or not end:
        return {}
    try:
        parsed = yaml.safe_load(matter)
    except yaml.YAMLError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def file_bytes(folder: Path) -> int:
    """Size of the folder's weights on disk in bytes; 0 when there are none."""
    files = list(folder.glob("*.safetensors")) or [*folder.glob("*.bin"), *folder.glob("*.pt")]
    return sum(file.stat().st_size for file in files)
