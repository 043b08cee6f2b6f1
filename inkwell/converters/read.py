"""Reading lines: requests, readings and events."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from inkwell import types
from inkwell.converters import shared
from inkwell.errors import InternalError, invalid
from inkwell.ocr.v1 import ocr_pb2

EARLY_STOPPINGS = shared.by_number(ocr_pb2.EarlyStopping, "EARLY_STOPPING_", types.EarlyStopping)
_EARLY_STOPPING_NUMBERS = shared.by_name(EARLY_STOPPINGS)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The arguments of `Client.read` that go into a request; None for the model's default."""

    model: str
    beam_width: int | None
    hypothesis_count: int | None
    length_penalty: float | None
    max_new_token_count: int | None
    no_repeat_ngram_size: int | None
    early_stopping: str | None
    languages: tuple[str, ...]

    def into(
        self,
        request: ocr_pb2.RecognizeRequest
        | ocr_pb2.StreamRecognizeRequest
        | ocr_pb2.BatchRecognizeRequest
        | ocr_pb2.ReadDocumentRequest,
    ) -> None:
        """Fill `request`; raises InvalidRequest for values that its fields cannot hold."""
        shared.assign(request, "model", self.model)
        for name in ("beam_width", "hypothesis_count", "length_penalty", "max_new_token_count", "no_repeat_ngram_size"):
            shared.assign(request.decoding, name, getattr(self, name), path=f"decoding.{name}")
        number = shared.choice("decoding.early_stopping", self.early_stopping, _EARLY_STOPPING_NUMBERS)
        if number:
            shared.assign(request.decoding, "early_stopping", number)
        try:
            request.language_hints.extend(self.languages)
        except (TypeError, ValueError) as error:
            raise invalid("languages", f"BCP 47 tags such as 'fr' expected; {error}") from None


def each_of(images: types.ImageSource | Iterable[types.ImageSource]) -> Iterable[types.ImageSource]:
    """Several pictures, or the one that was given."""
    return (images,) if isinstance(images, bytes | bytearray | memoryview | str | os.PathLike) else images


def recognize_request(content: bytes, options: ReadOptions) -> ocr_pb2.RecognizeRequest:
    """A request for one answer."""
    request = ocr_pb2.RecognizeRequest()
    options.into(request)
    request.image.content = content
    return request


def stream_recognize_request(content: bytes, options: ReadOptions) -> ocr_pb2.StreamRecognizeRequest:
    """A request for a stream of events."""
    request = ocr_pb2.StreamRecognizeRequest()
    options.into(request)
    request.image.content = content
    return request


def batch_recognize_request(wire_id: str, content: bytes, options: ReadOptions) -> ocr_pb2.BatchRecognizeRequest:
    """One request of many on a stream."""
    request = ocr_pb2.BatchRecognizeRequest(id=wire_id)
    options.into(request)
    request.image.content = content
    return request


def reading(message: ocr_pb2.Recognition, served: types.ServedBy) -> types.Reading:
    """What was read; raises InternalError for an answer without a hypothesis."""
    if not message.hypotheses:
        raise InternalError("the server answered without a text", reason="NO_RESULT")
    # A server that knows only hypotheses leaves the line's own confidence at 0.
    told = message.confidence_calibrated or message.confidence > 0
    return types.Reading(
        hypotheses=tuple(_hypothesis(each) for each in message.hypotheses),
        truncated=message.truncated,
        model=message.model,
        timing=shared.timing(message.timing),
        served_by=served,
        confidence=message.confidence if told else message.hypotheses[0].confidence,
        confidence_calibrated=message.confidence_calibrated,
        repetition_suspected=message.repetition_suspected,
        blank=message.blank,
    )


def read_event(message: ocr_pb2.StreamRecognizeResponse, served: types.ServedBy) -> types.ReadEvent | None:
    """None for an event that this version does not know."""
    number = message.sequence
    match message.WhichOneof("event"):
        case "queued":
            return types.Queued(number, message.queued.position)
        case "started":
            return shared.started(number, message.started)
        case "partial":
            return types.Partial(number, message.partial.text, message.partial.token_count)
        case "result":
            return types.ReadResult(number, reading(message.result, served))
    return None


def _hypothesis(message: ocr_pb2.Hypothesis) -> types.Hypothesis:
    return types.Hypothesis(
        text=message.text,
        log_probability=message.log_probability,
        score=message.score,
        confidence=message.confidence,
        tokens=tuple(types.Token(t.id, t.text, t.log_probability, t.confidence) for t in message.tokens),
    )
