"""Which models leave memory so that another fits: a pure rule on names, sizes and ages."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """A loaded model as the rule sees it."""

    name: str
    weight_bytes: int
    last_used: int  # larger is later
    is_idle: bool


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
