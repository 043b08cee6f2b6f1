"""What every runtime's session offers: named tensors in, named tensors out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.hardware import Hardware


class SessionError(Exception):
    """A graph that cannot be opened or run; the message says which file, why, and what would help."""


class HardwareMissingError(SessionError):
    """The machine lacks a device, a driver or a library that the runtime needs; the message names it."""


@dataclass(frozen=True)
class SessionOptions:
    """How graphs are opened. threads: 0 for what the runtime measures best on this machine."""

    hardware: Hardware
    threads: int = 0
    # Let the runtime compute in 16 bits where the hardware does so at speed; the artifact's precision decides.
    allow_16_bit: bool = False
    # Where a runtime may keep what it compiled for this very machine; None for nowhere.
    cache_folder: Path | None = None
    # "host:port" of a Triton server's gRPC, "grpcs://host:port" with TLS; for the triton runtime.
    triton_address: str = ""
    triton_timeout_s: float = 60.0  # for one call of a graph, asking again included
    triton_shared_memory: bool = False  # only with a server on this host that runs as the same user
    providers: Sequence[str] = field(default_factory=tuple)  # onnxruntime: these and no others, best first


class Session(Protocol):
    """An opened graph. Calls come from one thread at a time."""

    runtime: RuntimeName
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Compute the wanted outputs (None for all) of contiguous tensors of the inputs' dtypes.

        The result's tensors are the caller's own. Raises SessionError.
        """

    def close(self) -> None:
        """Free the graph's memory; `run` may not be called after it."""
