"""What `Client.paint` is asked for, as a request."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from inkwell import types
from inkwell.channel import ENVELOPE_BYTES, REQUEST_BYTES_MOST
from inkwell.common.v1 import common_pb2
from inkwell.converters import shared
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import invalid
from inkwell.files import load

# By the name of the protobuf enum.
ENUMS: dict[str, Mapping[int, Any]] = {
    "PromptSyntax": shared.by_number(diffusion_pb2.PromptSyntax, "PROMPT_SYNTAX_", types.PromptSyntax),
    "MaskFill": shared.by_number(diffusion_pb2.MaskFill, "MASK_FILL_", types.MaskFill),
    "SigmaSchedule": shared.by_number(diffusion_pb2.SigmaSchedule, "SIGMA_SCHEDULE_", types.SigmaSchedule),
    "TimestepSpacing": shared.by_number(diffusion_pb2.TimestepSpacing, "TIMESTEP_SPACING_", types.TimestepSpacing),
    "PredictionType": shared.by_number(diffusion_pb2.PredictionType, "PREDICTION_TYPE_", types.PredictionType),
    "PreviewMethod": shared.by_number(diffusion_pb2.PreviewMethod, "PREVIEW_METHOD_", types.PreviewMethod),
}

_PICTURE = (bytes, bytearray, memoryview, str, os.PathLike, types.Image)
_NUMBER = (int, float)

# Options that are messages, the types of what fills them, and of their first field where this alone will do.
_ONE: dict[str, tuple[type, tuple[type, ...]]] = {
    "inpaint": (types.Inpaint, _PICTURE),
    "outpaint": (types.Outpaint, ()),
    "hires": (types.Hires, _NUMBER),
    "refiner": (types.Refiner, (str,)),
    "sampling": (types.Sampling, ()),
    "perturbed_attention": (types.PerturbedAttention, _NUMBER),
    "freeu": (types.FreeU, ()),
    "variation": (types.Variation, ()),
    "vae": (types.Vae, (str,)),
}
_SEVERAL: dict[str, tuple[type, tuple[type, ...]]] = {
    "controls": (types.Control, _PICTURE),
    "image_prompts": (types.ImagePrompt, _PICTURE),
    "loras": (types.Lora, (str,)),
}
# The longest interval that services take, for callers to whom progress is not passed on: on a small model, telling of
# every step takes a twentieth of the machine.
NOBODY_LOOKS_MS = 3_600_000

# Options that are fields of the same or of another name.
_PLAIN = {
    "negative_prompt": "negative_prompt",
    "model": "model",
    "width": "width",
    "height": "height",
    "steps": "step_count",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "seed": "seed",
    "image_count": "image_count",
    "batch_count": "batch_count",
    "wildcard_seed": "wildcard_seed",
    "progress_interval_ms": "progress_interval_ms",
    "strength": "strength",
    "guidance_rescale": "guidance_rescale",
    "clip_skip": "clip_skip",
}


@dataclass(frozen=True, slots=True)
class Attachment:
    """A picture that `attach` loads into `message`, the part of a request that `field` names."""

    message: common_pb2.Image
    field: str
    source: types.PictureSource


def generate_request(
    prompt: str, options: types.PaintOptions
) -> tuple[diffusion_pb2.GenerateRequest, Sequence[Attachment]]:
    """The request, and its pictures, which are still to be loaded.

    Raises InvalidRequest for values that the request's fields cannot hold, TypeError for an option that there is not.
    """
    for name in options:
        if name not in types.PaintOptions.__annotations__:
            raise TypeError(f"paint has no option {name!r}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = diffusion_pb2.GenerateRequest()
    attachments: list[Attachment] = []
    shared.assign(request, "prompt", prompt)
    for name, field in _PLAIN.items():
        shared.assign(request, field, given.get(name))
    _assign_enum(request, "prompt_syntax", given.get("prompt_syntax"), "prompt_syntax")
    _extend(request, "styles", shared.several("styles", given.get("styles", ())), "styles")
    for name in ("media_type", "quality"):
        shared.assign(request.output, name, given.get(name), path=f"output.{name}")
    _preview(request.preview, given)
    if "image" in given:
        attachments.append(_attachment(request.image, "image", given["image"]))
    for name, (kind, first) in _ONE.items():
        if name in given:
            _fill(getattr(request, name), _as(kind, first, given[name], name), name, attachments)
    for name, (kind, first) in _SEVERAL.items():
        for place, value in enumerate(_each_of(name, kind, first, given.get(name, ()))):
            path = f"{name}[{place}]"
            _fill(getattr(request, name).add(), _as(kind, first, value, path), path, attachments)
    return request, attachments


def attach(attachments: Iterable[Attachment]) -> None:
    """Read the pictures into their request; raises OSError, and TooLarge where they do not all fit one request."""
    left = REQUEST_BYTES_MOST - ENVELOPE_BYTES
    for each in attachments:
        source = each.source.content if isinstance(each.source, types.Image) else each.source
        each.message.content = load(source, field=each.field, most=left)
        left -= len(each.message.content)


def _preview(message: diffusion_pb2.PreviewOptions, given: Mapping[str, Any]) -> None:
    details = {field: given.get(f"preview_{name}") for name, field in
               {"interval": "step_interval", "max_side_px": "max_side_px", "method": "method"}.items()}  # fmt: skip
    message.disabled = not given.get("previews", any(value is not None for value in details.values()))
    _assign_enum(message, "method", details.pop("method"), "preview.method")
    for field, value in details.items():
        shared.assign(message, field, value, path=f"preview.{field}")


def _fill(message: Message, value: Any, path: str, attachments: list[Attachment]) -> None:
    """Set every field of `message` to the attribute of `value` that is called the same."""
    message.SetInParent()
    for field in message.DESCRIPTOR.fields:
        part = getattr(value, field.name)
        where = f"{path}.{field.name}"
        if field.enum_type is not None:
            _assign_enum(message, field.name, part, where)
        elif field.message_type is not None:  # pictures are all that these messages nest
            attachments.append(_attachment(getattr(message, field.name), where, part))
        elif field.is_repeated:
            _extend(message, field.name, part, where)
        else:
            shared.assign(message, field.name, part, path=where)


def _attachment(message: common_pb2.Image, field: str, source: object) -> Attachment:
    if not isinstance(source, bytes | bytearray | memoryview | str | os.PathLike | types.Image):
        raise invalid(field, f"a picture's bytes, its path or an Image expected, not {type(source).__name__}")
    message.SetInParent()
    return Attachment(message, field, source)


def _assign_enum(message: Message, name: str, value: object, path: str) -> None:
    kind = message.DESCRIPTOR.fields_by_name[name].enum_type
    assert kind is not None
    number = shared.choice(path, value, shared.by_name(ENUMS[kind.name]))
    if number:
        setattr(message, name, number)


def _extend(message: Message, name: str, values: Iterable[object], path: str) -> None:
    for place, value in enumerate(values):
        try:
            getattr(message, name).append(value)
        except (TypeError, ValueError) as error:
            expected = shared.type_name(message, name)
            raise invalid(f"{path}[{place}]", f"{expected} expected; {error}") from None


def _as(kind: type, first: tuple[type, ...], value: Any, field: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, first) and not isinstance(value, bool):
        return kind(value)
    if kind is types.Lora and isinstance(value, tuple) and len(value) == 2:
        return types.Lora(*value)
    raise invalid(field, f"{kind.__name__} expected, not {type(value).__name__}")


def _each_of(field: str, kind: type, first: tuple[type, ...], values: Any) -> Iterable[Any]:
    """Several of them, or the one that was given."""
    if isinstance(values, (kind, *first)):
        return (values,)
    if not isinstance(values, Iterable):
        raise invalid(field, f"several of {kind.__name__} expected, not {type(values).__name__}")
    return values
