"""The evaluate command, through its command line and the real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services.kit.images import Limits
from services.ocr import evaluate
from services.ocr.domain import Decoding
from services.ocr.engine.main import OcrEngine
from services.ocr.settings import Settings
from tests.support.reading import Reader, scribble


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKWELL_OCR_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images without labels."""
    from PIL import Image

    for number in range(4):
        line = scribble(number)
        Image.frombytes("RGB", (line.width, line.height), line.pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def run(*arguments: str) -> Result:
    import typer

    app = typer.Typer()
    app.command()(evaluate.command)
    return CliRunner().invoke(app, list(arguments))


def write_labels(folder: Path, *rows: str, header: str = "file\ttext\twriter") -> None:
    (folder / "labels.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def texts_read(engine: OcrEngine) -> list[str]:
    reader = Reader(engine)
    reads = [reader.submit(str(n), scribble(n), Decoding(1, 1, 1.0, 48)) for n in range(4)]
    reader.finish()
    return [read.text for read in reads]


def test_error_rates_are_edits_over_the_labels(folder: Path, engine: OcrEngine) -> None:
    first, second, third, fourth = texts_read(engine)
    # Right, one character too many, one missing, all wrong (8 of 8 characters, 1 of 1 word).
    labels = [first, second + "X", third[1:], "ÄÄÄÄÄÄÄÄ"]
    write_labels(folder, *(f"{n}.png\t{label}\tw" for n, label in enumerate(labels)))
    settings = Settings(max_jobs=2)
    checked = evaluate.read_labels(folder, Limits(10**7, 10**7, 4))
    report = evaluate.evaluate(engine, checked, settings, model="tiny")
    assert report.line_count == 4
    assert report.exact_rate == 0.25
    edits = 0 + 1 + 1 + max(8, len(fourth))
    assert report.cer == pytest.approx(edits / sum(map(len, labels)))
    rights = [1.0, 1 - 1 / len(labels[1]), 1 - 1 / len(labels[2]), 0.0]
    told = [read.confidence for read in report.worst]
    assert sorted(told) == sorted(read.own_confidence for read in report.worst)
    by_file = {read.file: read.confidence for read in report.worst}
    distances = [abs(by_file[f"{n}.png"] - right) for n, right in enumerate(rights)]
    assert report.calibration_error == pytest.approx(sum(distances) / 4)
    assert (report.confidence_calibrated, report.blank_count, report.repetition_count) == (False, 0, 0)
    assert report.worst[0].file == "3.png"
    assert (report.worst[0].text, report.worst[0].read) == ("ÄÄÄÄÄÄÄÄ", fourth)
    assert report.lines_per_second > 0


def test_json_is_one_object_and_limit_and_beams_are_followed(folder: Path, tiny_folder: Path) -> None:
    write_labels(folder, *(f"{n}.png\tlabel {n}\tw" for n in range(4)))
    result = run(str(folder), "--model", str(tiny_folder), "--limit", "3", "--beam-width", "4", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["line_count"], report["beam_width"]) == (3, 4)
    assert report["cer"] > 0
    assert len(report["worst"]) == 3


def test_every_bad_row_is_listed_by_its_line_before_anything_is_read(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_labels(folder, "0.png\tfine\tw", "none.png\ttext\tw", "1.png\t\tw", "broken.png\ttext\tw", "2.png\ttext")
    result = run(str(folder))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{folder / 'labels.tsv'}:{n}" for n in (3, 4, 5, 6)]
    for line, wanted in zip(
        lines, ["No such file", "file or text is empty", "PNG", "2 columns where the header has 3"], strict=True
    ):
        assert wanted in line


def test_a_folder_without_usable_labels_is_refused(tmp_path: Path) -> None:
    assert run(str(tmp_path)).exit_code == 2
    write_labels(tmp_path, "a.png\tx", header="image\ttranscript")
    result = run(str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no column file and no column text" in result.stderr


def test_an_unknown_model_is_refused(folder: Path) -> None:
    write_labels(folder, "0.png\tfine\tw")
    result = run(str(folder), "--model", "nobody")
    assert result.exit_code == 2
    assert "nobody" in result.stderr


def test_a_terminal_sees_tables_and_a_pipe_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    worst = (evaluate.LineReport("a.png", "Straße", "Strasse", 2, 2 / 6, 0.5, 0.5, False, False),)
    report = evaluate.Report("m", 1, 1, 2 / 6, 1.0, 0.0, 9.0, 0.1667, False, 0, 1, worst)
    evaluate.show(report, Console(force_terminal=True, width=100))
    assert "Worst lines" in capsys.readouterr().out
    evaluate.show(report, Console(force_terminal=False))
    assert capsys.readouterr().out.splitlines() == [
        "model\tm",
        "beam width\t1",
        "lines\t1",
        "CER\t0.3333",
        "WER\t1.0000",
        "exact lines\t0.0000",
        "lines/s\t9.0",
        "calibration error\t0.1667 (raw)",
        "blank\t0",
        "repeating\t1",
        "worst\ta.png\t0.333\tStraße\tStrasse",
    ]


def test_it_is_a_module_that_helps() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.ocr.evaluate", "--help"], capture_output=True, text=True, check=True
    )
    assert "--beam-width" in done.stdout
