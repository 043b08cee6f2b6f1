"""What decides the outcome of a compile, as one digest: two compiles of the same recipe are one."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from services.compiler.domain import CompileRequest

# Raised whenever the compiler's own code begins to write other files from the same request.
REVISION = 2


def recipe_of(request: CompileRequest, source_digest: str, calibration_digest: str, versions: Mapping[str, str]) -> str:
    """sha-256 of everything that the artifact depends on, 64 hexadecimal digits.

    versions: of all packages that write it, and of the device where the artifact is bound to one. The source's place
    is left out: what lies there counts, as source_digest says.
    """
    decisive: dict[str, Any] = msgspec.to_builtins(request)
    decisive |= {
        "source": source_digest,
        "calibration_folder": calibration_digest,
        "versions": dict(versions),
        "revision": REVISION,
    }
    return hashlib.sha256(msgspec.json.encode(decisive, order="deterministic")).hexdigest()
