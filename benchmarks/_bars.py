"""How a figure is held against its bar."""

from typing import TypedDict


class Bar(TypedDict):
    """One figure, the bar it is held against, and whether it clears it."""

    value: float
    bar: float
    ok: bool


def at_most(value: float, bar: float) -> Bar:
    """Smaller is better."""
    return Bar(value=round(value, 3), bar=bar, ok=value <= bar)


def at_least(value: float, bar: float) -> Bar:
    """Larger is better."""
    return Bar(value=round(value, 3), bar=bar, ok=value >= bar)
