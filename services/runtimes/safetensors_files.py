"""What a safetensors file holds, by its header alone: no weight is read."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER_BYTES_MOST = 100 * 1000 * 1000  # as the format bounds it


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header describes it."""

    dtype: str  # the format's own name, such as "F32"
    shape: tuple[int, ...]

    @property
    def number_count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def tensors_in(file: Path) -> dict[str, Tensor]:
    """Every tensor by name. Raises ValueError with the file's name unless the file is whole."""
    # The format: 8 bytes little-endian header length, then the header as JSON, tensor name to dtype, shape and place.
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _HEADER_BYTES_MOST:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        if end != (size := file.stat().st_size):
            raise ValueError(f"it has {size} bytes and its header says {end}")
        return {name: Tensor(str(tensor["dtype"]), tuple(map(int, tensor["shape"]))) for name, tensor in header.items()}
    except (OSError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is not a whole safetensors file: {error}") from None


def number_count(file: Path) -> int:
    """Numbers in the file, all tensors together. Raises ValueError as `tensors_in` does."""
    return sum(tensor.number_count for tensor in tensors_in(file).values())


def number_count_in(folder: Path) -> int | None:
    """Numbers in the safetensors files of a folder, None without such a file. Raises ValueError as `tensors_in`."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(number_count, files)) if files else None
