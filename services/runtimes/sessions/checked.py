"""What every session checks before it hands tensors to its library, whose own messages name no input."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.runtimes.artifacts.manifest import Port
from services.runtimes.sessions.interface import SessionError


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a port's dtype; raises KeyError for a type that torch does not have."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise KeyError(name)
    return dtype


def require_file(file: Path) -> None:
    """Raise SessionError unless the graph is there."""
    if not file.is_file():
        raise SessionError(f"{file}: there is no such file; fetch or compile the artifact again")


def require_fit(file: Path, ports: Sequence[Port], feeds: Mapping[str, Tensor]) -> None:
    """Raise SessionError unless every input is there, with its type and, as far as it is fixed, its shape.

    Sizes that share the name of an axis have to be the same.
    """
    missing = [port.name for port in ports if port.name not in feeds]
    unknown = sorted(feeds.keys() - {port.name for port in ports})
    if missing or unknown:
        what = f"input {missing[0]} is missing" if missing else f"there is no input {unknown[0]}"
        raise SessionError(f"{file.name}: {what}; its inputs are {', '.join(port.name for port in ports)}")
    sizes: dict[str, int] = {}
    for port in ports:
        tensor = feeds[port.name]
        if tensor.dtype != torch_dtype(port.dtype):
            found = str(tensor.dtype).removeprefix("torch.")
            raise SessionError(f"{file.name}: input {port.name} has dtype {found}, wanted is {port.dtype}")
        fits = len(tensor.shape) == len(port.shape) and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for size, axis in zip(tensor.shape, port.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else str(axis) for axis in port.shape)
            raise SessionError(f"{file.name}: input {port.name} has shape {list(tensor.shape)}, wanted is [{wanted}]")
