"""What a model's weights are computed with, and what of it a machine can do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from services.runtimes import int8
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware
from services.runtimes.int8 import InputRange, Int8Layer, Int8Weight

if TYPE_CHECKING:
    # It takes seconds to import, and who opens graphs asks for `of_cpu` alone.
    from transformers import VisionEncoderDecoderModel

# services.ocr.domain names the same ones: a front process knows them without importing torch.
Precision = Literal["float32", "bfloat16", "float16", "int8_dynamic", "int8_weight_only", "int8_static"]

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ACTIVATIONS: dict[str, int8.Activations] = {
    "int8_dynamic": "dynamic",
    "int8_weight_only": "float",
    "int8_static": "static",
}
# Where an int8 folder's content waits on a loaded model for apply_precision.
_STORED = "inkwell_int8"


@dataclass(frozen=True)
class StoredInt8:
    """What an int8 folder brings besides the model: its rounded weights and, for "int8_static", input ranges."""

    weights: Mapping[str, Int8Weight] = field(default_factory=dict)
    ranges: Mapping[str, InputRange] = field(default_factory=dict)


@dataclass(frozen=True)
class Abilities:
    """What a machine computes at speed; each is empty when it does, else says why not."""

    bfloat16: str = ""
    float16: str = ""
    int8: str = ""  # products of integers


def of_cpu(capabilities: Mapping[str, Any]) -> Abilities:
    """What a processor can do, by what torch.cpu.get_capabilities() says of it."""

    def has(*names: str) -> bool:
        return any(capabilities.get(name) for name in names)

    x86 = capabilities.get("architecture") in ("x86_64", "AMD64")
    if x86:
        return Abilities(
            bfloat16="" if has("avx512_bf16", "amx_bf16") else "this processor has neither AVX512_BF16 nor AMX",
            float16="" if has("avx512_fp16", "amx_fp16") else "this processor has neither AVX512_FP16 nor AMX_FP16",
            # Without them 8-bit products overflow 16 bits and saturate.
            int8="" if has("avx512_vnni", "avx_vnni", "amx_int8") else "this processor has neither VNNI nor AMX",
        )
    return Abilities(
        bfloat16="" if has("bf16") else "this processor has no bfloat16 instructions",
        float16="" if has("fp16_arith") else "this processor has no float16 arithmetic",
        int8="integer products are done on x86 processors and GPUs only",
    )


def of_cuda(capability: tuple[int, int]) -> Abilities:
    """What an NVIDIA GPU can do, by its compute capability: types from CUDA's programming guide."""
    what = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    return Abilities(
        bfloat16="" if capability >= (8, 0) else f"{what}, bfloat16 needs 8.0 (Ampere)",
        float16="" if capability >= (5, 3) else f"{what}, float16 needs 5.3",
        int8="" if capability >= (7, 5) else f"{what}, integer matrix products need 7.5 (Turing)",
    )


def of_rocm(architecture: str) -> Abilities:
    """What an AMD GPU can do, by the name of its architecture, such as "gfx90a:sramecc+:xnack-"."""
    name = architecture.partition(":")[0]
    # Matrix instructions for both types: CDNA 1 to 4, RDNA 3 and 4.
    if name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
        return Abilities()
    return Abilities(
        bfloat16=f"{name} computes bfloat16 by emulation; it takes CDNA or RDNA 3",
        int8=f"{name} has no integer matrix instructions; it takes CDNA or RDNA 3",
    )


def abilities(hardware: Hardware) -> Abilities:
    """What this machine can do."""
    if hardware.label == "cpu":
        return of_cpu(torch.cpu.get_capabilities())
    if hardware.label == "cuda":
        return of_cuda(torch.cuda.get_device_capability(hardware.device))
    if hardware.label == "rocm":
        return of_rocm(torch.cuda.get_device_properties(hardware.device).gcnArchName)
    return Abilities(int8=f"integer products are not done on {hardware.label}")


def refusal(precision: Precision, hardware: Hardware) -> str:
    """Why the machine cannot compute so, with what it can do instead; empty if it can."""
    can = abilities(hardware)
    if precision in ("float32", "int8_weight_only"):
        return ""
    if precision in _FLOATS:
        other = "float16" if precision == "bfloat16" else "bfloat16"
        instead = "float32" if getattr(can, other) else f"float32 or {other}"
        why = can.bfloat16 if precision == "bfloat16" else can.float16
    else:
        instead, why = "int8_weight_only", can.int8
    return f"{why}; use {instead}" if why else ""


def attach(model: "VisionEncoderDecoderModel", stored: StoredInt8) -> None:
    """Give a model loaded from an int8 folder what apply_precision needs; its own weights are the rounded ones."""
    setattr(model, _STORED, stored)


def apply_precision(
    model: "VisionEncoderDecoderModel", precision: Precision, hardware: Hardware
) -> "VisionEncoderDecoderModel":
    """The float32 model, on the CPU, with its weights in that precision; the model given is changed.

    Raises CheckpointError when the hardware cannot compute so, or for "int8_static" when the model comes from a folder
    without input ranges.
    """
    why = refusal(precision, hardware)
    if why:
        raise CheckpointError(f"precision {precision}: {why}")
    stored: StoredInt8 = getattr(model, _STORED, StoredInt8())
    if hasattr(model, _STORED):
        delattr(model, _STORED)
    if precision in _FLOATS:
        return model.to(_FLOATS[precision])
    if precision == "int8_static" and not stored.ranges:
        raise CheckpointError(
            "precision int8_static: the folder holds no input ranges; make one that does with `python -m"
            " services.ocr.quantize MODEL --precision int8_static --data DIR --output DIR`, or use int8_dynamic"
        )
    on_cpu = hardware.label == "cpu"
    dtype = torch.float32 if on_cpu else torch.float16 if abilities(hardware).bfloat16 else torch.bfloat16
    weights = int8.round_weights(model, stored.weights)
    model = model.to(dtype)
    int8.replace_layers(model, weights, _ACTIVATIONS[precision], dtype=dtype, ranges=stored.ranges, onednn=on_cpu)
    return model


def parameter_count(model: nn.Module) -> int:
    """Weights of a model, 8-bit ones included; what is shared is counted once as long as it is floating point."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return count + sum(layer.weight_count for layer in model.modules() if isinstance(layer, Int8Layer))


def weight_bytes(model: nn.Module) -> int:
    """Memory that a model's weights take, bytes; what is shared is counted once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values()) + sum(layer.packed_bytes for layer in model.modules() if isinstance(layer, Int8Layer))
