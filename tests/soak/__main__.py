"""`python -m tests.soak [NAME ...] [--minutes M]`: each run ends with one line of JSON that holds its bars."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks._bars import Bar, print_report
from tests.soak import kills, mixed, overload

RUNS: dict[str, Callable[[float], Coroutine[Any, Any, dict[str, Bar]]]] = {
    "kills": kills.run,
    "kills-ocr": kills.run_ocr,
    "overload": overload.run,
    "mixed": mixed.run,
}
MINUTES = {"kills": 2.0, "kills-ocr": 4.0, "overload": 2.0, "mixed": 30.0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--minutes", type=float, help="how long each runs, instead of " + str(MINUTES))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RUNS]
    if unknown:
        parser.error(f"there is no run {unknown[0]!r}; here are: {', '.join(RUNS)}")
    missed = 0
    for name in arguments.names or RUNS:
        minutes = arguments.minutes or MINUTES[name]
        print(f"· {name}: {minutes:g} min", flush=True)
        bars = asyncio.run(RUNS[name](minutes))
        missed += sum(not bar["ok"] for bar in bars.values())
        print_report(f"soak {name}", bars)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
