"""torch on AMD's GPUs. ROCm's builds of torch answer through the cuda namespace.

Variables of the environment that only the operator can set, before the service starts:
- HSA_OVERRIDE_GFX_VERSION=10.3.0 (RDNA 2) or 11.0.0 (RDNA 3) lets a GPU that torch has no kernels for run those of its
  family: `unsupported` says when. The driver reads it when it is loaded.
- HIP_VISIBLE_DEVICES hides an integrated GPU that would be taken for the first one.
- TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 allows flash attention on GPUs where AMD calls it experimental.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from services.runtimes import inductor
from services.runtimes.hardware import Hardware

log = logging.getLogger(__name__)

# The nearest GPU that torch has kernels for, by family.
_OVERRIDES = {"gfx103": "10.3.0", "gfx110": "11.0.0"}
# CDNA: hipBLASLt has tuned matrix products for these.
_HIPBLASLT = ("gfx90a", "gfx94", "gfx95")


def unsupported(architecture: str, built_for: Sequence[str]) -> str:
    """Why torch's kernels do not fit the GPU and what to do; empty if they do.

    architecture: such as "gfx1031" or "gfx90a:sramecc+:xnack-"; built_for: what torch.cuda.get_arch_list() answers.
    """
    name = architecture.partition(":")[0]
    if not built_for or name in {one.partition(":")[0] for one in built_for}:
        return ""
    override = next((version for family, version in _OVERRIDES.items() if name.startswith(family)), "")
    advice = f"set HSA_OVERRIDE_GFX_VERSION={override}" if override else "use another GPU or another build of torch"
    return f"torch has no kernels for {name}, only for {', '.join(built_for)}; {advice}"


def prepare(hardware: Hardware, *, exact: bool) -> None:
    """See tuning.Device."""
    # MIOpen tries out every kernel at the first convolution of a shape, for minutes; FAST takes its database's word.
    # It reads the variable when the first convolution runs.
    os.environ.setdefault("MIOPEN_FIND_MODE", "FAST" if exact else "HYBRID")
    torch.backends.cudnn.benchmark = not exact
    # CDNA 3 has the like of TF32.
    torch.set_float32_matmul_precision("highest" if exact else "high")
    architecture = torch.cuda.get_device_properties(hardware.device).gcnArchName
    if architecture.startswith(_HIPBLASLT):
        torch.backends.cuda.preferred_blas_library("cublaslt")  # what torch calls hipBLASLt too
    if why := unsupported(architecture, torch.cuda.get_arch_list()):
        log.warning("%s", why)


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """See tuning.Device: MIOpen takes channels-last convolutions only where PYTORCH_MIOPEN_SUGGEST_NHWC=1 says so."""
    suggested = os.environ.get("PYTORCH_MIOPEN_SUGGEST_NHWC", "0") == "1"
    return torch.channels_last if suggested and dtype is not torch.float32 else torch.contiguous_format


def compile_missing() -> str:
    """See tuning.Device. ROCm's builds of torch bring the compiler under the name of pytorch-triton-rocm or triton."""
    return inductor.triton_missing("pytorch-triton-rocm")


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """See tuning.Device. Without graphs of the whole step, which HIP replays correctly only on some GPUs."""
    return inductor.compiled(forward)
