"""Every published TrOCR architecture, laid out as its repository is, reads as `generate` does."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import VisionEncoderDecoderModel

from services.ocr.domain import Decoding
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from services.runtimes.checkpoints import CheckpointError
from tests.support import published_trocr
from tests.support.published_trocr import ARCHITECTURES
from tests.support.reading import GREEDY, Read, Reader, generate, lane_in, scribble

# Random networks repeat themselves; so every token is another one, and depends on all before it.
NO_TOKEN_TWICE = msgspec.structs.replace(GREEDY, no_repeat_ngram_size=1)
LINES = [scribble(seed) for seed in range(5)]


def engine_for(folder: Path, **options: Any) -> OcrEngine:
    return create_engine(
        Settings(models={"tiny": str(folder)}, threads=1, read_documents=False, **options).model_dump_json()
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OcrEngine, VisionEncoderDecoderModel]:
    folder = tmp_path_factory.mktemp(request.param)
    model = published_trocr.save(folder, ARCHITECTURES[request.param])
    return engine_for(folder), model


Published = tuple[OcrEngine, VisionEncoderDecoderModel]


def read_all(engine: OcrEngine, decoding: Decoding) -> list[Read]:
    reader = Reader(engine)
    reads = [reader.submit(str(n), line, decoding) for n, line in enumerate(LINES)]
    reader.finish()
    return reads


def test_it_reads_what_generate_reads(published: Published) -> None:
    engine, model = published
    pixels = lane_in(engine).model.prepare(LINES)
    assert pixels.shape[1:] == (3, published_trocr.IMAGE, published_trocr.IMAGE)
    reads = [read.ids for read in read_all(engine, NO_TOKEN_TWICE)]
    assert reads == [ids for ids, _ in generate(model, pixels, NO_TOKEN_TWICE)]
    assert len({tuple(ids[0]) for ids in reads}) == len(LINES), "the text does not depend on the image"


def test_it_finds_the_beams_that_generate_finds(published: Published) -> None:
    engine, model = published
    decoding = msgspec.structs.replace(NO_TOKEN_TWICE, beam_width=3, hypothesis_count=3)
    wanted = generate(model, lane_in(engine).model.prepare(LINES), decoding)
    for read, (ids, scores) in zip(read_all(engine, decoding), wanted, strict=True):
        assert read.recognition is not None
        assert [h.score for h in read.recognition.hypotheses] == pytest.approx(scores, rel=1e-4)
        # Among so many random weights some beams tie, and rounding then decides which comes first.
        if min(first - second for first, second in pairwise(scores)) > 2e-3:
            assert read.ids == ids


def test_its_defaults_are_no_twenty_tokens(published: Published) -> None:
    """config.json repeats the library's default of 20 tokens, which nobody chose and which cuts lines."""
    info = lane_in(published[0]).model.info
    assert info.default_decoding.beam_width == 1
    assert info.default_decoding.max_new_token_count == 128


def test_its_tokenizer_is_found_in_its_vocabulary_files(published: Published) -> None:
    model = lane_in(published[0]).model
    for text in ("Straße am Platz", "the 12th letter"):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.text(ids) == text
        assert "".join(model.pieces(ids)).strip() == text


def test_its_embeddings_are_the_encoders_states(published: Published) -> None:
    engine, model = published
    lane = lane_in(engine)
    pixels = lane.model.prepare(LINES)
    with torch.inference_mode():
        wanted = model.encoder(pixels)[0]
        states = lane.model.networks.states(pixels)
    torch.testing.assert_close(states, wanted, atol=1e-4, rtol=0)
    info = lane.model.info
    assert (info.embedding_token_count, info.embedding_width) == wanted.shape[1:]
    assert info.has_class_token


def test_pickled_weights_of_old_repositories_need_a_setting(tmp_path: Path) -> None:
    model = published_trocr.save(tmp_path, ARCHITECTURES["trocr-base-handwritten"])
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights are refused"):
        engine_for(tmp_path)
    engine = engine_for(tmp_path, allow_pickled_weights=True)
    reader = Reader(engine)
    read = reader.submit("one", LINES[0], GREEDY)
    reader.finish()
    pixels = lane_in(engine).model.prepare(LINES[:1])
    assert read.ids == generate(model, pixels, GREEDY)[0][0]
