"""Protobuf to domain and back; the only file of this service that knows both."""

import math
from collections.abc import Sequence
from typing import Protocol

from google.rpc import status_pb2

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.kit.faults import FieldViolation, invalid_field, invalid_fields
from services.ocr.domain import (
    BEAM_WIDTH_MOST,
    LENGTH_PENALTY_MOST,
    NO_REPEAT_NGRAM_MOST,
    Decoding,
    EarlyStopping,
    Hypothesis,
    ModelInfo,
    Partial,
    Recognition,
)

ITEM_ID_LENGTH_MOST = 128

_EARLY_STOPPING: dict[ocr_pb2.EarlyStopping.ValueType, EarlyStopping] = {
    ocr_pb2.EARLY_STOPPING_FIRST: "first",
    ocr_pb2.EARLY_STOPPING_HEURISTIC: "heuristic",
    ocr_pb2.EARLY_STOPPING_NEVER: "never",
}
_EARLY_STOPPING_OUT = {value: number for number, value in _EARLY_STOPPING.items()}


class ReadRequest(Protocol):
    """What RecognizeRequest, StreamRecognizeRequest and BatchRecognizeRequest have in common."""

    @property
    def image(self) -> common_pb2.Image: ...
    @property
    def model(self) -> str: ...
    @property
    def decoding(self) -> ocr_pb2.DecodingOptions: ...
    @property
    def language_hints(self) -> Sequence[str]: ...


def decoding_of(options: ocr_pb2.DecodingOptions, model: ModelInfo) -> Decoding:
    """Options with the model's defaults filled in; raises Fault listing every option that is out of its range."""
    defaults = model.default_decoding
    violations: list[FieldViolation] = []

    def number(name: str, default: int, most: int, why: str, *, least: int = 1) -> int:
        value: int = getattr(options, name) if options.HasField(name) else default  # type: ignore[arg-type]
        if not least <= value <= most:
            violations.append(FieldViolation(f"decoding.{name}", f"{value} is not in {least} to {most}{why}"))
        return value

    beam_width = number("beam_width", defaults.beam_width, BEAM_WIDTH_MOST, "")
    # The model's default count may be more than the caller's width allows; a default is no mistake of the caller.
    usual_count = max(1, min(defaults.hypothesis_count, beam_width))
    hypothesis_count = number("hypothesis_count", usual_count, max(1, beam_width), f" (beam_width is {beam_width})")
    max_new_token_count = number(
        "max_new_token_count", defaults.max_new_token_count, model.max_new_token_limit, f", the limit of {model.name}"
    )
    no_repeat_ngram_size = number(
        "no_repeat_ngram_size", defaults.no_repeat_ngram_size, NO_REPEAT_NGRAM_MOST, "", least=0
    )
    early_stopping: EarlyStopping | None = defaults.early_stopping
    if options.early_stopping != ocr_pb2.EARLY_STOPPING_UNSPECIFIED:
        early_stopping = _EARLY_STOPPING.get(options.early_stopping)
    if early_stopping is None:
        accepted = ", ".join(f"{ocr_pb2.EarlyStopping.Name(n)} ({n})" for n in _EARLY_STOPPING)
        violations.append(FieldViolation("decoding.early_stopping", f"{options.early_stopping} is none of: {accepted}"))
    length_penalty = options.length_penalty if options.HasField("length_penalty") else defaults.length_penalty
    if not (math.isfinite(length_penalty) and abs(length_penalty) <= LENGTH_PENALTY_MOST):
        violations.append(
            FieldViolation(
                "decoding.length_penalty",
                f"{length_penalty:g} is not in {-LENGTH_PENALTY_MOST:g} to {LENGTH_PENALTY_MOST:g}",
            )
        )
    if violations or early_stopping is None:
        raise invalid_fields(violations)
    return Decoding(
        beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size, early_stopping
    )


def check_item_id(item_id: str, seen: set[str]) -> None:
    """Raise Fault unless the id of a batch item is 1 to 128 characters and not among `seen`; then add it there."""
    if not item_id:
        raise invalid_field("id", f"it is empty; 1 to {ITEM_ID_LENGTH_MOST} characters are accepted")
    if len(item_id) > ITEM_ID_LENGTH_MOST:
        raise invalid_field(
            "id",
            f"{len(item_id)} characters are more than the limit of {ITEM_ID_LENGTH_MOST}",
            limit=ITEM_ID_LENGTH_MOST,
        )
    if item_id in seen:
        raise invalid_field(
            "id", f"{item_id!r} was used before in this stream; each item needs its own", reason="DUPLICATE_ID"
        )
    seen.add(item_id)


def recognition(read: Recognition, model: ModelInfo, *, queue_ms: float, engine_ms: float) -> ocr_pb2.Recognition:
    """The answer message of a finished reading."""
    return ocr_pb2.Recognition(
        hypotheses=[_hypothesis(hypothesis) for hypothesis in read.hypotheses],
        truncated=read.truncated,
        model=model.name,
        timing=common_pb2.Timing(queue_ms=queue_ms, engine_ms=engine_ms),
        confidence=read.confidence,
        confidence_calibrated=read.confidence_calibrated,
        repetition_suspected=read.repetition_suspected,
        blank=read.blank,
    )


def _hypothesis(hypothesis: Hypothesis) -> ocr_pb2.Hypothesis:
    return ocr_pb2.Hypothesis(
        text=hypothesis.text,
        log_probability=hypothesis.log_probability,
        score=hypothesis.score,
        confidence=hypothesis.confidence,
        tokens=[
            ocr_pb2.Token(
                id=token.id,
                text=token.text,
                log_probability=token.log_probability,
                confidence=math.exp(token.log_probability),
            )
            for token in hypothesis.tokens
        ],
    )


def queued(position: int) -> ocr_pb2.StreamRecognizeResponse:
    """`position` calls stand before this one."""
    return ocr_pb2.StreamRecognizeResponse(queued=common_pb2.Queued(position=position))


def started(model: ModelInfo) -> ocr_pb2.StreamRecognizeResponse:
    """The engine took the call."""
    return ocr_pb2.StreamRecognizeResponse(
        started=common_pb2.Started(hardware=model.hardware, runtime=model.runtime, model=model.name)
    )


def partial(text: Partial) -> ocr_pb2.StreamRecognizeResponse:
    """The best text so far."""
    return ocr_pb2.StreamRecognizeResponse(partial=ocr_pb2.PartialText(text=text.text, token_count=text.token_count))


def result(read: ocr_pb2.Recognition) -> ocr_pb2.StreamRecognizeResponse:
    """The last event of a stream."""
    return ocr_pb2.StreamRecognizeResponse(result=read)


def item_result(item_id: str, read: ocr_pb2.Recognition) -> ocr_pb2.BatchRecognizeResponse:
    """What became of a batch item that was read."""
    return ocr_pb2.BatchRecognizeResponse(id=item_id, result=read)


def item_error(item_id: str, status: status_pb2.Status) -> ocr_pb2.BatchRecognizeResponse:
    """What became of a batch item that could not be read."""
    return ocr_pb2.BatchRecognizeResponse(id=item_id, error=status)


def decoding_options(decoding: Decoding) -> ocr_pb2.DecodingOptions:
    """Every option set."""
    return ocr_pb2.DecodingOptions(
        beam_width=decoding.beam_width,
        hypothesis_count=decoding.hypothesis_count,
        length_penalty=decoding.length_penalty,
        max_new_token_count=decoding.max_new_token_count,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        early_stopping=_EARLY_STOPPING_OUT[decoding.early_stopping],
    )
