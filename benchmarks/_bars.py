"""How a figure is held against its bar, and how that is told."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
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


def print_report(name: str, bars: Mapping[str, Bar]) -> None:
    """The benchmark's last line: one JSON object."""
    print(json.dumps({"benchmark": name, "bars": bars, "machine": _machine()}), flush=True)


def _machine() -> str:
    """The processor and the number of cores that may be used."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
