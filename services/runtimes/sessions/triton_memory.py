"""Memory that a Triton server on this host maps too, so that tensors need not go through gRPC."""

import ast
import contextlib
import mmap
import operator
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from services.runtimes.artifacts.manifest import Port
from services.runtimes.sessions.checked import torch_dtype
from services.runtimes.sessions.interface import SessionError

# Where Linux keeps what shm_open names, which is how Triton opens it.
_FOLDER = Path("/dev/shm")  # noqa: S108 - not a temporary file
_ALIGNMENT = 64  # of tensors within a region: a cache line
# What the exporter writes sizes of outputs with.
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class Region:
    """One region that grows as it is asked to. Nobody but the two processes can see it once it is registered."""

    def __init__(self, client: InferenceServerClient, timeout_s: float) -> None:
        self._client = client
        self._timeout = timeout_s
        self._size = 0
        self._map: mmap.mmap | None = None
        self._descriptor = -1
        self.name = ""

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Make room for tensors of these sizes in bytes, and answer where each begins. Raises SessionError."""
        offsets = []
        end = 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        if end > self._size:
            self.close()
            # A quarter more, so that caches that grow by a token a step do not ask for a new region each time.
            self._size = -(-end * 5 // 4 // mmap.PAGESIZE) * mmap.PAGESIZE
            self.register()
        return offsets

    def write(self, tensors: Sequence[Tensor]) -> list[int]:
        """Copy CPU tensors into the region, and answer where each begins. Raises SessionError."""
        offsets = self.reserve([tensor.nbytes for tensor in tensors])
        for tensor, offset in zip(tensors, offsets, strict=True):
            if tensor.nbytes:
                self._view(offset, tensor.nbytes).copy_(tensor.view(-1).view(torch.uint8))
        return offsets

    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of the tensor at an offset."""
        byte_count = torch.Size(shape).numel() * dtype.itemsize
        return self._view(offset, byte_count).clone().view(dtype).view(shape)

    def register(self) -> None:
        """Have the server map the region; again after the server was started anew."""
        if not self._size:
            return
        name = f"inkwell-{uuid.uuid4().hex}"
        path = _FOLDER / name
        content = b""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                # Without it a full /dev/shm would end this process by a signal at the first write.
                os.posix_fallocate(descriptor, 0, self._size)
                if self._map is not None:
                    content = self._map[:]
                    self._map.close()
                self._map = mmap.mmap(descriptor, self._size)
                self._map[: len(content)] = content
            finally:
                os.close(descriptor)
            self._client.register_system_shared_memory(name, f"/{name}", self._size, client_timeout=self._timeout)
        except OSError as error:
            raise SessionError(
                f"{_FOLDER}: no room for {self._size} bytes of shared memory: {error}; make it larger (docker run"
                " --shm-size) or turn triton_shared_memory off"
            ) from error
        except InferenceServerException as error:
            raise SessionError(
                f"the Triton server cannot map shared memory of this host: {error.message()}; it has to run here, as"
                " the same user; or turn triton_shared_memory off"
            ) from error
        finally:
            # Both have it mapped: with no name left, a process that is killed leaves nothing behind.
            path.unlink(missing_ok=True)
        self.name = name

    def close(self) -> None:
        """Give the memory back, here and on the server."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.name:
            with contextlib.suppress(InferenceServerException):  # a server that is gone holds nothing
                self._client.unregister_system_shared_memory(self.name, client_timeout=self._timeout)
            self.name = ""

    def _view(self, offset: int, byte_count: int) -> Tensor:
        assert self._map is not None
        return torch.from_numpy(np.frombuffer(self._map, np.uint8, byte_count, offset))


def byte_size(port: Port, axes: Mapping[str, int]) -> int | None:
    """Bytes of a tensor whose dimensions are numbers, axes, or sums of them ("8*height"); None if one is not known."""
    count = torch_dtype(port.dtype).itemsize
    for size in port.shape:
        try:
            count *= size if isinstance(size, int) else _value(ast.parse(size, mode="eval").body, axes)
        except (KeyError, SyntaxError):
            return None
    return count


def _value(node: ast.expr, axes: Mapping[str, int]) -> int:
    """What a dimension comes to; raises KeyError for what cannot be known from the axes."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return axes[name]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left, axes), _value(right, axes))
    raise KeyError(ast.dump(node))
