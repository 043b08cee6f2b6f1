"""Run the benchmarks: `python -m benchmarks [NAME]`. Each ends with one line of JSON that holds its bars."""

import importlib
import sys
from pathlib import Path

from benchmarks._bars import print_report

HERE = Path(__file__).resolve().parent


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
        print_report(name, bars)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
