"""The engine as its host drives it: places, partial texts, cancellation, and folders it must not take."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from services.kit import phases
from services.ocr.domain import Decoding
from services.ocr.engine.lane import Lane
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from services.runtimes import checkpoints
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import detect
from services.runtimes.precision import refusal
from tests.support import tiny_trocr
from tests.support.reading import GREEDY, Reader, beams, engine_of, lane_in, scribble


def lane_of(engine: OcrEngine, max_rows: int = 32, encoder_batch_size: int = 8) -> tuple[OcrEngine, Lane]:
    lane = Lane(lane_in(engine).model, max_rows, encoder_batch_size, encoder_step_s=10.0)
    return engine_of(lane), lane


def test_a_line_waits_until_all_its_beams_find_room(engine: OcrEngine) -> None:
    small, lane = lane_of(engine, max_rows=16)
    reader = Reader(small)
    first = reader.submit("first", scribble(1), beams(10))
    second = reader.submit("second", scribble(2), beams(10))
    third = reader.submit("third", scribble(3), GREEDY)
    while first.recognition is None:
        reader.step()
        assert lane.rows_in_use <= 16
        # Nobody overtakes, or a wide call might wait for ever.
        assert not second.accepted
        assert not third.accepted
    reader.finish()
    assert second.recognition is not None
    assert third.recognition is not None


def test_cancelling_frees_the_rows_at_once(engine: OcrEngine) -> None:
    small, lane = lane_of(engine, max_rows=16)
    reader = Reader(small)
    wide = reader.submit("wide", scribble(1), beams(16))
    waiting = reader.submit("waiting", scribble(2), GREEDY)
    while lane.rows_in_use < 16:
        reader.step()
    small.cancel("wide")
    assert lane.rows_in_use == 0
    reader.finish()
    assert wide.cancelled
    assert wide.recognition is None
    assert waiting.recognition is not None


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_line_can_be_cancelled_wherever_it_stands(engine: OcrEngine, steps: int) -> None:
    reader = Reader(engine)
    read = reader.submit("only", scribble(1), beams(4))
    for _ in range(steps):
        reader.step()
    engine.cancel("only")
    reader.finish()
    assert read.cancelled
    assert read.recognition is None
    assert not engine.busy


def test_cancelling_what_is_not_there_does_nothing(engine: OcrEngine) -> None:
    engine.cancel("nobody")
    assert not engine.busy
    assert engine.step() == []


def test_the_start_is_told_before_the_work_and_the_encoder_takes_only_so_many(engine: OcrEngine) -> None:
    small, lane = lane_of(engine, encoder_batch_size=2)
    reader = Reader(small)
    reads = [reader.submit(str(n), scribble(n), GREEDY) for n in range(5)]
    reader.step()
    assert all(read.accepted for read in reads)
    assert lane.rows_in_use == 0
    reader.step()
    assert lane.rows_in_use == 2
    reader.finish()
    assert all(read.recognition for read in reads)


def test_partial_texts_grow_to_the_result(engine: OcrEngine) -> None:
    reader = Reader(engine)
    read = reader.submit("told", scribble(3), GREEDY, partials=True)
    silent = reader.submit("silent", scribble(4), GREEDY)
    reader.finish()
    assert silent.partials == []
    texts = [partial.text for partial in read.partials]
    assert len(texts) > 2
    assert texts == sorted(set(texts), key=len)  # a change each time
    assert all(read.text.startswith(text) for text in texts)


def test_a_text_cut_at_the_limit_says_so(engine: OcrEngine) -> None:
    reader = Reader(engine)
    cut = [reader.submit(f"cut {n}", scribble(n), Decoding(1, 1, 1.0, 2)) for n in range(12)]
    whole = [reader.submit(f"whole {n}", scribble(n), Decoding(1, 1, 1.0, 48)) for n in range(12)]
    reader.finish()
    for short, long in zip(cut, whole, strict=True):
        assert short.recognition is not None
        assert short.ids[0] == long.ids[0][:2]
        assert short.recognition.truncated == (len(long.ids[0]) > 2)


# --- what is loaded, and what is not ---


def load(folder: Path | str, **options: Any) -> OcrEngine:
    return create_engine(Settings(models={"tiny": str(folder)}, threads=1, **options).model_dump_json())


def test_the_folders_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    folder = tiny_trocr.save(
        tmp_path,
        tiny_trocr.build(),
        num_beams=5,
        length_penalty=2.0,
        max_length=31,
        num_return_sequences=2,
        no_repeat_ngram_size=3,
        early_stopping=True,
    )
    (info,) = load(folder).info().models
    assert info.default_decoding == Decoding(5, 2, 2.0, 30, 3, "first")  # the start token counts in max_length
    assert info.max_new_token_limit == 48


def test_without_a_length_of_its_own_a_model_takes_the_settings(tiny_folder: Path) -> None:
    (info,) = load(tiny_folder, default_max_new_token_count=17, max_new_token_limit=40).info().models
    assert info.default_decoding == Decoding(1, 1, 1.0, 17)
    assert info.max_new_token_limit == 40


def test_bfloat16_is_a_setting(tiny_folder: Path) -> None:
    if why := refusal("bfloat16", detect()):
        pytest.skip(why)
    engine = load(tiny_folder, precision="bfloat16")
    assert engine.info().models[0].dtype == "bfloat16"
    reader = Reader(engine)
    read = reader.submit("one", scribble(1), beams(3))
    reader.finish()
    assert read.recognition is not None


def test_two_models_take_turns(tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny_trocr.save(tmp_path, tiny_trocr.build(seed=1, channels=3))
    engine = create_engine(
        Settings(models={"a": str(tiny_folder), "b": str(other)}, default_model="b", threads=1).model_dump_json()
    )
    assert {m.name: m.is_default for m in engine.info().models} == {"a": False, "b": True}
    texts = []
    for names in (["a"], ["b"], ["a", "b"]):
        readers = [Reader(engine, name) for name in names]
        reads = [reader.submit(reader.model, scribble(5), GREEDY) for reader in readers]
        readers[0].reads = {key: read for reader in readers for key, read in reader.reads.items()}
        readers[0].finish()
        texts.append([read.text for read in reads])
    assert texts[2] == [texts[0][0], texts[1][0]]
    assert texts[0] != texts[1]


def test_pickled_weights_need_a_setting(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_trocr.build().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file; pickled weights are refused"):
        load(folder)
    assert load(folder, allow_pickled_weights=True).info().models


def test_missing_weights_are_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.model.decoder.layers.1.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first decoder\.model\.decoder\.layers\.1\.fc1"):
        load(folder)


def test_weights_that_give_no_numbers_are_found_at_the_start(tmp_path: Path) -> None:
    model = tiny_trocr.build()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite numbers"):
        load(tiny_trocr.save(tmp_path, model))


def test_a_processor_without_a_fixed_size_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "loose")
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "do_resize": False}))
    with pytest.raises(CheckpointError, match="different sizes"):
        load(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("someone/some-model", "needs its revision; write someone/some-model@"),
        ("someone/some-model@", "needs its revision"),
        ("name", "no such folder"),
    ],
)
def test_an_unfit_source_says_what_would_do(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoints.resolve(source)


def test_sources_are_folders_or_pinned_repositories(tmp_path: Path) -> None:
    assert checkpoints.resolve(str(tmp_path)).revision is None
    pinned = checkpoints.resolve("microsoft/trocr-base-handwritten@eaacaf4")
    assert (pinned.location, pinned.revision) == ("microsoft/trocr-base-handwritten", "eaacaf4")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKWELL_OCR_MODELS", '{"mine": "/models/mine", "other": "a/b@c"}')
    monkeypatch.setenv("INKWELL_OCR_MAX_IMAGE_PIXELS", "123")
    settings = Settings()
    assert settings.models == {"mine": "/models/mine", "other": "a/b@c"}
    assert (settings.default_model_name, settings.max_image_pixels) == ("mine", 123)
    with pytest.raises(ValidationError, match="'nobody' is not one of models"):
        Settings(default_model="nobody")


def test_an_image_waits_for_others_only_so_long(engine: OcrEngine) -> None:
    now = 0.0
    lane = Lane(lane_in(engine).model, 32, 3, 10.0, encoder_wait_s=5.0, clock=lambda: now)
    reader = Reader(engine_of(lane))
    reader.submit("first", scribble(1), GREEDY)
    for _ in range(4):
        reader.step()
    assert lane.rows_in_use == 0
    now = 5.0
    reader.step()
    assert lane.rows_in_use == 1
    # A full batch does not wait, and the line under way goes on while one that is not full does.
    reader.submit("second", scribble(2), beams(1, length=3))
    reader.step()
    first = reader.reads["first"]
    while first.recognition is None:
        reader.step()
        assert lane.rows_in_use <= 1
    assert reader.reads["second"].recognition is None
    for name in ("third", "fourth"):
        reader.submit(name, scribble(3), beams(1, length=3))
    reader.step()
    reader.step()
    assert lane.rows_in_use == 3
    now = 20.0
    reader.finish()


def test_a_followed_line_tells_its_phases_and_each_token(engine: OcrEngine) -> None:
    phases.follow("followed")
    reader = Reader(engine)
    line = reader.submit("followed", scribble(1), GREEDY)
    reader.submit("neighbour", scribble(2), GREEDY)
    reader.finish()
    assert line.recognition is not None
    went_through = phases.take("followed")
    assert [phase.name for phase in went_through] == ["wait", "batch", "encode", "decode"]
    encode, decode = went_through[2:]
    assert encode.attributes["batch_size"] == 2
    assert decode.attributes["steps"] == line.recognition.decoded_token_count
    assert decode.steps[0].attributes["batch_size"] == 2
