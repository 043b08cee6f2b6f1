"""Writes the dashboards, and the rules of the objectives, which are too regular to write by hand.

python k8s/components/monitoring/build.py            writes dashboards/*.json and rules/slo.yaml
python k8s/components/monitoring/build.py check      says which of these are not what it would write, and ends with 1
python k8s/components/monitoring/build.py plain DIR  writes all rules to DIR, for a Prometheus without the operator
"""

import json
import sys
from pathlib import Path

import yaml
from dashboards import ALL
from objectives import objective_rules
from panels import dashboard_json

HERE = Path(__file__).resolve().parent


def files() -> dict[Path, str]:
    """What is written, by path."""
    rules = yaml.safe_dump(objective_rules(), sort_keys=False, width=1000)
    found = {HERE / "rules" / "slo.yaml": "# Written by build.py from objectives.py.\n" + rules}
    for dashboard in ALL:
        text = json.dumps(dashboard_json(dashboard), indent=1, ensure_ascii=False) + "\n"
        found[HERE / "dashboards" / f"{dashboard.name}.json"] = text
    return found


def plain_rules() -> dict[str, str]:
    """The rules by file name, without what wraps them for the operator."""
    return {
        path.name: yaml.safe_dump(yaml.safe_load(path.read_text("utf-8"))["spec"], sort_keys=False, width=1000)
        for path in sorted((HERE / "rules").glob("*.yaml"))
    }


def main(arguments: list[str]) -> int:
    """Answers the exit code; see the module."""
    if not arguments:
        for path, text in files().items():
            path.write_text(text, "utf-8")
    elif arguments == ["check"]:
        old = [path for path, text in files().items() if not path.exists() or path.read_text("utf-8") != text]
        for path in old:
            print(f"{path.relative_to(HERE)} is not what build.py writes; run it")
        return 1 if old else 0
    elif arguments[0] == "plain" and len(arguments) == 2:
        folder = Path(arguments[1])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in plain_rules().items():
            (folder / name).write_text(text, "utf-8")
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
