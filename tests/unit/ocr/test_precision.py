"""Precisions from end to end: what machines can do, int8 folders, reading with them, and the commands."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file, save_file
from transformers import VisionEncoderDecoderModel
from typer.testing import CliRunner, Result

from services.ocr import compare, quantize
from services.ocr.domain import Decoding, EngineInfo, Line, Precision
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from services.runtimes import int8_folder, precision, torch_trocr
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware, detect
from services.runtimes.precision import Abilities
from tests.support.reading import GREEDY, Reader, beams, lane_in, scribble

EMBEDDED = Path(__file__).resolve().parents[3] / "models" / "handwriting-tiny"
SAMPLES = EMBEDDED / "samples"
INT8: tuple[Precision, ...] = ("int8_dynamic", "int8_weight_only", "int8_static")
CPU = Hardware("cpu", "cpu", "CPU", 0, 1)

needs_integers = pytest.mark.skipif(
    bool(precision.refusal("int8_dynamic", detect())), reason="this machine does no integer products"
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKWELL_OCR_THREADS", "1")


def engine_with(folder: Path, wanted: str = "auto") -> OcrEngine:
    settings = Settings(models={"tiny": str(folder)}, precision=wanted, threads=1, read_documents=False)
    return create_engine(settings.model_dump_json())


def info_of(engine: OcrEngine) -> EngineInfo:
    info = engine.info()
    assert isinstance(info, EngineInfo)
    return info


def run(command: object, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_lines(folder: Path, count: int) -> Path:
    rows = ["file\ttext"]
    for number in range(count):
        line = scribble(number)
        Image.frombytes("RGB", (line.width, line.height), line.pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png\tlabel {number}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines"), 6)


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, lines: Path) -> Path:
    """The tiny model, quantized on six lines through the command."""
    output = tmp_path_factory.mktemp("int8") / "static"
    done = run(quantize.command, tiny_folder, "--data", lines, "--output", output)
    assert done.exit_code == 0, done.output
    return output


# --- what machines can do ---


@pytest.mark.parametrize(
    ("can", "bfloat16", "float16", "int8"),
    [
        (precision.of_cpu({"architecture": "x86_64", "avx512_bf16": True, "avx512_vnni": True}), True, False, True),
        (precision.of_cpu({"architecture": "x86_64", "avx2": True}), False, False, False),
        (precision.of_cpu({"architecture": "x86_64", "avx_vnni": True}), False, False, True),
        (
            precision.of_cpu({"architecture": "x86_64", "amx_bf16": True, "amx_fp16": True, "amx_int8": True}),
            True,
            True,
            True,
        ),
        (precision.of_cpu({"architecture": "aarch64", "bf16": True, "fp16_arith": True}), True, True, False),
        (precision.of_cpu({}), False, False, False),
        (precision.of_cuda((9, 0)), True, True, True),
        (precision.of_cuda((8, 0)), True, True, True),
        (precision.of_cuda((7, 5)), False, True, True),
        (precision.of_cuda((7, 0)), False, True, False),
        (precision.of_cuda((5, 2)), False, False, False),
        (precision.of_rocm("gfx90a:sramecc+:xnack-"), True, True, True),
        (precision.of_rocm("gfx942"), True, True, True),
        (precision.of_rocm("gfx1100"), True, True, True),
        (precision.of_rocm("gfx1030"), False, True, False),
    ],
)
def test_what_machines_can_do(can: Abilities, bfloat16: bool, float16: bool, int8: bool) -> None:
    assert (not can.bfloat16, not can.float16, not can.int8) == (bfloat16, float16, int8)


def test_this_machine_can_be_asked() -> None:
    here = detect()
    assert precision.refusal("float32", here) == ""
    assert precision.refusal("int8_weight_only", here) == ""


@pytest.mark.parametrize(
    ("wanted", "can", "message"),
    [
        ("float16", Abilities(float16="no such instructions"), "no such instructions; use float32 or bfloat16"),
        ("bfloat16", Abilities(bfloat16="too old", float16="too old"), "too old; use float32"),
        ("int8_dynamic", Abilities(int8="no VNNI"), "no VNNI; use int8_weight_only"),
        ("int8_static", Abilities(int8="no VNNI"), "no VNNI; use int8_weight_only"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_what_can(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, wanted: precision.Precision, can: Abilities, message: str
) -> None:
    monkeypatch.setattr(precision, "abilities", lambda _: can)
    with pytest.raises(CheckpointError, match=message):
        torch_trocr.load(tiny_folder, device="cpu", precision=wanted, hardware=CPU)


def test_auto_never_takes_a_type_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Hardware("cuda", "cuda:0", "GPU", 0, 1)
    for can, wanted in (
        (Abilities(), "bfloat16"),
        (Abilities(bfloat16="old"), "float16"),
        (Abilities(bfloat16="old", float16="older"), "float32"),
    ):
        monkeypatch.setattr(precision, "abilities", lambda _, can=can: can)
        assert torch_trocr.choose_precision("auto", gpu) == wanted


# --- reading ---


LINES = [scribble(number) for number in range(100, 104)]


@pytest.fixture(scope="module")
def int8_engines(static_folder: Path) -> dict[str, OcrEngine]:
    return {name: engine_with(static_folder, name) for name in INT8}


@needs_integers
@pytest.mark.parametrize("wanted", INT8)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, len(LINES) - 1), st.sampled_from([GREEDY, beams(4), beams(9, length=7)]), st.integers(0, 5)
        ),
        min_size=2,
        max_size=7,
    )
)
def test_a_text_does_not_depend_on_who_shares_its_batch(
    int8_engines: dict[str, OcrEngine], wanted: Precision, calls: list[tuple[int, Decoding, int]]
) -> None:
    engine = int8_engines[wanted]
    alone = []
    for line, decoding, _ in calls:
        reader = Reader(engine)
        read = reader.submit("alone", LINES[line], decoding)
        reader.finish()
        alone.append(read.ids)
    reader = Reader(engine)
    for number, (line, decoding, steps) in enumerate(calls):
        reader.submit(str(number), LINES[line], decoding)
        for _ in range(steps):
            reader.step()
    reader.finish()
    assert [reader.reads[str(number)].ids for number in range(len(calls))] == alone


def labelled_samples() -> list[tuple[Line, str]]:
    found = []
    with (SAMPLES / "labels.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            image = Image.open(SAMPLES / row["file"]).convert("RGB")
            found.append((Line(image.width, image.height, image.tobytes()), row["text"]))
    return found


def error_rate(engine: OcrEngine) -> float:
    samples = labelled_samples()
    reader = Reader(engine)
    reads = [reader.submit(str(n), line, Decoding(1, 1, 1.0, 95)) for n, (line, _) in enumerate(samples)]
    reader.finish()
    edits = sum(Levenshtein.distance(read.text, text) for read, (_, text) in zip(reads, samples, strict=True))
    return edits / sum(len(text) for _, text in samples)


@pytest.fixture(scope="module")
def embedded_static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("int8") / "embedded"
    done = run(quantize.command, EMBEDDED, "--data", SAMPLES, "--limit", 4, "--output", output)
    assert done.exit_code == 0, done.output
    return output


@needs_integers
def test_the_embedded_model_reads_as_well_in_8_bits_and_takes_less_room(embedded_static: Path) -> None:
    whole = engine_with(EMBEDDED, "float32")
    float32_bytes = 4 * info_of(whole).models[0].parameter_count
    usual = error_rate(whole)
    for wanted in INT8:
        engine = engine_with(embedded_static if wanted == "int8_static" else EMBEDDED, wanted)
        model = info_of(engine).models[0]
        assert (model.precision, model.dtype) == (wanted, "float32")
        assert model.parameter_count == info_of(whole).models[0].parameter_count
        assert model.weight_bytes <= 0.30 * float32_bytes
        # Eight lines: two more wrong characters are chance.
        assert error_rate(engine) <= usual + 0.02
    assert (embedded_static / int8_folder.WEIGHTS).stat().st_size <= 0.30 * float32_bytes


# --- folders ---


@needs_integers
def test_a_folder_is_served_as_what_it_was_made_for_unless_told_otherwise(
    static_folder: Path, tiny_folder: Path
) -> None:
    assert info_of(engine_with(static_folder)).models[0].precision == "int8_static"
    assert info_of(engine_with(tiny_folder)).models[0].precision == torch_trocr.choose_precision("auto", detect())
    assert info_of(engine_with(static_folder, "float32")).models[0].precision == "float32"


def test_the_rounded_weights_are_kept_exactly(static_folder: Path, tiny_folder: Path) -> None:
    """In float32 the folder computes with the rounded weights, which weight-only does too."""
    logits = []
    for folder, wanted in ((static_folder, "float32"), (static_folder, "int8_weight_only"), (tiny_folder, "float32")):
        networks = lane_in(engine_with(folder, wanted)).model.networks
        prepared = lane_in(engine_with(folder, wanted)).model.prepare([LINES[0]])
        with torch.inference_mode():
            logits.append(networks.states(prepared))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_a_folder_has_the_hubs_layout_and_a_card(static_folder: Path, tiny_folder: Path) -> None:
    names = {file.name for file in static_folder.iterdir()}
    taken_over = {file.name for file in tiny_folder.iterdir()} - {"model.safetensors"}
    assert names == taken_over | {int8_folder.WEIGHTS, "README.md"}
    card = (static_folder / "README.md").read_text("utf-8")
    assert "int8_static" in card
    assert "6 lines" in card
    assert "Plain transformers does not load it" in card
    with pytest.raises(OSError, match="no file named"):
        VisionEncoderDecoderModel.from_pretrained(static_folder)


def test_the_card_keeps_what_the_original_declares(tmp_path: Path, tiny_folder: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    (source / "README.md").write_text("---\nlanguage: fr\n---\n# Mine\n\nLicence: ours.\n", "utf-8")
    done = run(quantize.command, source, "--precision", "int8_weight_only", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlanguage: fr\n---\n")
    assert "Licence: ours." in card
    assert list(info_of(engine_with(tmp_path / "out")).models[0].languages) == ["fr"]


@needs_integers
def test_static_without_ranges_is_refused_with_what_to_do(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no input ranges.*services\.ocr\.quantize"):
        engine_with(tiny_folder, "int8_static")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("enc_to_dec_proj.weight_scale"), "not int8 with a scale a channel"),
        (lambda tensors: tensors.pop("enc_to_dec_proj.weight_int8"), "1 weights are missing"),
        (lambda tensors: tensors.pop("enc_to_dec_proj.input_zero_point"), "no scale with a zero point"),
        (lambda tensors: tensors.update({"enc_to_dec_proj.input_scale": torch.tensor(0.0)}), "no scale with"),
    ],
)
def test_a_damaged_folder_is_refused(static_folder: Path, tmp_path: Path, damage: object, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(static_folder, broken)
    tensors = load_file(broken / int8_folder.WEIGHTS)
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, broken / int8_folder.WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        engine_with(broken)


def test_a_folder_of_another_format_or_with_half_a_file_is_refused(static_folder: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(static_folder, later)
    config = json.loads((later / "config.json").read_text("utf-8"))
    config[int8_folder.CONFIG_KEY]["format"] = 2
    (later / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="not of format 1"):
        engine_with(later, "int8_weight_only")
    half = tmp_path / "half"
    shutil.copytree(static_folder, half)
    content = (half / int8_folder.WEIGHTS).read_bytes()
    (half / int8_folder.WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="half"):
        engine_with(half)


# --- commands ---


def test_quantize_refuses_what_it_cannot_do(tiny_folder: Path, lines: Path, tmp_path: Path) -> None:
    no_data = run(quantize.command, tiny_folder, "--output", tmp_path / "out")
    assert (no_data.exit_code, "--data DIR" in no_data.stderr) == (2, True)
    there = run(quantize.command, tiny_folder, "--data", lines, "--output", tmp_path)
    assert (there.exit_code, "exists already" in there.stderr) == (2, True)
    nobody = run(quantize.command, "nobody", "--data", lines, "--output", tmp_path / "out")
    assert (nobody.exit_code, "nobody" in nobody.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_row_for_every_precision(tiny_folder: Path, lines: Path) -> None:
    arguments = (lines, "--model", tiny_folder, "--rounds", 2)
    done = run(compare.command, *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout)
    assert (table["line_count"], table["range_line_count"], table["round_count"]) == (5, 1, 2)
    rows = {row["precision"]: row for row in table["rows"]}
    assert list(rows) == list(compare.PRECISIONS)
    for name, row in rows.items():
        why_not = precision.refusal(name, detect())
        assert row["why_not"] == why_not
        if why_not:
            assert row["cer"] is None
            continue
        assert row["cer_change"] == pytest.approx(row["cer"] - rows["float32"]["cer"])
        assert row["speed_ratio"] > 0
        assert row["disk_ratio"] == pytest.approx(row["disk_bytes"] / rows["float32"]["disk_bytes"])
        assert row["memory_ratio"] <= 1
    assert rows["float32"]["speed_ratio"] == 1
    assert rows["int8_weight_only"]["disk_ratio"] < 0.5


def test_the_table_as_lines_says_what_it_was_measured_on(
    tiny_folder: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    others = write_lines(tmp_path_factory.mktemp("others"), 2)
    done = run(compare.command, lines, "--model", tiny_folder, "--rounds", 1, "--ranges-from", others)
    assert done.exit_code == 0, done.output
    rows = [line.split("\t") for line in done.stdout.splitlines() if not line.startswith("#")]
    assert rows[0][:3] == ["precision", "CER", "change"]
    assert [row[0] for row in rows[1:]] == list(compare.PRECISIONS)
    assert {len(row) for row in rows} == {10}
    notes = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert any("6 lines" in note for note in notes)
    assert any(f"2 lines of {others}" in note for note in notes)
    assert any("too few" in note for note in notes)


def test_the_commands_are_modules_that_help() -> None:
    for module, option in (("services.ocr.quantize", "--data"), ("services.ocr.compare", "--ranges-from")):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        assert option in done.stdout
