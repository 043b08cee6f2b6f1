"""Confidence that means something: the maps, their fit, the command that writes them, and what callers are told."""

import json
import random
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from services.ocr import calibrate, reliability
from services.ocr.engine import calibration
from services.ocr.engine.calibration import Calibration, CalibrationError, Error, Map
from services.ocr.engine.main import create_engine
from services.ocr.settings import Settings
from services.runtimes import checkpoints
from tests.support.reading import GREEDY, Reader, beams, scribble


def simulated(count: int, seed: int) -> tuple[list[float], list[float]]:
    """Lines of a model that is surer than it should be: told c, 20 characters are right with probability c squared."""
    source = random.Random(seed)
    told = [source.uniform(0.3, 1.0) for _ in range(count)]
    return told, [sum(source.random() < c * c for _ in range(20)) / 20 for c in told]


def test_a_fitted_map_tells_the_truth_of_other_lines() -> None:
    line = reliability.fit(*simulated(2000, 1))
    told, true = simulated(2000, 2)
    assert reliability.expected_calibration_error(told, true) > 0.15
    assert reliability.expected_calibration_error([line(c) for c in told], true) < 0.02
    for confidence in (0.4, 0.6, 0.8, 0.95):
        assert line(confidence) == pytest.approx(confidence**2, abs=0.05)


def test_held_out_groups_are_told_by_the_others() -> None:
    told, true = simulated(600, 3)
    # The last group's truth is nothing like the others': a map that had seen it would be nearer.
    groups = ["a"] * 200 + ["b"] * 200 + ["c"] * 200
    true[400:] = [0.0] * 200
    others = reliability.fit(told[:400], true[:400])
    assert reliability.held_out(told, true, groups)[400:] == [others(c) for c in told[400:]]


@given(
    lines=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=reliability.LINES_LEAST, max_size=400),
    asked=st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_every_map_rises_from_0_to_at_most_1(lines: list[tuple[float, float]], asked: list[float]) -> None:
    line = reliability.fit([told for told, _ in lines], [true for _, true in lines])
    answers = [line(confidence) for confidence in sorted(asked)]
    assert answers == sorted(answers)
    assert all(0 <= answer <= 1 for answer in answers)
    assert [line(point) for point, _ in line.points] == pytest.approx([share for _, share in line.points])


def test_too_few_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="119 lines are too few for a calibration; 120 are the least"):
        reliability.fit(*simulated(119, 1))


def test_the_calibration_error_is_the_mean_distance() -> None:
    assert reliability.expected_calibration_error([0.9] * 50 + [0.5] * 50, [0.7] * 50 + [0.5] * 50) == pytest.approx(
        0.1
    )
    assert reliability.expected_calibration_error([0.25, 0.75], [0.25, 0.75]) == 0.0
    assert reliability.expected_calibration_error([], []) == 0.0


@pytest.mark.parametrize(("edits", "share"), [(0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)])
def test_the_share_of_right_characters(edits: int, share: float) -> None:
    assert reliability.right_share(edits, "abcd") == share


# --- the file in a model folder ---

HALF = Map(((0.0, 0.0), (1.0, 0.5)))
TENTH = Map(((0.0, 0.0), (1.0, 0.1)))


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with a calibration that greedy search halves and beam search takes a tenth of."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    write(folder, checkpoints.weights_sha256(folder))
    return folder


def write(folder: Path, sha256: str) -> None:
    found = Calibration(
        1, calibrate.QUANTITY, sha256, "2026-01-01", ("x",), 200, HALF, Error(0.2, 0.1), TENTH, Error(0.2, 0.1), 4
    )
    (folder / calibration.FILE).write_bytes(msgspec.json.encode(found))


def reader_of(folder: Path) -> Reader:
    return Reader(create_engine(Settings(models={"tiny": str(folder)}, threads=1).model_dump_json()))


def test_callers_are_told_the_calibrated_confidence(model: Path) -> None:
    reader = reader_of(model)
    greedy, wide = reader.submit("greedy", scribble(1), GREEDY), reader.submit("wide", scribble(1), beams(3))
    reader.finish()
    for read, factor in ((greedy, 0.5), (wide, 0.1)):
        assert read.recognition is not None
        assert read.recognition.confidence_calibrated
        own = read.recognition.hypotheses[0].confidence
        assert read.recognition.confidence == pytest.approx(factor * own)
    assert reader.engine.info().models[0].confidence_calibrated


def test_without_a_calibration_the_models_own_is_told(tiny_folder: Path) -> None:
    reader = reader_of(tiny_folder)
    read = reader.submit("one", scribble(1), GREEDY)
    reader.finish()
    assert read.recognition is not None
    assert not read.recognition.confidence_calibrated
    assert read.recognition.confidence == read.recognition.hypotheses[0].confidence
    assert not reader.engine.info().models[0].confidence_calibrated


def test_a_calibration_of_other_weights_is_not_believed(model: Path) -> None:
    write(model, "0" * 64)
    assert calibration.read(model) is None
    assert not reader_of(model).engine.info().models[0].confidence_calibrated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2; this version reads format 1"),
        ({"greedy": {"points": []}}, "greedy: points must be pairs of numbers from 0 to 1, at least one"),
        ({"beams": {"points": [[0.0, 0.0], [0.5, 1.5]]}}, "beams: points must be pairs of numbers from 0 to 1"),
        ({"greedy": {"points": [[0.5, 0.5], [0.4, 0.6]]}}, "greedy: the points must rise"),
        ({"greedy": {"points": [[0.4, 0.6], [0.5, 0.5]]}}, "greedy: the points must rise"),
        ({"greedy": None}, "Expected `object`, got `null`"),
    ],
)
def test_a_broken_file_is_refused(model: Path, change: dict[str, object], message: str) -> None:
    path = model / calibration.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CalibrationError, match=message):
        calibration.read(model)


# --- the command ---


def run(*arguments: object) -> Result:
    import typer

    app = typer.Typer()
    app.command()(calibrate.command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(folder: Path, count: int) -> Path:
    """Lines of five writers, labelled with what the model reads for every second one."""
    folder.mkdir()
    rows = ["file\ttext\twriter"]
    for number in range(count):
        line = scribble(number)
        Image.frombytes("RGB", (line.width, line.height), line.pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png\tlabel {number}\t{number % 5}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_the_command_writes_what_the_service_then_tells(model: Path, tmp_path: Path) -> None:
    folder = lines(tmp_path / "lines", 130)
    (model / calibration.FILE).unlink()
    result = run(model, folder, "--beam-width", 2)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("greedy\t130 lines\tcalibration error 0.")
    assert second.startswith("beam 2\t130 lines\tcalibration error 0.")
    found = calibration.read(model)
    assert found is not None
    assert (found.line_count, found.data, found.beam_width) == (130, ("lines",), 2)
    # Nonsense is read: next to nothing is right, however sure the model is.
    assert found.greedy_error.before > 0.2
    assert found.greedy_error.after < 0.1
    reader = reader_of(model)
    read = reader.submit("one", scribble(1), GREEDY)
    reader.finish()
    assert read.recognition is not None
    assert read.recognition.confidence_calibrated
    assert read.recognition.confidence < 0.3


def test_the_command_lists_what_is_wrong_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = (model / calibration.FILE).read_bytes()
    few = lines(tmp_path / "few", 5)
    result = run(model, few)
    assert (result.exit_code, result.stderr) == (2, "5 lines are too few for a calibration; 120 are the least\n")
    (few / "labels.tsv").write_text("file\ttext\nnone.png\tx\n")
    result = run(model, few, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        f"{few / 'labels.tsv'}:2",
        str(tmp_path / "nowhere" / "labels.tsv"),
    ]
    assert (model / calibration.FILE).read_bytes() == before
