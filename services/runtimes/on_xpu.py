"""torch on Intel's GPUs."""

from collections.abc import Callable
from typing import Any

import torch

from services.runtimes import inductor
from services.runtimes.hardware import Hardware


def prepare(hardware: Hardware, *, exact: bool) -> None:
    """See tuning.Device: oneDNN computes float32 exactly unless it is allowed TF32."""
    torch.set_float32_matmul_precision("highest" if exact else "high")


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """See tuning.Device: Intel advises channels last for convolutions of every type."""
    return torch.channels_last


def compile_missing() -> str:
    """See tuning.Device."""
    return inductor.triton_missing("pytorch-triton-xpu")


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """See tuning.Device."""
    return inductor.compiled(forward)
