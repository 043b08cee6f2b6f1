"""Judges an adapter's file by its header before a weight of it is read: is it whole, and is it for this model?"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from torch import nn

from services.runtimes.safetensors_files import Tensor, tensors_in

# The width of cross-attention tells the families of U-Nets apart; it is that of their text encoders' output.
_FAMILY_OF_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
_CROSS_ATTENTION_INPUT = re.compile(r"attn2[._](?:processor[._])?to_k(?:_lora|\.lora)?[._](?:lora_)?(?:down|A)\.weight")
_LORA_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Layers that other kinds of adapters have in the place of LoRA's two matrices.
_OTHER_KINDS = {
    "hada_w1": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    ".diff": "full weight differences",
}


class Unusable(Exception):
    """The file cannot be used with any model: missing, damaged, or of a kind that is not supported."""


class Unfit(Exception):
    """The file is whole, but made for a model of another architecture."""


def header_of(file: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name. Raises Unusable unless it is a whole safetensors file with something in it."""
    try:
        tensors = tensors_in(file)
    except ValueError as error:
        raise Unusable(without_path(error, file)) from None
    if not tensors:
        raise Unusable(f"{file.name} holds no tensor")
    return tensors


def without_path(error: Exception, place: Path) -> str:
    """The error's text for callers, who are told the name of a file or folder but not where it lies."""
    return str(error).replace(str(place), place.name)


def check_lora(pipeline: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises Unfit unless every layer of the LoRA has its place in the pipeline's parts, Unusable if it is no LoRA."""
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in tensors):
            raise Unusable(f"its layers are {kind}; only LoRA is supported")
    parts = lora_parts(pipeline)
    if not parts:
        raise Unfit(f"diffusers loads no LoRA into {type(pipeline).__name__}")
    state = _as_pipeline_names(pipeline, tensors)
    placed = {name: _as_peft_names(name, part, state) for name, part in parts.items()}
    foreign = sorted({key.split(".")[0] for key in state if not any(key.startswith(f"{name}.") for name in parts)})
    problems = [f"it changes {name}, which this model does not have" for name in foreign]
    count = 0
    for name, layers in placed.items():
        for key, tensor in layers.items():
            count += 1
            if problem := _problem(name, parts[name], key, tuple(tensor.shape)):
                problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 1} more such layers)" if len(problems) > 1 else ""
        raise Unfit(f"{problems[0]}{more}; it looks made for {made_for(tensors)}")
    if not count:
        raise Unusable("it holds no LoRA layers")


def lora_parts(pipeline: Any) -> dict[str, nn.Module]:
    """The parts of the pipeline that LoRAs change, by name: the denoiser and the text encoders that are there."""
    found = {name: getattr(pipeline, name, None) for name in getattr(pipeline, "_lora_loadable_modules", ())}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def made_for(tensors: Mapping[str, Tensor]) -> str:
    """The family of models that a LoRA or control was made for, with what gives it away, as far as one can tell."""
    names = list(tensors)
    if any("double_blocks" in name or "single_transformer_blocks" in name for name in names):
        return "Flux (it has single and double blocks)"
    if any("joint_blocks" in name or ".add_k_proj." in name for name in names):
        return "Stable Diffusion 3 (its attention is joint)"
    widths = {
        tensor.shape[1] for name, tensor in tensors.items() if _CROSS_ATTENTION_INPUT.search(name) and tensor.shape[1:]
    }
    second = any(name.startswith(("text_encoder_2.", "lora_te2_")) for name in names)
    if second or 2048 in widths:
        marks = ["has layers of text_encoder_2"] * second + ["has a cross-attention width of 2048"] * (2048 in widths)
        return f"Stable Diffusion XL (it {' and '.join(marks)})"
    if widths:
        width = max(widths)
        return f"{_FAMILY_OF_WIDTH.get(width, 'another model')} (it has a cross-attention width of {width})"
    return "another model"


def _as_pipeline_names(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors without their numbers, under the names that diffusers converts kohya's and others' into."""
    state = {
        # A kohya file states each layer's alpha, which the conversion reads.
        name: torch.tensor(1.0) if name.endswith(".alpha") else torch.empty(tensor.shape, device="meta")
        for name, tensor in tensors.items()
    }
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "text_encoder_2") and _unet(pipeline) else {}
    try:
        converted = type(pipeline).lora_state_dict(state, **options)
    except Exception as error:  # noqa: BLE001 - the conversion fails in as many ways as there are foreign formats
        raise Unfit(
            f"diffusers does not know its layers ({next(iter(tensors))[:80]}, …) in {type(pipeline).__name__}; it looks"
            f" made for {made_for(tensors)}"
        ) from error
    return dict(converted[0] if isinstance(converted, tuple) else converted)


def _unet(pipeline: Any) -> bool:
    return getattr(pipeline, "unet", None) is not None


def _as_peft_names(name: str, part: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers of one part, under the names of its own modules."""
    layers = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not layers:
        return {}
    if not name.startswith("text_encoder"):
        return layers if "lora_A" in next(iter(layers)) else dict(convert_unet_state_dict_to_peft(layers))
    try:
        layers = convert_state_dict_to_peft(convert_state_dict_to_diffusers(layers))
    except ValueError:
        raise Unusable(f"its layers of {name} ({next(iter(layers))[:80]}, …) are no LoRA layers") from None
    if not hasattr(part, "text_model"):
        layers = {key.removeprefix("text_model."): value for key, value in layers.items()}
    return layers


def _problem(name: str, part: nn.Module, key: str, shape: tuple[int, ...]) -> str:
    """Why one of a LoRA's tensors has no place in the part; empty if it has. Raises Unusable if it is of no LoRA."""
    match = _LORA_WEIGHT.fullmatch(key)
    if match is None:
        raise Unusable(f"it holds {name}.{key}, which diffusers does not take for a weight of a LoRA layer")
    try:
        module = part.get_submodule(match["module"])
    except AttributeError:
        return f"it changes {name}.{match['module']}, which this model does not have"
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Conv2d) or weight is None:
        return f"it changes {name}.{match['module']}, which is a {type(module).__name__} in this model"
    # A: rank, inputs and kernel. B: outputs, rank and a kernel of one.
    theirs, ours = (
        (shape[1:], tuple(weight.shape[1:])) if match["side"] == "A" else (shape[:1], tuple(weight.shape[:1]))
    )
    if theirs != ours or len(shape) != weight.ndim:
        what = "takes in" if match["side"] == "A" else "gives out"
        return f"{name}.{match['module']} {what} {_by(theirs)} numbers there and {_by(ours)} in this model"
    return ""


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "no"
