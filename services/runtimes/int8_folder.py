"""Model folders whose weights are kept in 8 bits: `model.int8.safetensors` and an entry in config.json.

They are laid out as any other model folder. For a layer `NAME` the file holds `NAME.weight_int8` (int8),
`NAME.weight_scale` (float32, one a channel) and, in an "int8_static" folder, `NAME.input_scale` and
`NAME.input_zero_point`; all other tensors have their usual names. The file has a name of its own so that the
transformers library says that it finds no weights, rather than take the integers for weights.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from services.runtimes.checkpoints import CheckpointError
from services.runtimes.int8 import InputRange, Int8Weight
from services.runtimes.precision import Precision, StoredInt8, attach

WEIGHTS = "model.int8.safetensors"
# In config.json: {"format": 1, "precision": "int8_static"}.
CONFIG_KEY = "inkwell_int8"
FORMAT = 1

_VALUES, _SCALE = ".weight_int8", ".weight_scale"
_INPUT_SCALE, _INPUT_ZERO_POINT = ".input_scale", ".input_zero_point"
# What an int8 folder takes over: configurations and tokenizers.
_TAKEN_OVER = ("*.json", "*.txt", "*.model")
# A calibration is for the weights that it was fitted on.
_LEFT_OUT = ("calibration.json",)


def write(
    output: Path,
    source: Path,
    model: VisionEncoderDecoderModel,
    weights: Mapping[str, Int8Weight],
    ranges: Mapping[str, InputRange],
    precision: Precision,
) -> None:
    """Write the folder `output`, which must not exist, from the float32 model of the folder `source`.

    The folder appears whole or not at all.
    """
    fresh = output.with_name(f".{output.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for pattern in _TAKEN_OVER:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json") and file.name not in _LEFT_OUT:
                shutil.copyfile(file, fresh / file.name)
    config = json.loads((fresh / "config.json").read_text("utf-8"))
    config[CONFIG_KEY] = {"format": FORMAT, "precision": precision}
    (fresh / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    save_file(_tensors(model, weights, ranges), fresh / WEIGHTS, metadata={"format": "pt"})
    # The safetensors library lets nobody else read what it writes.
    (fresh / WEIGHTS).chmod((fresh / "config.json").stat().st_mode)
    fresh.rename(output)


def tensor_bytes(model: VisionEncoderDecoderModel, weights: Mapping[str, Int8Weight]) -> int:
    """Bytes of the tensors that `write` would write without input ranges."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model, weights, {}).values())


def _tensors(
    model: VisionEncoderDecoderModel, weights: Mapping[str, Int8Weight], ranges: Mapping[str, InputRange]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, weight in weights.items():
        if id(weight) not in written:  # a layer that shares its weight finds it again by sharing
            written.add(id(weight))
            tensors[name + _VALUES] = weight.values.contiguous()
            tensors[name + _SCALE] = weight.scale.contiguous()
        if name in ranges:
            tensors[name + _INPUT_SCALE] = torch.tensor(ranges[name].scale)
            tensors[name + _INPUT_ZERO_POINT] = torch.tensor(ranges[name].zero_point, dtype=torch.uint8)
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in weights:
            tensors[name] = _smallest(tensor)
    return tensors


def _smallest(tensor: Tensor) -> Tensor:
    """As float16 where that loses nothing, because the numbers were float16 before."""
    if tensor.dtype is torch.float32:
        half = tensor.half()
        if torch.equal(half.float(), tensor):
            return half.contiguous()
    return tensor.detach().clone().contiguous()


def precision_of(folder: Path) -> Precision | None:
    """What an int8 folder was made for; None for any other folder and for none."""
    try:
        description = json.loads((folder / "config.json").read_text("utf-8"))[CONFIG_KEY]
        precision: Precision = description["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return precision if precision in get_args(Precision) else None


def is_int8(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config.json, parsed, is that of an int8 folder."""
    return CONFIG_KEY in config


def load(folder: Path) -> tuple[VisionEncoderDecoderModel, dict[str, Any]]:
    """The folder's model, its rounded weights in float32, and the library's report on its loading.

    apply_precision finds the 8-bit weights and the input ranges on it. Raises CheckpointError for a file that is not
    whole.
    """
    description = json.loads((folder / "config.json").read_text("utf-8"))[CONFIG_KEY]
    known = isinstance(description, dict) and description.get("format") == FORMAT
    if not known or description.get("precision") not in get_args(Precision):
        raise CheckpointError(f"{folder}: config.json: {CONFIG_KEY} {description!r} is not of format {FORMAT}")
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    stored = _stored(tensors, file)
    state = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith((_VALUES, _SCALE, _INPUT_SCALE, _INPUT_ZERO_POINT))
    }
    state |= {f"{name}.weight": weight.to_float() for name, weight in stored.weights.items()}
    model, report = VisionEncoderDecoderModel.from_pretrained(
        None,
        config=VisionEncoderDecoderConfig.from_pretrained(folder, trust_remote_code=False),
        state_dict=state,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    attach(model, stored)
    return model, report


def _stored(tensors: Mapping[str, Tensor], file: Path) -> StoredInt8:
    weights, ranges = {}, {}
    for key, tensor in tensors.items():
        if key.endswith(_VALUES):
            name = key.removesuffix(_VALUES)
            scale = tensors.get(name + _SCALE)
            if tensor.dtype is not torch.int8 or scale is None or scale.shape != tensor.shape[:1]:
                raise CheckpointError(f"{file}: {key} is not int8 with a scale a channel")
            weights[name] = Int8Weight(tensor, scale.float())
        elif key.endswith(_INPUT_SCALE):
            name = key.removesuffix(_INPUT_SCALE)
            zero_point = tensors.get(name + _INPUT_ZERO_POINT)
            if zero_point is None or tensor.numel() != 1 or zero_point.numel() != 1 or not tensor.item() > 0:
                raise CheckpointError(f"{file}: {key} is no scale with a zero point")
            ranges[name] = InputRange(float(tensor), int(zero_point))
    return StoredInt8(weights, ranges)
