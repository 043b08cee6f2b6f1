"""What the callers are told when the artifact store fails."""

from services.kit import faults
from services.kit.faults import Fault, FaultData
from services.runtimes.artifacts.errors import Reason, StoreError

_STORE_KINDS = {
    Reason.INVALID: faults.Kind.INVALID_ARGUMENT,
    Reason.NOT_FOUND: faults.Kind.NOT_FOUND,
    Reason.AMBIGUOUS: faults.Kind.INVALID_ARGUMENT,
    Reason.IN_USE: faults.Kind.FAILED_PRECONDITION,
    Reason.DAMAGED: faults.Kind.INTERNAL,
    Reason.FULL: faults.Kind.FAILED_PRECONDITION,
    Reason.DENIED: faults.Kind.FAILED_PRECONDITION,
    Reason.UNAVAILABLE: faults.Kind.UNAVAILABLE,
}
_STORE_RETRY_MS = 5000


def store_fault(error: StoreError) -> Fault:
    """What the callers are told of a store's failure."""
    retry = _STORE_RETRY_MS if error.reason is Reason.UNAVAILABLE else None
    return Fault(FaultData(_STORE_KINDS[error.reason], f"STORE_{error.reason.name}", str(error), retry_after_ms=retry))
