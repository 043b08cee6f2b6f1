"""Requests to domain structs: defaults of the model, ranges, names."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.kit.faults import Fault, Kind
from services.ocr import converters, model_converters
from services.ocr.domain import Decoding, Hypothesis, ModelInfo, Recognition, Token

USUAL = Decoding(4, 2, 1.5, 60, 3, "never")
MODEL = ModelInfo("small", "cpu", "torch", "float32", 1000, USUAL, 96, is_default=True)
OTHER = ModelInfo("large", "cuda", "torch", "bfloat16", 9000, Decoding(1, 1, 1.0, 20), 512, is_default=False)


def test_unset_options_take_the_models_defaults() -> None:
    assert converters.decoding_of(ocr_pb2.DecodingOptions(), MODEL) == MODEL.default_decoding


def test_a_default_count_gives_way_to_the_callers_width() -> None:
    assert converters.decoding_of(ocr_pb2.DecodingOptions(beam_width=1), MODEL).hypothesis_count == 1


numbers = st.none() | st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 20)


@given(
    width=numbers,
    count=numbers,
    length=numbers,
    penalty=st.none() | st.floats(width=32) | st.floats(-6, 6, width=32),
    ngram=numbers | st.integers(60, 70),
    stopping=st.none() | st.integers(-1, 5),
)
def test_options_are_taken_as_they_are_or_named(
    width: int | None,
    count: int | None,
    length: int | None,
    penalty: float | None,
    ngram: int | None,
    stopping: int | None,
) -> None:
    given_options: dict[str, Any] = {
        "beam_width": width,
        "hypothesis_count": count,
        "max_new_token_count": length,
        "length_penalty": penalty,
        "no_repeat_ngram_size": ngram,
    }
    options = ocr_pb2.DecodingOptions(**{name: value for name, value in given_options.items() if value is not None})
    options.early_stopping = stopping or 0  # type: ignore[assignment]
    effective_width = MODEL.default_decoding.beam_width if width is None else width
    wrong = set()
    if width is not None and not 1 <= width <= 16:
        wrong.add("decoding.beam_width")
    if count is not None and not 1 <= count <= max(1, effective_width):
        wrong.add("decoding.hypothesis_count")
    if length is not None and not 1 <= length <= MODEL.max_new_token_limit:
        wrong.add("decoding.max_new_token_count")
    if penalty is not None and not (math.isfinite(penalty) and -5 <= penalty <= 5):
        wrong.add("decoding.length_penalty")
    if ngram is not None and not 0 <= ngram <= 64:
        wrong.add("decoding.no_repeat_ngram_size")
    if stopping is not None and not 0 <= stopping <= 3:
        wrong.add("decoding.early_stopping")
    if wrong:
        with pytest.raises(Fault) as caught:
            converters.decoding_of(options, MODEL)
        assert caught.value.data.kind is Kind.INVALID_ARGUMENT
        assert {violation.field for violation in caught.value.data.fields} == wrong
        return
    decoding = converters.decoding_of(options, MODEL)
    assert 1 <= decoding.hypothesis_count <= decoding.beam_width <= 16
    for name, value in given_options.items():
        assert value is None or getattr(decoding, name) == value
    assert decoding.early_stopping == ["never", "first", "heuristic", "never"][stopping or 0]


def test_what_the_model_list_shows_asks_for_the_models_own_default() -> None:
    listed = {model.name: model_converters.loaded(model).default_decoding for model in (MODEL, OTHER)}
    assert converters.decoding_of(listed["small"], MODEL) == MODEL.default_decoding
    assert converters.decoding_of(listed["large"], OTHER) == OTHER.default_decoding
    assert listed["small"].early_stopping == ocr_pb2.EARLY_STOPPING_NEVER


def test_a_recognition_keeps_everything() -> None:
    token = Token(7, "ß", math.log(0.5))
    read = Recognition((Hypothesis("ß", math.log(0.5), -0.6, 0.5, (token,)),), True, 3, 1.5, 0.25, True, True, True)
    message = converters.recognition(read, MODEL, queue_ms=1.5, engine_ms=20.25)
    assert message == ocr_pb2.Recognition(
        hypotheses=[
            ocr_pb2.Hypothesis(
                text="ß",
                log_probability=math.log(0.5),
                score=-0.6,
                confidence=0.5,
                tokens=[ocr_pb2.Token(id=7, text="ß", log_probability=math.log(0.5), confidence=0.5)],
            )
        ],
        truncated=True,
        model="small",
        timing=common_pb2.Timing(queue_ms=1.5, engine_ms=20.25),
        confidence=0.25,
        confidence_calibrated=True,
        repetition_suspected=True,
        blank=True,
    )


def test_item_ids_are_used_once() -> None:
    seen: set[str] = set()
    converters.check_item_id("a", seen)
    converters.check_item_id("x" * 128, seen)
    for bad in ("", "a", "x" * 129):
        with pytest.raises(Fault) as caught:
            converters.check_item_id(bad, seen)
        assert caught.value.data.fields[0].field == "id"
