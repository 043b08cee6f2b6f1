"""Which LoRAs, embeddings, IP-Adapters and controls there are: those of the settings and of the folders they name.

The front process and the engine both look here, at every call: a file that was just copied in is known at the next one.
Nothing of a file's weights is read.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from services.diffusion.settings import AdapterSettings, ControlSettings, ImagePromptSettings, Settings

ControlKind = Literal["controlnet", "t2i_adapter"]

# _class_name of a control's config.json.
CONTROL_CLASSES: dict[str, ControlKind] = {
    "ControlNetModel": "controlnet",
    "SD3ControlNetModel": "controlnet",
    "FluxControlNetModel": "controlnet",
    "T2IAdapter": "t2i_adapter",
}

# Names come into prompts as <lora:name:0.8>, and are looked up among those listed, never made into a path.
_NAME = re.compile(r"[^\s.:<>\x00-\x1f][^:<>\x00-\x1f]{0,127}")
_WEIGHTS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What trainers call the file where a folder holds several.
_USUAL_FILES = ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "ip-adapter.safetensors")
_CONFIG_BYTES_MOST = 1024 * 1024


@dataclass(frozen=True)
class KnownAdapter:
    """A LoRA, embedding or IP-Adapter. Either `file` or `trouble` is set."""

    name: str
    models: tuple[str, ...]  # it is for; () when nobody said
    file: Path | None
    trouble: str  # why it cannot be used, such as that only a pickle is there

    def fits(self, model: str) -> bool:
        """Whether its operator lets it be used with the model; the weights are compared later."""
        return not self.models or model in self.models


@dataclass(frozen=True)
class KnownImagePromptAdapter(KnownAdapter):
    """An IP-Adapter."""

    image_encoder: str  # folder


@dataclass(frozen=True)
class KnownControl:
    """A ControlNet or T2I-Adapter. `trouble` is empty exactly when `kind` is set."""

    name: str
    models: tuple[str, ...]
    folder: Path
    preprocessor: str  # empty when nobody said
    kind: ControlKind | None
    class_name: str  # as its config.json says
    trouble: str

    def fits(self, model: str) -> bool:
        """Whether its operator lets it be used with the model; the weights are compared later."""
        return not self.models or model in self.models


Known = TypeVar("Known", KnownAdapter, KnownImagePromptAdapter, KnownControl)


def known_loras(settings: Settings) -> dict[str, KnownAdapter]:
    """Every LoRA by name, those of the settings first; a name there hides the file of that name."""
    return _known(settings.loras, settings.lora_folder)


def known_embeddings(settings: Settings) -> dict[str, KnownAdapter]:
    """Every textual inversion embedding by the word that stands for it."""
    return _known(settings.embeddings, settings.embedding_folder)


def known_image_prompt_adapters(settings: Settings) -> dict[str, KnownImagePromptAdapter]:
    """Every IP-Adapter by name."""
    return {name: _image_prompt_adapter(name, row) for name, row in settings.image_prompt_adapters.items()}


def known_controls(settings: Settings) -> dict[str, KnownControl]:
    """Every ControlNet and T2I-Adapter by name."""
    return {name: _control(name, row) for name, row in settings.controls.items()}


def fitting(known: Mapping[str, Known], model: str) -> dict[str, Known]:
    """Those that can be used and that their operator lets be used with the model."""
    return {name: one for name, one in known.items() if not one.trouble and one.fits(model)}


def loras_for(settings: Settings, model: str) -> dict[str, KnownAdapter]:
    """The LoRAs that a call of this model may name."""
    return fitting(known_loras(settings), model)


def image_prompt_adapters_for(settings: Settings, model: str) -> dict[str, KnownImagePromptAdapter]:
    """The IP-Adapters that a call of this model may name."""
    return fitting(known_image_prompt_adapters(settings), model)


def controls_for(settings: Settings, model: str) -> dict[str, KnownControl]:
    """The controls that a call of this model may name."""
    return fitting(known_controls(settings), model)


def embedding_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds embeddings in a prompt; group `name` is the word as it stands there. None without names.

    A name counts where it stands as a word of its own (no letter, digit, underscore or hyphen around it) or behind
    `embedding:`. Upper and lower case are the same, as they are to the tokenizers. A match without the group is a
    <lora:…> tag, within which no word counts.
    """
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    if not longest_first:
        return None
    either = "|".join(longest_first)
    return re.compile(rf"<lora:[^>]*>|(?:(?<![\w-])embedding:|(?<![\w-]))(?P<name>{either})(?![\w-])", re.IGNORECASE)


def embeddings_in(prompt: str, known: Iterable[str]) -> tuple[str, ...]:
    """The known embeddings that a prompt uses, in the order of their first use, as `known` spells them."""
    names = list(known)
    pattern = embedding_pattern(names)
    if pattern is None:
        return ()
    words = (match["name"] for match in pattern.finditer(prompt) if match["name"])
    return tuple(dict.fromkeys(spelled(word, names) for word in words))


def spelled(word: str, names: Iterable[str]) -> str:
    """The name that a word of a prompt means, exactly as it is known if that is among them."""
    same = [name for name in names if re.fullmatch(re.escape(name), word, re.IGNORECASE)]
    return word if word in same else same[0]


def _known(rows: Mapping[str, AdapterSettings], folder: str) -> dict[str, KnownAdapter]:
    known = {name: KnownAdapter(name, tuple(row.models), *_weights_of(row.source)) for name, row in rows.items()}
    for file in _files_in(folder):
        known.setdefault(file.stem, KnownAdapter(file.stem, (), file, ""))
    return known


def _files_in(folder: str) -> list[Path]:
    if not folder:
        return []
    try:
        with os.scandir(Path(folder).expanduser()) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(_WEIGHTS) and entry.is_file())
    except OSError:  # it may be gone for a while, such as a volume that is mounted again
        return []
    return [Path(folder).expanduser() / name for name in names if _NAME.fullmatch(name.removesuffix(_WEIGHTS))]


def _weights_of(source: str) -> tuple[Path | None, str]:
    """The safetensors file that a source means, or why there is none."""
    place = Path(source).expanduser()
    if place.is_file():
        if place.suffix == _WEIGHTS:
            return place, ""
        return None, f"{place.name} is not a .safetensors file; pickled weights can run code when loaded, convert them"
    if not place.is_dir():
        return None, f"{place.name} is not there"
    files = sorted(place.glob(f"*{_WEIGHTS}"))
    usual = [file for file in files if file.name in _USUAL_FILES]
    if len(usual) == 1 or len(files) == 1:
        return (usual or files)[0], ""
    if files:
        return None, f"{place.name} holds several .safetensors files ({_few(files)}); name one of them as the source"
    pickles = sorted(file for file in place.iterdir() if file.suffix in _PICKLES)
    if pickles:
        return None, f"{place.name} holds only pickled weights ({_few(pickles)}), which can run code; convert them"
    return None, f"{place.name} holds no .safetensors file"


def _image_prompt_adapter(name: str, row: ImagePromptSettings) -> KnownImagePromptAdapter:
    file, trouble = _weights_of(row.source)
    if not trouble and not (Path(row.image_encoder).expanduser() / "config.json").is_file():
        file, trouble = None, f"its image encoder {Path(row.image_encoder).name} is not a model folder"
    return KnownImagePromptAdapter(name, tuple(row.models), file, trouble, row.image_encoder)


def _control(name: str, row: ControlSettings) -> KnownControl:
    folder = Path(row.source).expanduser()
    class_name, trouble = _class_of(folder)
    kind = CONTROL_CLASSES.get(class_name)
    if not trouble and kind is None:
        trouble = f"{folder.name} is a {class_name[:80] or 'model without _class_name'}; these steer: " + ", ".join(
            CONTROL_CLASSES
        )
    elif not trouble and not any(folder.glob(f"*{_WEIGHTS}")):
        pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
        found = f"only pickled weights ({_few(pickles)}), which can run code; convert them" if pickles else "no weights"
        trouble = f"{folder.name} holds {found}"
    if trouble:
        kind = None
    return KnownControl(name, tuple(row.models), folder, row.preprocessor, kind, class_name, trouble)


def _class_of(folder: Path) -> tuple[str, str]:
    """What the folder's config.json says the model is, or why that is not known."""
    try:
        with (folder / "config.json").open("rb") as file:
            config: Any = json.loads(file.read(_CONFIG_BYTES_MOST))
    except OSError:
        return "", f"{folder.name} is not a diffusers model folder: it has no config.json"
    except ValueError:
        return "", f"{folder.name}/config.json is not JSON"
    if not isinstance(config, dict):
        return "", f"{folder.name}/config.json is not a JSON object"
    return str(config.get("_class_name", "")), ""


def _few(files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:3])
    return names if len(files) <= 3 else f"{names} …"
