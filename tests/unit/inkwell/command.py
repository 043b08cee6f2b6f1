"""What tests of the `inkwell` command share."""

import json
from pathlib import Path
from typing import Any


def line_file(name: str, content: str) -> str:
    """Write a file for the fake server; answers its name."""
    Path(name).write_bytes(content.encode())
    return name


def json_lines(text: str) -> list[dict[str, Any]]:
    """The objects of a command's `--json`, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
