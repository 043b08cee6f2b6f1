"""Painting: pictures and events."""

import dataclasses
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from inkwell import types
from inkwell.converters import shared
from inkwell.converters.asking import ENUMS
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import InternalError

# Message → dataclass of the same name and fields.
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        types.GenerationParameters,
        types.InpaintParameters,
        types.ControlParameters,
        types.ImagePromptParameters,
        types.Outpaint,
        types.Lora,
        types.Hires,
        types.Refiner,
        types.Sampling,
        types.PerturbedAttention,
        types.FreeU,
        types.Variation,
        types.Vae,
    )
}


def paint_event(message: diffusion_pb2.GenerateResponse, served: types.ServedBy) -> types.PaintEvent | None:
    """None for an event that this version does not know."""
    number = message.sequence
    match message.WhichOneof("event"):
        case "queued":
            return types.Queued(number, message.queued.position)
        case "started":
            return shared.started(number, message.started)
        case "progress":
            progress = message.progress
            return types.Progress(number, progress.step, progress.step_count, progress.eta_ms)
        case "preview":
            return types.Preview(number, message.preview.step, _images(message.preview.images))
        case "result":
            return _paint_result(number, message.result, served)
    return None


def parameters(message: diffusion_pb2.GenerationParameters) -> types.GenerationParameters:
    """What a picture was painted with."""
    made: types.GenerationParameters = _plain(message)
    return made


def _paint_result(number: int, message: diffusion_pb2.GenerateResult, served: types.ServedBy) -> types.PaintResult:
    if not message.images:
        raise InternalError("the server answered without a picture", reason="NO_RESULT")
    warnings = tuple(message.warnings)
    pictures = tuple(
        types.Picture(
            content=each.image.content,
            media_type=each.image.media_type,
            parameters=parameters(each.parameters),
            served_by=served,
            warnings=warnings,
        )
        for each in message.images
    )
    conditions = _images(message.control_images)
    return types.PaintResult(number, pictures, shared.timing(message.timing), served, warnings, conditions)


def _images(messages: Any) -> tuple[types.Image, ...]:
    return tuple(types.Image(each.content, each.media_type) for each in messages)


def _plain(message: Message) -> Any:
    """The dataclass of the message's name. What is unset, or unknown to this version, has its default there."""
    kind = _KINDS[message.DESCRIPTOR.name]
    values = {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known and value is not None})


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return tuple(_converted(field, each) for each in value)
    if field.has_presence and not message.HasField(field.name):
        return None
    return _converted(field, value)


def _converted(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        return ENUMS[field.enum_type.name].get(value)
    if field.message_type is not None:
        return _plain(value)
    return shared.shortest_float32(value) if field.type == FieldDescriptor.TYPE_FLOAT else value
