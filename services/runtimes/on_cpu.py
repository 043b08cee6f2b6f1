"""torch on a processor. What packs linear layers for oneDNN is torch_speed.py."""

from collections.abc import Callable
from typing import Any

import torch

from services.runtimes import inductor
from services.runtimes.hardware import Hardware


def prepare(hardware: Hardware, *, exact: bool) -> None:
    """See tuning.Device: float32 is exact on processors unless someone says otherwise, and kernels are fixed."""


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """See tuning.Device.

    oneDNN's 16-bit convolutions want channels last; a step of Stable Diffusion's U-Net in bfloat16 was measured with
    them at 2.3 times float32's speed. float32 keeps the bits that diffusers itself gives.
    """
    return torch.contiguous_format if dtype is torch.float32 else torch.channels_last


def compile_missing() -> str:
    """See tuning.Device."""
    return inductor.cpp_missing()


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """See tuning.Device."""
    return inductor.compiled(forward)
