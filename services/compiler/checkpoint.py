"""What a checkpoint's folder holds, and what of a request it cannot fulfil: told by small files before any weight is
read. Imports no ML library.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.compiler.domain import CompileRequest
from services.kit.faults import FieldViolation, failed_precondition, invalid_fields
from services.runtimes import diffusion_graphs, trocr_graphs
from services.runtimes.artifacts.manifest import Kind

_INDEX = "model_index.json"
_CONFIG = "config.json"
# What a folder of each kind holds.
MARKS = (_CONFIG, _INDEX)
_SINGLE_FILE = ".safetensors"


def kind_of(folder: Path) -> Kind | None:
    """What a checkpoint's folder holds; None for what is neither, and for a folder that is not there."""
    if (folder / _INDEX).is_file():
        return "diffusion"
    config = _read(folder / _CONFIG)
    if config.get("model_type") == "vision-encoder-decoder":
        return "trocr"
    # A part that is loaded by itself, beside a pipeline.
    return "diffusion" if _is_controlnet(config) else None


def components_of(folder: Path) -> tuple[str, ...]:
    """The networks that become graphs, as manifest.Graph names them; none when the folder does not tell."""
    if (folder / _INDEX).is_file():
        index = _read(folder / _INDEX)
        parts = [name for name, described in index.items() if isinstance(described, list) and described != [None, None]]
        networks = (*diffusion_graphs.TEXT_ENCODERS, diffusion_graphs.UNET, diffusion_graphs.TRANSFORMER)
        halves = (diffusion_graphs.VAE_ENCODER, diffusion_graphs.VAE_DECODER) if "vae" in parts else ()
        return (*(name for name in networks if name in parts), *halves)
    config = _read(folder / _CONFIG)
    if config.get("model_type") == "vision-encoder-decoder":
        return (trocr_graphs.ENCODER, trocr_graphs.DECODER)
    return (diffusion_graphs.CONTROLNET,) if _is_controlnet(config) else ()


def refuse(request: CompileRequest, folder: Path | None = None) -> None:
    """Raises Fault for a request that the checkpoint cannot fulfil, as far as its small files tell.

    folder: where the source was fetched to; None to look at the source itself, if it is on this machine.
    """
    place = folder or Path(request.source).expanduser()
    if place.suffix == _SINGLE_FILE and place.is_file():
        raise failed_precondition(
            "MODEL_UNUSABLE",
            f"model {request.model}: {place} is a single file, and artifacts are made of diffusers folders, whose"
            " tokenizers and configurations go with them; write one by diffusers (pipeline.from_single_file(FILE,"
            " config=FOLDER).save_pretrained(NEW_FOLDER)) and name NEW_FOLDER as the model's source",
            model=request.model,
        )
    components = components_of(place)
    unknown = [name for name in request.component_precisions if name not in components]
    if components and unknown:
        described = f"model {request.model} has no such component; accepted: {', '.join(components)}"
        raise invalid_fields(FieldViolation(f"component_precisions[{name[:80]!r}]", described) for name in unknown)


def _is_controlnet(config: Mapping[str, Any]) -> bool:
    return str(config.get("_class_name", "")).endswith("ControlNetModel")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
