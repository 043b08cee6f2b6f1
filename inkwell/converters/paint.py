"""Painting: requests, pictures and events."""

from dataclasses import dataclass

from inkwell import types
from inkwell.converters import shared
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import InternalError


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
        shared.assign(request, name, getattr(options, name))
    for name in ("width", "height", "guidance_scale", "seed", "image_count"):
        shared.assign(request, name, getattr(options, name))
    shared.assign(request, "step_count", options.steps)
    shared.assign(request.output, "media_type", options.media_type, path="output.media_type")
    shared.assign(request.output, "quality", options.quality, path="output.quality")
    request.preview.disabled = not options.previews
    return request


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
    return types.PaintResult(number, pictures, shared.timing(message.timing), served, warnings)


def _parameters(message: diffusion_pb2.GenerationParameters) -> types.GenerationParameters:
    return types.GenerationParameters(**shared.same_named(message, types.GenerationParameters))
