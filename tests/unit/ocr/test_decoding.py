"""The engine reads what transformers' `generate` reads, whoever shares the batch."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import VisionEncoderDecoderModel

from services.ocr.domain import Decoding
from services.ocr.engine.lane import Lane
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from tests.support import tiny_trocr
from tests.support.reading import GREEDY, Reader, beams, engine_of, generate, lane_in, scribble

LINES = [scribble(seed) for seed in range(12)]
# Pairs that changed places, of all hypotheses: none where there are fewer than a hundred.
TIES_MOST = 0.01
OTHERS = [beams(1, ngram=2), beams(4, ngram=1, stopping="first"), beams(3, ngram=3, penalty=2.0, stopping="never")]


def check_equal(engine: OcrEngine, model: VisionEncoderDecoderModel, decoding: Decoding, **options: object) -> None:
    """Half of the lines start together, the others join one by one while those are under way."""
    reader = Reader(engine)
    for number, line in enumerate(LINES):
        if number >= len(LINES) // 2:
            for _ in range(3):
                reader.step()
        reader.submit(str(number), line, decoding)
    reader.finish()
    pixels = lane_in(engine).model.prepare(LINES)
    ties = 0
    for number, (ids, scores) in enumerate(generate(model, pixels, decoding, **options)):
        read = reader.reads[str(number)]
        if decoding.beam_width == 1:
            assert read.ids == ids
            continue
        assert read.recognition is not None
        assert [h.score for h in read.recognition.hypotheses] == pytest.approx(scores, rel=1e-4)
        # The same texts; only those whose scores are equal to the last bits may stand in each other's place.
        assert sorted(read.ids) == sorted(ids)
        moved = [place for place, own in enumerate(read.ids) if own != ids[place]]
        assert all(abs(scores[place] - scores[ids.index(read.ids[place])]) < 1e-4 for place in moved)
        ties += len(moved) // 2
    assert ties <= TIES_MOST * len(LINES) * decoding.hypothesis_count


@pytest.mark.parametrize(
    "decoding",
    [
        GREEDY,
        beams(2),
        beams(4),
        beams(4, count=1, length=7),
        beams(4, penalty=2.0),
        beams(4, penalty=0.0),
        beams(3, penalty=-1.5),
        beams(16, length=40),
        beams(1, ngram=1),
        beams(1, ngram=2),
        beams(4, ngram=2),
        beams(3, ngram=3, length=40),
        beams(4, stopping="first"),
        beams(4, penalty=2.0, stopping="first"),
        beams(4, penalty=2.0, stopping="never"),
        beams(4, penalty=-1.0, stopping="never"),
        beams(5, penalty=0.5, ngram=1, stopping="never", length=30),
    ],
    ids=str,
)
def test_greedy_and_beam_search_equal_generate(
    engine: OcrEngine, tiny_model: VisionEncoderDecoderModel, decoding: Decoding
) -> None:
    check_equal(engine, tiny_model, decoding)


def test_the_tiny_model_is_a_real_trial(engine: OcrEngine) -> None:
    """Texts that all end at the limit or are all alike would show nothing."""
    reader = Reader(engine)
    reads = [reader.submit(str(number), line, beams(4, count=1)) for number, line in enumerate(LINES)]
    reader.finish()
    assert len({read.text for read in reads}) > len(LINES) // 2
    assert len({len(read.ids[0]) for read in reads}) >= 3
    assert len({read.recognition.truncated for read in reads if read.recognition}) == 2


@pytest.mark.parametrize(
    ("build", "generation"),
    [
        ({"learned_positions": False}, {}),
        ({"channels": 3, "layers": 1}, {}),
        ({}, {"num_beams": 4, "early_stopping": True}),
        ({}, {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0}),
        ({}, {"no_repeat_ngram_size": 2}),
        ({}, {"repetition_penalty": 1.4}),
        ({}, {"forced_bos_token_id": 9, "forced_eos_token_id": tiny_trocr.EOS}),
        ({}, {"min_new_tokens": 6, "suppress_tokens": [12, 13], "begin_suppress_tokens": [14]}),
    ],
    ids=str,
)
def test_other_models_and_their_generation_configs_equal_generate(
    tmp_path: Path, build: dict[str, Any], generation: dict[str, Any]
) -> None:
    # Compared with the model in memory: loading leaves the library's own sinusoidal table empty.
    model = tiny_trocr.build(**build)
    folder = tiny_trocr.save(tmp_path, model, **generation)
    engine = create_engine(Settings(models={"tiny": str(folder)}, threads=1).model_dump_json())
    own = msgspec.structs.replace(engine.info().models[0].default_decoding, max_new_token_count=20)
    check_equal(engine, model, msgspec.structs.replace(own, beam_width=1))
    check_equal(engine, model, msgspec.structs.replace(own, beam_width=4, hypothesis_count=4))


@pytest.mark.parametrize(
    "generation",
    [{}, {"forced_bos_token_id": 9, "forced_eos_token_id": tiny_trocr.EOS}, {"suppress_tokens": [12, 13, 16, 17]}],
    ids=str,
)
def test_log_probabilities_are_the_models_own_even_of_tokens_that_are_forced(
    tmp_path: Path, tiny_model: VisionEncoderDecoderModel, generation: dict[str, Any]
) -> None:
    folder = tiny_trocr.save(tmp_path, tiny_trocr.build(), **generation)
    engine = create_engine(Settings(models={"tiny": str(folder)}, threads=1).model_dump_json())
    reader = Reader(engine)
    tries = [(line, decoding) for line in LINES[:3] for decoding in (GREEDY, beams(3), *OTHERS)]
    reads = [reader.submit(str(number), *tried) for number, tried in enumerate(tries)]
    reader.finish()
    for (line, _), read in zip(tries, reads, strict=True):
        assert read.recognition is not None
        for hypothesis in read.recognition.hypotheses:
            ids = [token.id for token in hypothesis.tokens]
            with torch.inference_mode():
                logits = tiny_model(
                    pixel_values=lane_in(engine).model.prepare([line]),
                    decoder_input_ids=torch.tensor([[tiny_trocr.BOS, *ids[:-1]]]),
                ).logits[0]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            # One token was seen 1.6e-4 off a float64 reference: what oneDNN's rounding comes to over the layers
            # (services/runtimes/torch_speed.py). The library's own is 1e-4 off at most.
            assert [token.log_probability for token in hypothesis.tokens] == pytest.approx(wanted, abs=3e-4)
            assert hypothesis.log_probability == pytest.approx(sum(wanted), abs=3e-3)
            assert hypothesis.confidence == pytest.approx(math.exp(sum(wanted) / len(wanted)), abs=3e-4)
            assert "".join(token.text for token in hypothesis.tokens) == hypothesis.text


# A call: which line, how it is read, how many steps pass before the next call, and whom to cancel then.
CALLS = st.lists(
    st.tuples(
        st.integers(0, len(LINES) - 1),
        st.sampled_from([GREEDY, beams(2), beams(4), beams(3, length=5), beams(16, count=2, length=9), *OTHERS]),
        st.integers(0, 6),
        st.none() | st.integers(0, 9),
    ),
    min_size=2,
    max_size=10,
)


def fresh_lane(engine: OcrEngine) -> Lane:
    used = lane_in(engine)
    return Lane(used.model, used.max_rows, used.encoder_batch_size, used.encoder_step_s)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS)
def test_a_text_never_depends_on_who_shares_its_batch(
    engine: OcrEngine, calls: list[tuple[int, Decoding, int, int | None]]
) -> None:
    engine = engine_of(fresh_lane(engine))  # a failing example must not disturb the next
    alone = []
    for line, decoding, _, _ in calls:
        reader = Reader(engine)
        read = reader.submit("alone", LINES[line], decoding)
        reader.finish()
        alone.append(read.ids)

    reader = Reader(engine)
    cancelled = set()
    for number, (line, decoding, steps, victim) in enumerate(calls):
        reader.submit(str(number), LINES[line], decoding)
        for _ in range(steps):
            reader.step()
        if victim is not None and victim <= number and reader.reads[str(victim)].recognition is None:
            engine.cancel(str(victim))
            cancelled.add(victim)
    reader.finish()
    for number, ids in enumerate(alone):
        read = reader.reads[str(number)]
        assert read.cancelled == (number in cancelled)
        assert read.cancelled or read.ids == ids
    assert lane_in(engine).rows_in_use == 0
