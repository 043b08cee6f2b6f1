"""How alike pictures are, what lines and prompts are judged by, and a whole model built within its budget or not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.compiler import measure
from services.compiler.build import build
from services.compiler.domain import Budget, CompileRequest, Stage
from services.compiler.quality import lines, prompts, reading
from services.compiler.quality.lines import Line, LinesError
from services.compiler.quality.prompts import PromptsError
from services.compiler.quality.similarity import psnr, ssim
from services.compiler.search import BudgetError
from services.runtimes.artifacts.manifest import BYTES_RATIO, SPEED_RATIO
from tests.support import tiny_trocr
from tests.support.compiled_trocr import compiled, tied


def test_psnr_is_of_the_mean_square() -> None:
    black = np.zeros((8, 8, 3))
    assert psnr(black, black + 0.1) == pytest.approx(20)
    assert psnr(black, black) == float("inf")


def test_ssim_is_that_of_its_formula() -> None:
    source = np.random.default_rng(0)
    picture = source.random((32, 32, 3))
    assert ssim(picture, picture) == pytest.approx(1)
    # Of two even pictures only the term of the means is left: (2ab + C1) / (a² + b² + C1).
    flat = np.full((32, 32, 3), 0.5)
    assert ssim(flat, flat * 0.5) == pytest.approx((2 * 0.125 + 1e-4) / (0.25 + 0.0625 + 1e-4))
    # Inverted around its mean, structure turns round.
    assert ssim(picture, 1 - picture) < -0.9
    noisy = [ssim(picture, picture + source.normal(0, sigma, picture.shape)) for sigma in (0.01, 0.05, 0.2)]
    assert noisy == sorted(noisy, reverse=True)


def test_rendered_lines_are_the_same_every_time_and_each_another() -> None:
    first, again = lines.rendered(20), lines.rendered(20)
    assert [line.text for line in first] == [line.text for line in again]
    assert all(one.image.tobytes() == other.image.tobytes() for one, other in zip(first, again, strict=True))
    assert len({line.text for line in first}) == 20
    # There is ink on every one.
    assert all(line.image.convert("L").getextrema()[0] < 120 for line in first)  # type: ignore[operator]


def test_a_folder_of_lines_is_read_or_refused_by_its_line(tmp_path: Path) -> None:
    Image.new("RGB", (40, 10), "white").save(tmp_path / "a.png")
    labels = tmp_path / "labels.tsv"
    labels.write_text("file\ttext\na.png\tseen\n", "utf-8")
    assert [line.text for line in lines.labelled(tmp_path)] == ["seen"]
    labels.write_text("file\ttext\na.png\tseen\nb.png\tgone\n", "utf-8")
    with pytest.raises(LinesError, match=r"labels\.tsv:3: b\.png is no image that can be read"):
        lines.labelled(tmp_path)
    labels.write_text("name\ttext\na.png\tseen\n", "utf-8")
    with pytest.raises(LinesError, match=r":2: file or text is missing; the header has to name the columns file, text"):
        lines.labelled(tmp_path)
    labels.unlink()
    with pytest.raises(LinesError, match=r"labels\.tsv cannot be read"):
        lines.labelled(tmp_path)


def test_lines_to_calibrate_on_are_not_those_that_are_judged_by(tmp_path: Path) -> None:
    calibrating, judged = reading.lines_for("", tmp_path)
    assert len(judged) == 500
    assert not {line.text for line in calibrating} & {line.text for line in judged}


def test_prompts_of_a_folder_are_shared_out(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\nfour\n", "utf-8")
    assert prompts.prompts_for(str(tmp_path), tmp_path, 12) == (["two", "four"], ["one", "three"])
    (tmp_path / "prompts.txt").write_text("one\n", "utf-8")
    with pytest.raises(PromptsError, match=r"prompts\.txt has 1 prompts; two at least"):
        prompts.prompts_for(str(tmp_path), tmp_path, 12)


def test_the_character_error_rate_is_edits_over_characters() -> None:
    image = Image.new("RGB", (1, 1))
    assert reading.character_error_rate(["abc", "x"], [Line(image, "abd"), Line(image, "xyz")]) == 3 / 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    # As `tied`, whose graphs are exported once for all tests, but for shorter texts.
    tiny_trocr.save(folder, tiny_trocr.build(positions=160, qkv_bias=False), max_length=12)
    made = lines.rendered(12, seed=5)
    rows = ["file\ttext"]
    (folder / "lines").mkdir()
    for number, line in enumerate(made):
        line.image.save(folder / "lines" / f"{number}.png")
        rows.append(f"{number}.png\t{line.text}")
    (folder / "lines" / "labels.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


def test_a_float32_model_reads_the_same_texts_and_says_what_was_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No more than the fewest rounds: what the figures are is not looked at.
    monkeypatch.setattr(measure, "_WHOLE_SECONDS", 0)
    monkeypatch.setattr(measure, "_COMPONENT_SECONDS", 0)
    (tmp_path / "built").mkdir()
    exported = compiled(tied).made
    request = CompileRequest("tiny", str(tiny), "onnx", "float32", calibration_folder=str(tiny / "lines"))
    stages: list[Stage] = []
    built = build(exported, request, tiny, tmp_path / "built", lambda stage, note: stages.append(stage))
    names = [check.name for check in built.checks]
    assert all(check.passed for check in built.checks)
    assert "encoder: largest error of its outputs" in names
    texts = next(check for check in built.checks if check.name == "texts that differ from torch's")
    assert (texts.value, texts.limit, texts.unit) == (0, 0, "of 9 lines")
    figures = {figure.name: figure.value for figure in built.measured}
    assert figures[SPEED_RATIO] > 0
    assert figures[BYTES_RATIO] == pytest.approx(1, abs=0.02)
    assert [graph.file for graph in built.graphs] == ["encoder.onnx", "decoder.onnx"]
    assert sorted(path.name for path in (tmp_path / "built").iterdir()) == ["decoder.onnx", "encoder.onnx"]
    assert list(dict.fromkeys(stages)) == ["checking", "building", "verifying", "measuring"]

    # Of the same export: a budget that rounding cannot hold, whatever goes back, is refused with the figures.
    impossible = CompileRequest(
        "tiny",
        str(tiny),
        "onnx",
        "int4_weight_only",
        calibration_folder=str(tiny / "lines"),
        budget=Budget(character_error_rate=-5.0),
    )
    with pytest.raises(BudgetError, match="even with all .* layers in float, rise of the character error rate"):
        build(exported, impossible, tiny, tmp_path / "built", lambda stage, note: None)
