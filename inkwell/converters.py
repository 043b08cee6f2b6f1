"""Protobuf ↔ the dataclasses of `inkwell.types`; the clients know only the latter.

Requests are checked by the server, where the rules are; here only what protobuf itself cannot carry is refused.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import Message

from inkwell import types
from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import InternalError, invalid
from inkwell.gateway.v1 import gateway_pb2
from inkwell.ocr.v1 import ocr_pb2

Service = Literal["ocr", "diffusion"]


def load_image(source: types.ImageSource) -> bytes:
    """The encoded bytes of a picture; reads the file if `source` is a path. Raises OSError."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    return Path(source).read_bytes()


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The arguments of `Client.read` that go into a request; None for the model's default."""

    model: str
    beam_width: int | None
    hypothesis_count: int | None
    length_penalty: float | None
    max_new_token_count: int | None

    def into(
        self,
        request: ocr_pb2.RecognizeRequest | ocr_pb2.StreamRecognizeRequest | ocr_pb2.BatchRecognizeRequest,
        content: bytes,
    ) -> None:
        """Fill `request`; raises InvalidRequest for values that its fields cannot hold."""
        request.image.content = content
        _assign(request, "model", self.model)
        for name in ("beam_width", "hypothesis_count", "length_penalty", "max_new_token_count"):
            _assign(request.decoding, name, getattr(self, name), path=f"decoding.{name}")


def recognize_request(content: bytes, options: ReadOptions) -> ocr_pb2.RecognizeRequest:
    """A request for one answer."""
    request = ocr_pb2.RecognizeRequest()
    options.into(request, content)
    return request


def stream_recognize_request(content: bytes, options: ReadOptions) -> ocr_pb2.StreamRecognizeRequest:
    """A request for a stream of events."""
    request = ocr_pb2.StreamRecognizeRequest()
    options.into(request, content)
    return request


def batch_recognize_request(wire_id: str, content: bytes, options: ReadOptions) -> ocr_pb2.BatchRecognizeRequest:
    """One request of many on a stream."""
    request = ocr_pb2.BatchRecognizeRequest(id=wire_id)
    options.into(request, content)
    return request


def reading(message: ocr_pb2.Recognition, served: types.ServedBy) -> types.Reading:
    """What was read; raises InternalError for an answer without a hypothesis."""
    if not message.hypotheses:
        raise InternalError("the server answered without a text", reason="NO_RESULT")
    return types.Reading(
        hypotheses=tuple(_hypothesis(each) for each in message.hypotheses),
        truncated=message.truncated,
        model=message.model,
        timing=_timing(message.timing),
        served_by=served,
    )


def read_event(message: ocr_pb2.StreamRecognizeResponse, served: types.ServedBy) -> types.ReadEvent | None:
    """None for an event that this version does not know."""
    number = message.sequence
    match message.WhichOneof("event"):
        case "queued":
            return types.Queued(number, message.queued.position)
        case "started":
            return _started(number, message.started)
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


# --- painting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PaintOptions:
    """The arguments of `Client.paint` that go into a request; None for the server's default."""

    prompt: str
    negative_prompt: str
    model: str
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    scheduler: str
    seed: int | None
    image_count: int | None
    media_type: str
    quality: int | None
    previews: bool


def generate_request(options: PaintOptions) -> diffusion_pb2.GenerateRequest:
    """Raises InvalidRequest for values that the request's fields cannot hold."""
    request = diffusion_pb2.GenerateRequest()
    for name in ("prompt", "negative_prompt", "model", "scheduler"):
        _assign(request, name, getattr(options, name))
    for name in ("width", "height", "guidance_scale", "seed", "image_count"):
        _assign(request, name, getattr(options, name))
    _assign(request, "step_count", options.steps)
    _assign(request.output, "media_type", options.media_type, path="output.media_type")
    _assign(request.output, "quality", options.quality, path="output.quality")
    request.preview.disabled = not options.previews
    return request


def paint_event(message: diffusion_pb2.GenerateResponse, served: types.ServedBy) -> types.PaintEvent | None:
    """None for an event that this version does not know."""
    number = message.sequence
    match message.WhichOneof("event"):
        case "queued":
            return types.Queued(number, message.queued.position)
        case "started":
            return _started(number, message.started)
        case "progress":
            progress = message.progress
            return types.Progress(number, progress.step, progress.step_count, progress.eta_ms)
        case "preview":
            images = tuple(types.Image(each.content, each.media_type) for each in message.preview.images)
            return types.Preview(number, message.preview.step, images)
        case "result":
            return _paint_result(number, message.result, served)
    return None


def _paint_result(number: int, message: diffusion_pb2.GenerateResult, served: types.ServedBy) -> types.PaintResult:
    if not message.images:
        raise InternalError("the server answered without a picture", reason="NO_RESULT")
    warnings = tuple(message.warnings)
    pictures = tuple(
        types.Picture(
            content=each.image.content,
            media_type=each.image.media_type,
            parameters=_parameters(each.parameters),
            served_by=served,
            warnings=warnings,
        )
        for each in message.images
    )
    return types.PaintResult(number, pictures, _timing(message.timing), served, warnings)


def _parameters(message: diffusion_pb2.GenerationParameters) -> types.GenerationParameters:
    return types.GenerationParameters(**_same_named(message, types.GenerationParameters))


# --- what there is -------------------------------------------------------------------------------------------------


def ocr_models(message: ocr_pb2.ListModelsResponse) -> Iterator[types.OcrModel]:
    """In the server's order."""
    for model in message.models:
        values = _same_named(model, types.OcrModel)
        values["state"] = _model_state(model.state)
        values["default_decoding"] = types.Decoding(**_same_named(model.default_decoding, types.Decoding))
        yield types.OcrModel(**values)


def diffusion_models(message: diffusion_pb2.ListModelsResponse) -> Iterator[types.DiffusionModel]:
    """In the server's order."""
    for model in message.models:
        values = _same_named(model, types.DiffusionModel)
        values["state"] = _model_state(model.state)
        yield types.DiffusionModel(**values)


def schedulers(message: diffusion_pb2.ListSchedulersResponse) -> list[types.Scheduler]:
    """In the server's order."""
    return [types.Scheduler(**_same_named(each, types.Scheduler)) for each in message.schedulers]


def list_pools_request(service: str, hardware: str) -> gateway_pb2.ListPoolsRequest:
    """Empty strings for all."""
    request = gateway_pb2.ListPoolsRequest()
    _assign(request, "service", service)
    _assign(request, "hardware", hardware)
    return request


def pools(message: gateway_pb2.ListPoolsResponse) -> list[types.Pool]:
    """In the gateway's order."""
    return [
        types.Pool(
            name=pool.name,
            service=pool.service,
            hardware=pool.hardware,
            targets=tuple(pool.targets),
            endpoints=tuple(_endpoint(each) for each in pool.endpoints),
        )
        for pool in message.pools
    ]


_ENDPOINT_STATES = {
    gateway_pb2.ENDPOINT_STATE_CONNECTING: types.EndpointState.CONNECTING,
    gateway_pb2.ENDPOINT_STATE_READY: types.EndpointState.READY,
    gateway_pb2.ENDPOINT_STATE_NOT_READY: types.EndpointState.NOT_READY,
    gateway_pb2.ENDPOINT_STATE_UNREACHABLE: types.EndpointState.UNREACHABLE,
}

_MODEL_STATES = {
    common_pb2.MODEL_STATE_LOADING: types.ModelState.LOADING,
    common_pb2.MODEL_STATE_READY: types.ModelState.READY,
}


def _endpoint(message: gateway_pb2.Endpoint) -> types.Endpoint:
    values = _same_named(message, types.Endpoint)
    values["state"] = _ENDPOINT_STATES.get(message.state, types.EndpointState.UNKNOWN)
    return types.Endpoint(**values)


def _model_state(state: common_pb2.ModelState.ValueType) -> types.ModelState:
    return _MODEL_STATES.get(state, types.ModelState.UNKNOWN)


# --- shared --------------------------------------------------------------------------------------------------------


def no_result() -> InternalError:
    """The error of a stream that ended well but without the event that must be its last."""
    return InternalError("the server ended the stream without a result", reason="NO_RESULT")


def served_by(metadata: Iterable[tuple[str, str | bytes]] | None) -> types.ServedBy:
    """What the reply's metadata tell about who serves the call."""
    told = {key: value for key, value in metadata or () if isinstance(value, str)}
    return types.ServedBy(
        hardware=told.get("inkwell-hardware", ""),
        pool=told.get("inkwell-pool", ""),
        endpoint=told.get("inkwell-endpoint", ""),
    )


def also_told(served: types.ServedBy, event: object) -> types.ServedBy:
    """The same with what a Started event adds."""
    if isinstance(event, types.Started):
        return dataclasses.replace(served, hardware=event.hardware, runtime=event.runtime)
    return served


def _started(number: int, message: common_pb2.Started) -> types.Started:
    return types.Started(number, message.hardware, message.runtime, message.model)


def _timing(message: common_pb2.Timing) -> types.Timing:
    return types.Timing(message.queue_ms, message.engine_ms)


def _same_named(message: Message, kind: type[Any]) -> dict[str, Any]:
    """The message's values for the fields of dataclass `kind`, which are called the same."""
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(kind)}


def _assign(message: Message, name: str, value: object, *, path: str = "") -> None:
    """Set a scalar field unless `value` is None or empty; the error names it if the value does not fit its type."""
    if value is None or value == "":
        return
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        kind = message.DESCRIPTOR.fields_by_name[name]
        raise invalid(path or name, f"{_TYPE_NAMES.get(kind.type, 'another type')} expected; {error}") from None


_TYPE_NAMES = {5: "a 32-bit whole number", 3: "a 64-bit whole number", 2: "a number", 9: "valid Unicode text"}
