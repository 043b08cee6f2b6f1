"""What calls of several kinds answer with."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from inkwell.files import Source, write_atomically

ImageSource: TypeAlias = Source
"""An encoded picture: its bytes, or the path of its file."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a call went, as the service saw it."""

    queue_ms: float
    engine_ms: float


@dataclass(frozen=True, slots=True)
class ServedBy:
    """Who did the work; what nobody told is empty. Only a gateway names pools."""

    hardware: str = ""
    runtime: str = ""
    pool: str = ""
    endpoint: str = ""
    model: str = ""
    model_version: str = ""
    """Changes when the model's weights do."""


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture and its IANA media type, such as "image/jpeg"."""

    content: bytes
    media_type: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the encoded bytes to `path`, whole or not at all; raises OSError."""
        return write_atomically(path, self.content)


@dataclass(frozen=True, slots=True)
class Queued:
    """The call waits; `position` admitted calls stand before it."""

    sequence: int
    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """An engine took the call; these ran it."""

    sequence: int
    hardware: str
    runtime: str
    model: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` (1 to `step_count`) is done; the result is estimated to come in `eta_ms`."""

    sequence: int
    step: int
    step_count: int
    eta_ms: int
