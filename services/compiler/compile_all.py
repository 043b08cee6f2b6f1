"""`python -m services.compiler.compile_all`: every artifact of the embedded models, and one table of what came of it.

Behind `make compile-all`. Each compile is a process of its own, as in the service; one that is stored already is not
made again. Ends with 1 if one of them failed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.compiler.settings import Settings
from services.runtimes.artifacts.manifest import (
    BYTES_RATIO,
    SPEED_RATIO,
    ArtifactPrecision,
    Check,
    Manifest,
    Target,
)
from services.runtimes.artifacts.store import Stored, open_store

MODELS = ("handwriting-tiny", "emoji-tiny")
# ONNX Runtime has no bfloat16 on processors, and OpenVINO takes either: bfloat16 where there are instructions for it.
_HALF: Mapping[Target, Mapping[bool, ArtifactPrecision]] = {
    "onnx": {True: "float16", False: "float16"},
    "openvino": {True: "bfloat16", False: "float16"},
}
_INT8: Mapping[Target, ArtifactPrecision] = {"onnx": "int8_dynamic", "openvino": "int8_weight_only"}
# As services.compiler.work writes its progress; libraries write to the same place.
_PROGRESS = re.compile(r"\d+/\d+ [a-z]+: ")
# The checks that judge the model as a whole.
_QUALITY = ("texts that differ", "rise of the character error rate", "PSNR of pictures")


@dataclass(frozen=True)
class Row:
    """One compile: what came of it, or why nothing did."""

    model: str
    target: Target
    precision: ArtifactPrecision
    stored: Stored | None
    error: str
    seconds: float


def wanted(bfloat16: bool) -> list[tuple[Target, ArtifactPrecision]]:
    """Targets and precisions. bfloat16: whether the processor computes in it."""
    return [
        (target, precision) for target in _HALF for precision in ("float32", _HALF[target][bfloat16], _INT8[target])
    ]


def quality(manifest: Manifest) -> str:
    """The check that judged the model as a whole, in a few words; "" where there was none."""
    found: Check | None = next((check for check in manifest.checks if check.name.startswith(_QUALITY)), None)
    if found is None:
        return ""
    unit = found.unit or ""
    return f"{found.name} {found.value:.4g} {unit}".rstrip()


def table(rows: Sequence[Row]) -> str:
    """All of it, a line an artifact."""
    cells = [("MODEL", "TARGET", "PRECISION", "SIZE", "BYTES", "SPEED", "TOOK", "QUALITY")]
    for row in rows:
        if row.stored is None:
            cells.append((row.model, row.target, row.precision, "-", "-", "-", f"{row.seconds:.0f} s", row.error))
            continue
        manifest = row.stored.manifest
        size, speed = manifest.figure(BYTES_RATIO), manifest.figure(SPEED_RATIO)
        cells.append(
            (
                row.model,
                row.target,
                row.precision,
                f"{row.stored.size_bytes / 1e6:.1f} MB",
                "-" if size is None else f"{size:.2f}",
                "-" if speed is None else f"{speed:.2f} x",
                f"{row.seconds:.0f} s",
                quality(manifest),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def compile_one(
    model: str, source: str, target: Target, precision: ArtifactPrecision, location: str, show: Callable[[str], None]
) -> Row:
    """In a process of its own. show: called with each line of its progress as it comes, such as "2/8 exporting: …"."""
    began = time.monotonic()
    command = [sys.executable, "-m", "services.compiler.work", model, source, "--to", target]
    command += ["--precision", precision, "--store", location]
    last = ""
    with (
        tempfile.TemporaryFile("w+") as answer,
        subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=answer, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        assert process.stderr is not None
        for line in map(str.strip, process.stderr):
            if _PROGRESS.match(line):
                show(line)
            last = line or last
        code = process.wait()
        seconds = time.monotonic() - began
        if code:
            return Row(model, target, precision, None, last or f"it ended with exit code {code}", seconds)
        answer.seek(0)
        artifact_id = answer.read().split()[-1]
    return Row(model, target, precision, open_store(location).get(artifact_id), "", seconds)


def _show(line: str) -> None:
    print(f"  {line}", flush=True)


def main() -> None:
    """See the module's description."""
    # Late: torch tells what the processor can.
    from services.runtimes.artifacts.built_on import machine
    from services.runtimes.hardware import detect

    parser = argparse.ArgumentParser(prog="python -m services.compiler.compile_all", description=main.__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help="names of models; default: the embedded ones")
    parser.add_argument("--store", default="", help="a folder or s3://bucket/prefix; default: as the services")
    options = parser.parse_args()
    sources = Settings().models
    if unknown := sorted(set(options.models) - set(sources)):
        parser.error(f"there is no model {unknown[0]!r}; known: {', '.join(sorted(sources))}")
    location = open_store(options.store).location
    began = time.monotonic()
    rows = []
    for model in options.models:
        for target, precision in wanted(any("bf16" in feature for feature in machine(detect()).features)):
            print(f"· {model} to {target}, {precision}", flush=True)
            row = compile_one(model, sources[model], target, precision, location, _show)
            rows.append(row)
            print(f"  {quality(row.stored.manifest) if row.stored else row.error}", flush=True)
    failed = sum(row.stored is None for row in rows)
    print(
        f"\n{table(rows)}\n\n{len(rows) - failed} of {len(rows)} stored in {location}, {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
