"""Artifacts of a benchmark's model, made by the compiler as it makes them for everybody.

Only the budget is another: a model with random weights reads no text and paints no picture that quantizing could
spoil, and what is measured here is speed.
"""

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._trocr_base import Line
from services.compiler.domain import Budget, CompileJob, CompileProgress, CompileRequest
from services.runtimes.artifacts.manifest import ArtifactPrecision, Target
from services.runtimes.artifacts.store import open_store
from services.runtimes.hardware import detect

_ANYTHING = Budget(character_error_rate=1.0, psnr_db=0.0)


def best_precisions() -> tuple[ArtifactPrecision, ...]:
    """What this processor may be fastest at in OpenVINO: 16 bits where it has instructions for them, and 8."""
    from services.runtimes.artifacts.built_on import machine

    has_bfloat16 = any("bf16" in feature for feature in machine(detect()).features)
    return ("bfloat16" if has_bfloat16 else "float32", "int8_static")


def compile_model(
    folder: str, target: Target, precision: ArtifactPrecision, store: str, lines: Sequence[Line] = (), **options: Any
) -> None:
    """Compile the checkpoint in `folder` into the store, in a process of its own. Raises Fault when it cannot be.

    lines: to calibrate and judge on instead of those that come with the compiler. options: more of a CompileRequest.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(_compile, folder, target, precision, store, list(lines), options).result()


def _compile(
    folder: str,
    target: Target,
    precision: ArtifactPrecision,
    location: str,
    lines: Sequence[Line],
    options: dict[str, Any],
) -> None:
    # Late: it imports torch and the exporters, which is for this process alone.
    from services.compiler.work import compile_job

    store = open_store(location)
    with tempfile.TemporaryDirectory(prefix="compile-") as temporary:
        calibration = _calibration(Path(temporary) / "lines", lines) if lines else ""
        request = CompileRequest(
            Path(folder).name,
            folder,
            target,
            precision,
            budget=_ANYTHING,
            calibration_folder=calibration,
            **options,
        )
        job = CompileJob(request, location, str(store.staging()))
        try:
            compile_job(job, Path(temporary), _say)
        finally:
            store.discard(Path(job.staging))


def _calibration(folder: Path, lines: Sequence[Line]) -> str:
    """The lines as a calibration folder. What they say does not matter."""
    folder.mkdir()
    for number, line in enumerate(lines):
        (folder / f"{number}.png").write_bytes(line.png)
    rows = "".join(f"{number}.png\tscribble\n" for number in range(len(lines)))
    (folder / "labels.tsv").write_text(f"file\ttext\n{rows}")
    return str(folder)


def _say(told: Any) -> None:
    assert isinstance(told, CompileProgress)
    print(f"  compiling, {told.step}/{told.step_count} {told.stage}: {told.note}", flush=True)
