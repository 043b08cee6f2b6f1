"""Judges a request before anything is admitted or computed, and fills in the defaults.

Everything that is wrong is said at once, each with its field, the limit and what would be accepted.
"""

import math
import random
from collections.abc import Iterator
from typing import TypeVar

from services.diffusion import metadata
from services.diffusion.domain import MEDIA_TYPES, SEED_MOST, Asked, EngineInfo, ModelInfo, PaintJob, Parameters
from services.diffusion.domain import shortest_float32 as shortest
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.faults import FieldViolation

T = TypeVar("T")


def resolve(asked: Asked, info: EngineInfo, settings: Settings) -> PaintJob:
    """The job that a request means. Draws a seed where none was given.

    Raises Fault: NOT_FOUND for an unknown model or scheduler, INVALID_ARGUMENT listing every other wrong field.
    """
    name = asked.model or settings.model_of_empty_name
    model = info.model(name)
    if model is None:
        raise faults.not_found("model", name, (m.name for m in info.models), field="model")

    violations = [
        *_prompts(asked, settings),
        *_size(asked, model, settings),
        *_steps(asked, model, settings),
        *_pictures(asked, settings),
        *_output(asked),
    ]
    scheduler = asked.scheduler or model.default_scheduler
    if scheduler in model.unfit_schedulers:
        violations.append(
            FieldViolation(
                "scheduler",
                f"{scheduler} cannot serve {name}: {model.unfit_schedulers[scheduler]}; "
                f"accepted: {', '.join(model.schedulers)}",
            )
        )
    elif scheduler not in model.schedulers:
        if not violations:
            raise faults.not_found("scheduler", scheduler, model.schedulers, field="scheduler")
        violations.append(FieldViolation("scheduler", f"one of: {', '.join(sorted(model.schedulers))}"))
    if violations:
        raise faults.invalid_fields(violations)

    image_count = _or(asked.image_count, 1)
    job = PaintJob(
        Parameters(
            model=name,
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            width=_or(asked.width, model.default_width),
            height=_or(asked.height, model.default_height),
            step_count=_or(asked.step_count, model.default_step_count),
            guidance_scale=shortest(_or(asked.guidance_scale, model.default_guidance_scale)),
            scheduler=scheduler,
            seed=_or(asked.seed, random.randrange(SEED_MOST + 2 - image_count)),
        ),
        image_count=image_count,
        media_type=asked.media_type or MEDIA_TYPES[0],
        quality=_or(asked.quality, settings.default_quality),
        preview_interval=0 if asked.preview_disabled else _or(asked.preview_interval, 1),
    )
    _refuse_what_exif_cannot_hold(job)
    return job


def cost(job: PaintJob, model: ModelInfo) -> float:
    """Work relative to one step of one picture of the model's own size."""
    pixels = job.parameters.width * job.parameters.height
    relative = pixels / (model.default_width * model.default_height)
    guided = 1.0 if job.parameters.guidance_scale > 1 else 0.5  # guidance evaluates the model on two rows
    return job.parameters.step_count * job.image_count * relative * guided


def _prompts(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    for field, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        size = len(text.encode())
        if size > settings.max_prompt_bytes:
            yield FieldViolation(field, f"{size} bytes are more than the limit of {settings.max_prompt_bytes}")
        elif any(ord(c) < 32 and c not in "\t\n\r" for c in text):
            yield FieldViolation(field, "it has control characters; of these only tab and line breaks are accepted")


def _size(asked: Asked, model: ModelInfo, settings: Settings) -> Iterator[FieldViolation]:
    multiple = model.size_multiple
    most = settings.max_side_px // multiple * multiple
    sound = True
    for field, side in (("width", asked.width), ("height", asked.height)):
        if side is None:
            continue
        if not multiple <= side <= most or side % multiple:
            sound = False
            below = min(max(side // multiple * multiple, multiple), most)
            above = min(below + multiple, most) if side > below else below
            nearest = f"{below}" if below == above else f"{below} or {above}"
            yield FieldViolation(
                field, f"{side} is not a multiple of {multiple} from {multiple} to {most}; nearest accepted: {nearest}"
            )
    width, height = _or(asked.width, model.default_width), _or(asked.height, model.default_height)
    if sound and width * height > settings.max_pixels:
        largest = settings.max_pixels // width // multiple * multiple
        advice = f"at width {width} the height may be up to {largest}" if largest else "take a smaller width"
        yield FieldViolation(
            "width, height", f"{width}x{height} has more pixels than the limit of {settings.max_pixels}; {advice}"
        )


def _steps(asked: Asked, model: ModelInfo, settings: Settings) -> Iterator[FieldViolation]:
    most = settings.max_step_count
    if asked.step_count is not None and not 1 <= asked.step_count <= most:
        yield FieldViolation("step_count", f"{asked.step_count} is out of range; accepted: 1 to {most}")
    scale = asked.guidance_scale
    if scale is not None and not (math.isfinite(scale) and 0 <= scale <= settings.max_guidance_scale):
        yield FieldViolation(
            "guidance_scale", f"{scale:g} is out of range; accepted: 0 to {settings.max_guidance_scale:g}"
        )
    if asked.preview_interval is not None and asked.preview_interval < 1:
        yield FieldViolation(
            "preview.step_interval",
            f"{asked.preview_interval} is out of range; accepted: 1 or more (set preview.disabled for none)",
        )


def _pictures(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    count = _or(asked.image_count, 1)
    if not 1 <= count <= settings.max_image_count:
        yield FieldViolation("image_count", f"{count} is out of range; accepted: 1 to {settings.max_image_count}")
        count = 1
    most = SEED_MOST + 1 - count  # picture i has seed + i
    if asked.seed is not None and not 0 <= asked.seed <= most:
        yield FieldViolation("seed", f"{asked.seed} is out of range; accepted: 0 to {most}")


def _output(asked: Asked) -> Iterator[FieldViolation]:
    media_type = asked.media_type or MEDIA_TYPES[0]
    if media_type not in MEDIA_TYPES:
        yield FieldViolation(
            "output.media_type", f"{media_type[:80]!r} cannot be written; accepted: {', '.join(MEDIA_TYPES)}"
        )
    elif asked.quality is not None and media_type == "image/png":
        yield FieldViolation("output.quality", "PNG has no quality; leave it unset or take image/jpeg or image/webp")
    elif asked.quality is not None and not 1 <= asked.quality <= 100:
        yield FieldViolation("output.quality", f"{asked.quality} is out of range; accepted: 1 to 100")


def _refuse_what_exif_cannot_hold(job: PaintJob) -> None:
    if job.media_type == "image/png":
        return
    size = metadata.exif_size(job.parameters_of(job.image_count - 1))
    if size > metadata.EXIF_BYTES_MOST:
        raise faults.invalid_field(
            "prompt",
            f"with the negative prompt it takes {size} bytes in the file, and {job.media_type} holds "
            f"{metadata.EXIF_BYTES_MOST}; shorten them or take image/png",
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
