"""Which models leave so that another fits: pure rules on names, sizes and ages."""

from collections.abc import Sequence
from dataclasses import dataclass

# Bytes a number takes while a model is loaded: int8 weights are made out of float32 ones.
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Held:
    """A loaded model as the plan sees it."""

    name: str
    weight_bytes: int
    last_used: int  # larger is later
    is_idle: bool


def needed_bytes(number_count: int, precision: str) -> int:
    """Memory that loading a model of so many numbers takes."""
    return number_count * _NUMBER_BYTES.get(precision, 4)


def leaving(held: Sequence[Held], needed: int, limit: int) -> list[str] | None:
    """The models that have to leave before `needed` bytes fit within `limit`; None if they never do.

    Idle ones leave first, least recently used before others; then those in use, which have to finish first.
    """
    if needed > limit:
        return None
    free = limit - sum(model.weight_bytes for model in held)
    names = []
    for model in sorted(held, key=lambda model: (not model.is_idle, model.last_used)):
        if free >= needed:
            break
        names.append(model.name)
        free += model.weight_bytes
    return names if free >= needed else None
