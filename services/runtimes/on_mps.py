"""torch on Apple's GPUs, which share the machine's memory."""

import os
from collections.abc import Callable
from typing import Any

import torch

from services.runtimes import inductor
from services.runtimes.hardware import Hardware

# torch would take 1.7 times what Metal recommends, and the machine swaps; at 1.0 a model that is too large is an error
# that the service answers for, with the rest of the machine alive.
_MEMORY_FRACTION = 1.0


def prepare(hardware: Hardware, *, exact: bool) -> None:
    """See tuning.Device. PYTORCH_MPS_HIGH_WATERMARK_RATIO, if the operator has set it, stands."""
    if "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
        torch.mps.set_per_process_memory_fraction(_MEMORY_FRACTION)


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """See tuning.Device: Metal's convolutions take either and copy neither."""
    return torch.contiguous_format


def compile_missing() -> str:
    """See tuning.Device: Metal itself compiles the kernels; what calls them is C++."""
    return inductor.cpp_missing()


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """See tuning.Device."""
    return inductor.compiled(forward)
