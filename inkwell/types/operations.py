"""Work that goes on without its caller."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from inkwell.errors import InkwellError
from inkwell.types.common import Queued, Started


@dataclass(frozen=True, slots=True)
class OperationProgress:
    """`step` (1 to `step_count`) is done; the end is estimated to come in `eta_ms`, 0 where nobody knows."""

    sequence: int
    step: int
    step_count: int
    eta_ms: int
    stage: str
    """In one word, such as "verifying"."""
    note: str
    """What goes on, for people."""


@dataclass(frozen=True, slots=True)
class OperationDone:
    """It ended: with `result`, or with the `error` that `Operation.result` raises. Always the last event."""

    sequence: int
    result: Any
    error: InkwellError | None


OperationEvent: TypeAlias = Queued | Started | OperationProgress | OperationDone
