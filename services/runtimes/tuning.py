"""What makes torch fast on the hardware that `detect()` found. What is true of one kind stands in its own module."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import torch
from torch import nn

from services.runtimes import on_cpu, on_cuda, on_mps, on_rocm, on_xpu
from services.runtimes.hardware import Hardware

log = logging.getLogger(__name__)

Compile = Literal["off", "on"]


class CompileUnavailableError(Exception):
    """torch.compile cannot work on this machine; the message names what is missing."""


class Device(Protocol):
    """What a module on_*.py offers."""

    def prepare(self, hardware: Hardware, *, exact: bool) -> None:
        """Set what holds for the whole process, before the first model is loaded.

        exact: float32 stays float32, and kernels are not chosen by trial, so that the same seed gives the same bytes
        in every process.
        """

    def memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        """How the weights of convolutions of that type are best laid out."""

    def compile_missing(self) -> str:
        """What torch.compile lacks here, and how to get it; empty if nothing."""

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for each shape that it is called with."""


_BY_LABEL: dict[str, Device] = {"cpu": on_cpu, "cuda": on_cuda, "rocm": on_rocm, "xpu": on_xpu, "mps": on_mps}


def start(hardware: Hardware, compiles: Compile) -> None:
    """Set what holds for the whole process; to be called before the first model is loaded.

    Raises CompileUnavailableError where models are to be compiled and cannot be.
    """
    if compiles == "on":
        require_compiler(hardware)
    _BY_LABEL[hardware.label].prepare(hardware, exact=compiles == "off")


def lay_out(modules: Iterable[nn.Module], hardware: Hardware, dtype: torch.dtype) -> None:
    """Lay out the weights of convolutions as the hardware likes them, in place; float32 on a processor stays."""
    wanted = _BY_LABEL[hardware.label].memory_format(dtype)
    if wanted is torch.contiguous_format:
        return
    for module in modules:
        if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
            module.to(memory_format=wanted)  # type: ignore[call-overload]


def require_compiler(hardware: Hardware) -> None:
    """Raise CompileUnavailableError where torch.compile cannot work."""
    if missing := _BY_LABEL[hardware.label].compile_missing():
        raise CompileUnavailableError(f"torch_compile is on, and torch.compile cannot work here: {missing}")


def compile_forward(module: nn.Module, hardware: Hardware) -> None:
    """Have torch.compile make the module's forward pass faster, in place. The first call of a shape takes long.

    Results differ from the eager ones in the last bits. Not for decoders whose cache grows: each length would be
    compiled anew. Raises CompileUnavailableError.
    """
    require_compiler(hardware)
    forward = module.forward
    # functools: libraries ask a module's forward for its parameters' names.
    module.forward = functools.wraps(forward)(_BY_LABEL[hardware.label].compiled(forward))
    log.info("%s is compiled at its first call of each shape", type(module).__name__)
