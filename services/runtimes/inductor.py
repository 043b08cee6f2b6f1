"""torch.compile as all hardware uses it."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

# Shapes of one model (sizes of pictures, rows of a batch) that keep a compiled graph each; torch's own limit is 8, and
# what goes beyond runs eagerly, with other last bits.
_SHAPES_MOST = 64


def compiled(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile with a graph for every shape.

    A graph that takes many shapes is made when a second one comes, so that results would depend on what was asked for
    before.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES_MOST)
    return torch.compile(forward, dynamic=False, **options)


def cpp_missing() -> str:
    """Empty if there is a C++ compiler that torch.compile finds."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler; install g++ (apt-get install g++), or name one in the variable CXX"
    return ""


def triton_missing(package: str) -> str:
    """Empty if the compiler of GPU kernels that torch.compile uses is there. package: that brings it."""
    if importlib.util.find_spec("triton") is None:
        return f"the package {package} is missing; pip install {package}, in the version that torch names"
    # Triton builds a small launcher for each kernel.
    return cpp_missing()
