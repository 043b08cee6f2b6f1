"""The encoder's view of pictures, as numbers."""

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inkwell.files import write_atomically
from inkwell.types.common import ServedBy, Timing

# dtype → (struct's code, NumPy's description, bytes a number), all little-endian.
_DTYPES = {"float32": ("f", "<f4", 4), "float16": ("e", "<f2", 2)}


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One row a picture: numbers in row-major order, little-endian, as bytes that any array library can wrap."""

    content: bytes
    dtype: str
    """ "float32" or "float16"."""
    shape: tuple[int, ...]
    """(pictures, width), or (pictures, tokens, width) without pooling."""
    model: str
    timing: Timing
    served_by: ServedBy

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is none of {', '.join(_DTYPES)}")
        needed = math.prod(self.shape) * _DTYPES[self.dtype][2]
        if len(self.content) != needed:
            raise ValueError(f"{len(self.content)} bytes are no {self.dtype} tensor of shape {self.shape}")

    def tolist(self) -> list[Any]:
        """The numbers as nested lists of the shape."""
        code = _DTYPES[self.dtype][0]
        return _nested(struct.unpack(f"<{math.prod(self.shape)}{code}", self.content), self.shape)

    def numpy(self) -> Any:
        """A read-only `numpy.ndarray` over the same bytes; raises ImportError where NumPy is not installed."""
        import numpy  # noqa: ICN001 - only here: the SDK does not need it

        return numpy.frombuffer(self.content, dtype=_DTYPES[self.dtype][1]).reshape(self.shape)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a `.npy` file, which `numpy.load` reads, whole or not at all; raises OSError."""
        return write_atomically(path, self.npy())

    def npy(self) -> bytes:
        """The bytes of that file."""
        # Version 1.0 of the format: magic, version, length of the header, and the header, which is a Python literal
        # padded with spaces and a newline so that the numbers begin at a multiple of 64 bytes.
        described = _DTYPES[self.dtype][1]
        header = f"{{'descr': '{described}', 'fortran_order': False, 'shape': {self.shape!r}, }}"
        start = len(b"\x93NUMPY") + 4
        header += " " * (-(start + len(header) + 1) % 64) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("ascii") + self.content


def _nested(numbers: Sequence[float], shape: Sequence[int]) -> list[Any]:
    if len(shape) <= 1:
        return list(numbers)
    size = math.prod(shape[1:])
    return [_nested(numbers[row * size : (row + 1) * size], shape[1:]) for row in range(shape[0])]
