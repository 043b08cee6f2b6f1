"""The number format that training computes in."""

import torch

from services.ocr.finetune.options import Refused


def resolve(name: str) -> str:
    """ "fp32", "bf16" or "fp16"; "auto" takes bf16 where the hardware has it; raises Refused for what cannot be."""
    on_gpu = torch.cuda.is_available()
    if name == "auto":
        return "bf16" if _has_bfloat16(on_gpu) else "fp32"
    if name == "fp16" and not on_gpu:
        raise Refused("--precision fp16 needs a GPU; the CPU trains in bf16 or fp32")
    return name


def _has_bfloat16(on_gpu: bool) -> bool:
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported())
    # Elsewhere the CPU emulates it, more slowly than plain float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
