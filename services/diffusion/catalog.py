"""Which models there are: those of the settings and the folders in the model folder, whether loaded or not.

The front process and the engine both look here; a folder that was just written is known at the next look.
"""

import json
from pathlib import Path

from services.diffusion.settings import ModelSettings, Settings
from services.kit.model_folder import folders_in

INDEX = "model_index.json"


def known_models(settings: Settings) -> dict[str, ModelSettings]:
    """Every known model by name, those of the settings first; a name there hides the folder of that name."""
    models = dict(settings.models)
    for folder in folders_in(settings.model_folder, INDEX):
        models.setdefault(folder.name, ModelSettings(source=str(folder)))
    return models


def file_bytes(row: ModelSettings) -> int:
    """Size of the model's weights on disk in bytes; 0 when they are not here (yet)."""
    source = Path(row.source).expanduser()
    try:
        if source.is_file():
            return source.stat().st_size
        index = json.loads((source / INDEX).read_text("utf-8"))
        parts = [source / part for part, described in index.items() if isinstance(described, list)]
        return sum(file.stat().st_size for part in parts for file in part.glob("*.safetensors"))
    except (OSError, ValueError, AttributeError):  # what is wrong with it is said when it is loaded
        return 0
