"""Run the benchmarks: `python -m benchmarks [NAME]`. Each ends with one line of JSON that holds its bars."""

import importlib
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def machine() -> str:
    """The processor and the number of cores that may be used."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    known = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    chosen = sys.argv[1:] or known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        print(f"there is no benchmark {unknown[0]!r}; here are: {', '.join(known)}", file=sys.stderr)
        return 2
    missed = 0
    for name in chosen:
        print(f"· {name}", flush=True)
        bars = importlib.import_module(f"benchmarks.{name}").run()
        missed += sum(not bar["ok"] for bar in bars.values())
        print(json.dumps({"benchmark": name, "bars": bars, "machine": machine()}), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
