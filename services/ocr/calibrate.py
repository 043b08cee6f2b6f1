"""`python -m services.ocr.calibrate MODEL_FOLDER DIR …`: write the model's calibration.json from lines it never saw.

Each DIR is a folder of labelled lines as for `services.ocr.evaluate`. The error that is written beside the maps is
cross-validated: each writer (column `writer` of labels.tsv) is told confidences by maps fitted on all the others. Where
such maps are no better than what the model says by itself, that is kept.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from services.kit.engine_api import Engine
from services.kit.images import Limits
from services.ocr import reliability
from services.ocr.engine import calibration
from services.ocr.engine.calibration import Calibration, Error, Map
from services.ocr.evaluate import BadFolder, Label, read_labels, read_lines
from services.ocr.settings import Settings

_NAME = "model"
# Groups that lines are split into where no writers are named.
_FOLDS = 5
_AS_TOLD = Map(((0.0, 0.0), (1.0, 1.0)))
QUANTITY = "expected share of right characters (1 - character error rate) of the best hypothesis"


@dataclass(frozen=True)
class Fitted:
    """The map of one kind of search and what it is worth."""

    map: Map
    error: Error
    line_count: int


def fit(engine: Engine, labels: Sequence[Label], settings: Settings, *, beam_width: int) -> Fitted:
    """Read all lines and fit; raises ValueError when there are too few. `labels` name their writers, or nobody does."""
    _, lines, _ = read_lines(engine, labels, settings, model=_NAME, beam_width=beam_width)
    kept = [(label, line) for label, line in zip(labels, lines, strict=True) if not line.blank]
    told = [line.own_confidence for _, line in kept]
    true = [reliability.right_share(line.edits, line.text) for _, line in kept]
    groups = [label.writer for label, _ in kept]
    if len(set(groups)) < 2:
        groups = [str(number * _FOLDS // len(kept)) for number in range(len(kept))]
    fitted = reliability.fit(told, true)
    before = round(reliability.expected_calibration_error(told, true), 4)
    after = round(reliability.expected_calibration_error(reliability.held_out(told, true, groups), true), 4)
    if after >= before:
        # The model tells the share of right characters as it is; a map would only add the noise of its points.
        fitted, after = _AS_TOLD, before
    return Fitted(fitted, Error(before=before, after=after), len(kept))


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL_FOLDER", help="folder that the file is written to")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="folders of labelled lines that the model was not trained on")
    ],
    beam_width: Annotated[
        int, typer.Option(min=2, max=16, help="beams that the map for beam search is fitted with")
    ] = 4,
) -> None:
    """Fit the model's confidence to the share of right characters, and write calibration.json into its folder."""
    settings = Settings(models={_NAME: str(model)}, default_model=_NAME, read_documents=False, runtime="torch")
    limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
    labels: list[Label] = []
    problems: list[str] = []
    for folder in folders:
        try:
            labels += read_labels(folder, limits)
        except BadFolder as bad:
            problems += bad.problems
    if not problems and len(labels) < reliability.LINES_LEAST:
        problems = [f"{len(labels)} lines are too few for a calibration; {reliability.LINES_LEAST} are the least"]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise typer.Exit(2)

    # Late: the checks above answer at once, this takes seconds.
    from services.ocr.engine.main import create_engine
    from services.runtimes import checkpoints
    from services.runtimes.checkpoints import CheckpointError

    try:
        engine = create_engine(settings.model_dump_json())
        greedy = fit(engine, labels, settings, beam_width=1)
        beams = fit(engine, labels, settings, beam_width=beam_width)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    found = Calibration(
        format=calibration.FORMAT,
        quantity=QUANTITY,
        weights_sha256=checkpoints.weights_sha256(model),
        fitted_on=datetime.now(UTC).date().isoformat(),
        data=tuple(folder.resolve().name for folder in folders),
        line_count=greedy.line_count,
        greedy=greedy.map,
        greedy_error=greedy.error,
        beams=beams.map,
        beams_error=beams.error,
        beam_width=beam_width,
    )
    # One point a line at most, so that two versions can be compared.
    content = msgspec.json.format(msgspec.json.encode(found), indent=0)
    (model / calibration.FILE).write_bytes(content.replace(b"], [", b"],\n[").replace(b', "', b',\n"') + b"\n")
    for name, fitted in (("greedy", greedy), (f"beam {beam_width}", beams)):
        before, after = fitted.error.before, fitted.error.after
        print(f"{name}\t{fitted.line_count} lines\tcalibration error {before:.4f} before, {after:.4f} after")


def main() -> None:
    """Entry point."""
    typer.run(command)


if __name__ == "__main__":
    main()
