"""torch on NVIDIA's GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from services.runtimes import inductor
from services.runtimes.hardware import Hardware


def prepare(hardware: Hardware, *, exact: bool) -> None:
    """See tuning.Device.

    TF32 rounds float32 to 10 bits of mantissa, in convolutions even by torch's default. cuDNN's benchmark picks the
    kernel that was fastest in a trial, which may be another one in the next process.
    """
    # Not by the newer fp32_precision: torch raises where other code asks in the older way after that.
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = not exact
    # Attention's kernels, best first as torch orders them: flash, memory-efficient, then plain mathematics. cuDNN's own
    # plans are made anew for every shape, which costs more than it gains where shapes change from call to call.
    torch.backends.cuda.enable_cudnn_sdp(False)


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """See tuning.Device: tensor cores take 16-bit convolutions in channels-last layout, and cuDNN converts others."""
    return torch.contiguous_format if dtype is torch.float32 else torch.channels_last


def compile_missing() -> str:
    """See tuning.Device."""
    return inductor.triton_missing("triton")


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """See tuning.Device. Each shape becomes a CUDA graph: a step's hundreds of small kernels are started at once."""
    run = inductor.compiled(forward, mode="reduce-overhead")

    def replayed(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay writes to the same memory, and pictures that are painted in turns keep their results.
        return _pytree.tree_map_only(Tensor, Tensor.clone, run(*args, **kwargs))

    return replayed
