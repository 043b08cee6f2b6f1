"""Judges a request before anything is admitted or computed, and fills in the defaults.

Everything that is wrong is said at once, each with its field, the limit and what would be accepted.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from services.diffusion import inputs, limits_layers, limits_modes, metadata, sampling, scheduler_table
from services.diffusion.domain import (
    MEDIA_TYPES,
    PROGRESS_INTERVAL_MS_MOST,
    SEED_MOST,
    Asked,
    Inpaint,
    ModelInfo,
    Outpaint,
    PaintJob,
    Parameters,
    Pixels,
    PreviewPlan,
)
from services.diffusion.inputs import Input
from services.diffusion.limits_modes import out_of_range
from services.diffusion.prompts.resolve import resolve as resolve_prompts
from services.diffusion.prompts.syntax import parse
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.faults import FieldViolation

T = TypeVar("T")


def resolve(asked: Asked, model: ModelInfo, settings: Settings, refiner: ModelInfo | None = None) -> PaintJob:
    """The job that a request means. Draws a seed where none was given; decodes the pictures that go in.

    model, refiner: as they are loaded. Large pictures take a while: call it on a thread. Raises Fault: NOT_FOUND for an
    unknown scheduler, style, wildcard, adapter or control; TOO_LARGE for a picture; FAILED_PRECONDITION for an adapter
    that cannot be used and for what compiled models do not have; INVALID_ARGUMENT listing every other wrong field.
    """
    limits_modes.refuse_compiled(asked, model)
    steps = sampling.steps_by_hand(asked.sampling) or _or(asked.step_count, model.default_step_count)
    guidance_scale = _or(asked.guidance_scale, model.default_guidance_scale)
    violations = [
        *_prompts(asked, settings),
        *_size(asked, model, settings),
        *_steps(asked, settings),
        *_pictures(asked, settings),
        *_output(asked),
        *_preview(asked, model, settings),
        *limits_modes.features(asked, model),
        *limits_modes.start(asked, steps),
        *limits_modes.knobs(asked, guided=guidance_scale > 1),
        *limits_layers.counts(asked, settings),
        *limits_layers.vae(asked, model),
    ]
    scheduler = _scheduler(asked, model, settings, violations)
    if violations:
        raise faults.invalid_fields(violations)

    given = _decoded(asked, settings)
    width, height = _painted_size(asked, given.image, model, settings)
    hires, wrong = limits_modes.hires(asked, model, settings, (width, height), steps)
    takes_over, more = limits_modes.refiner(asked, model)
    if takes_over is not None and refiner is not None and (unfit := limits_modes.refiner_unfit(model, refiner)):
        more.append(unfit)
    if wrong or more:
        raise faults.invalid_fields([*wrong, *more])

    count = _or(asked.image_count, 1) * _or(asked.batch_count, 1)
    same = Parameters(
        model=model.name,
        prompt="",
        negative_prompt="",
        width=width,
        height=height,
        step_count=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=_or(asked.seed, random.randrange(SEED_MOST + 2 - count)),
        prompt_syntax=asked.prompt_syntax or "weighted",
        styles=asked.styles,
        image_sha256=given.image.sha256 if given.image is not None else "",
        strength=_strength(asked),
        inpaint=_inpaint(asked, given.mask),
        outpaint=_outpaint(asked),
        controls=limits_layers.controls(asked, model, settings, [each.sha256 for each in given.controls]),
        image_prompts=limits_layers.image_prompts(asked, model, settings, [each.sha256 for each in given.prompts]),
        hires=hires,
        refiner=takes_over,
        sampling=asked.sampling,
        guidance_rescale=asked.guidance_rescale or None,
        perturbed_attention=limits_modes.perturbed_attention(asked),
        freeu=limits_modes.freeu(asked),
        clip_skip=asked.clip_skip or None,
        variation=asked.variation,
        vae=asked.vae,
    )
    job = PaintJob(
        pictures=tuple(_one(asked, same, index, model, settings) for index in range(count)),
        batch_size=_or(asked.image_count, 1),
        media_type=asked.media_type or MEDIA_TYPES[0],
        quality=_or(asked.quality, settings.default_quality),
        preview=PreviewPlan(
            0 if asked.preview_disabled else asked.preview_interval,
            asked.preview_method,
            _or(asked.preview_max_side_px, settings.preview_max_side_px),
        ),
        image=_pixels(given.image),
        mask=_pixels(given.mask),
        control_images=tuple(each.pixels for each in given.controls),
        image_prompt_images=tuple(each.pixels for each in given.prompts),
    )
    _refuse_what_exif_cannot_hold(job)
    return job


def cost(job: PaintJob, model: ModelInfo) -> float:
    """Work relative to one step of one picture of the model's own size."""
    parameters = job.parameters
    own = model.default_width * model.default_height
    steps = float(parameters.step_count) * (parameters.strength or 1.0)
    work = steps * parameters.width * parameters.height / own
    if (hires := parameters.hires) is not None:
        work += hires.step_count * hires.strength * hires.width * hires.height / own
    # Guidance evaluates the model without the prompt too, and AND on each of its parts.
    rows = _branch_count(parameters) + (parameters.guidance_scale > 1) + (parameters.perturbed_attention is not None)
    return work * len(job.pictures) * rows / 2


def _one(asked: Asked, same: Parameters, index: int, model: ModelInfo, settings: Settings) -> Parameters:
    """Picture `index` of the call: its seed, and its prompts, whose wildcards follow from the seed."""
    seed = same.seed + index
    wildcard_seed = _or(asked.wildcard_seed, seed)
    said = resolve_prompts(
        asked.prompt, asked.negative_prompt, asked.styles, same.prompt_syntax, wildcard_seed, settings
    )
    violations = list(said.violations)
    if said.branch_count > 1:
        violations += _and_unfit(same, model)
    if violations:
        raise faults.invalid_fields(violations)
    return msgspec.structs.replace(
        same,
        seed=seed,
        prompt=said.prompt,
        negative_prompt=said.negative_prompt,
        prompt_template=said.prompt_template,
        negative_prompt_template=said.negative_prompt_template,
        wildcard_seed=wildcard_seed if said.wildcards_drawn else None,
        loras=limits_layers.loras(asked, said.loras, model, settings),
    )


def _and_unfit(parameters: Parameters, model: ModelInfo) -> Iterator[FieldViolation]:
    if model.family == "flux":
        yield FieldViolation("prompt", "AND needs a model that is guided beside the prompt, and Flux is not")
    elif parameters.guidance_scale <= 1:
        yield FieldViolation("prompt", f"AND needs a guidance_scale above 1, and it is {parameters.guidance_scale:g}")
    if parameters.perturbed_attention is not None:
        yield FieldViolation("perturbed_attention", "it does not go with AND in the prompt; leave one out")


def _branch_count(parameters: Parameters) -> int:
    return parse(parameters.prompt).branch_count if parameters.prompt_syntax == "weighted" else 1


# --- the pictures that go in ---


@dataclass(frozen=True)
class _Given:
    image: Input | None
    mask: Input | None
    controls: tuple[Input, ...]
    prompts: tuple[Input, ...]


def _decoded(asked: Asked, settings: Settings) -> _Given:
    limits = inputs.limits_of(settings)
    image = inputs.decode_picture(asked.image, limits, "image.content") if asked.image is not None else None
    mask = None
    if asked.inpaint is not None and image is not None:
        mask = inputs.decode_mask(asked.inpaint.mask, limits, "inpaint.mask.content")
        inputs.check_mask(mask.pixels, image.pixels, inverted=asked.inpaint.inverted)
    return _Given(
        image,
        mask,
        tuple(
            inputs.decode_picture(control.image, limits, f"controls[{index}].image.content")
            for index, control in enumerate(asked.controls)
        ),
        tuple(
            inputs.decode_picture(prompt.image, limits, f"image_prompts[{index}].image.content")
            for index, prompt in enumerate(asked.image_prompts)
        ),
    )


def _painted_size(asked: Asked, image: Input | None, model: ModelInfo, settings: Settings) -> tuple[int, int]:
    """What the caller says; else the picture's own size, as nearly as the model can paint it; else the model's."""
    default = model.default_width, model.default_height
    in_detail = asked.inpaint is not None and asked.inpaint.crop_padding_px is not None
    added = limits_modes.outpainted_sides(asked)
    if image is not None and not in_detail:
        own = image.pixels.width + added[0], image.pixels.height + added[1]
        default = inputs.default_size(own, model.size_multiple, settings.max_side_px, settings.max_pixels)
    size = _or(asked.width, default[0]), _or(asked.height, default[1])
    for field, side, sides in zip(("width", "height"), size, added, strict=True):
        if sides and side <= sides:
            raise faults.invalid_field(
                "outpaint", f"{sides} pixels beyond the edges leave none of the {side} of {field} to the picture"
            )
    return size


def _pixels(given: Input | None) -> Pixels | None:
    return None if given is None else given.pixels


def _strength(asked: Asked) -> float | None:
    if asked.image is None:
        return None
    whole = asked.inpaint is not None or asked.outpaint is not None
    return _or(asked.strength, 1.0 if whole else limits_modes.STRENGTH)


def _inpaint(asked: Asked, mask: Input | None) -> Inpaint | None:
    wanted = asked.inpaint
    if wanted is None or mask is None:
        return None
    return Inpaint(
        mask.sha256, _or(wanted.blur_px, 0), wanted.inverted, wanted.crop_padding_px, wanted.fill or "original"
    )


def _outpaint(asked: Asked) -> Outpaint | None:
    wanted = asked.outpaint
    if wanted is None:
        return None
    return Outpaint(
        wanted.left_px,
        wanted.top_px,
        wanted.right_px,
        wanted.bottom_px,
        _or(wanted.blur_px, limits_modes.OUTPAINT_BLUR_PX),
        wanted.fill or "surroundings",
    )


# --- everything else ---


def _scheduler(asked: Asked, model: ModelInfo, settings: Settings, violations: list[FieldViolation]) -> str:
    """The scheduler's name in the table. Raises NOT_FOUND for one that nobody knows, when all else is well."""
    wanted = asked.scheduler or model.default_scheduler
    name = scheduler_table.resolve(wanted, model.schedulers) or wanted
    if name in model.unfit_schedulers:
        violations.append(
            FieldViolation(
                "scheduler",
                f"{name} cannot serve {model.name}: {model.unfit_schedulers[name]}; "
                f"accepted: {', '.join(model.schedulers)}",
            )
        )
    elif name not in model.schedulers:
        if not violations:
            raise faults.not_found("scheduler", wanted, model.schedulers, field="scheduler")
        violations.append(FieldViolation("scheduler", f"one of: {', '.join(sorted(model.schedulers))}"))
    else:
        violations += sampling.check(
            scheduler_table.TABLE.get(name), asked.sampling, settings.max_step_count, step_count=asked.step_count
        )
    return name


def _prompts(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    for field, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        size = len(text.encode())
        if size > settings.max_prompt_bytes:
            yield FieldViolation(field, f"{size} bytes are more than the limit of {settings.max_prompt_bytes}")
        elif any(ord(c) < 32 and c not in "\t\n\r" for c in text):
            yield FieldViolation(field, "it has control characters; of these only tab and line breaks are accepted")


def _size(asked: Asked, model: ModelInfo, settings: Settings) -> Iterator[FieldViolation]:
    multiple = model.size_multiple
    most = min(settings.max_side_px, model.largest_side_px or settings.max_side_px) // multiple * multiple
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


def _steps(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    yield from out_of_range("step_count", asked.step_count, 1, settings.max_step_count)
    yield from out_of_range("guidance_scale", asked.guidance_scale, 0, settings.max_guidance_scale)


def _pictures(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    count = 1
    for field, wanted, most in (
        ("image_count", asked.image_count, settings.max_image_count),
        ("batch_count", asked.batch_count, settings.max_batch_count),
    ):
        yield from out_of_range(field, wanted, 1, most)
        count *= min(max(_or(wanted, 1), 1), most)
    # Picture i has seed + i.
    yield from out_of_range("seed", asked.seed, 0, SEED_MOST + 1 - count)


def _output(asked: Asked) -> Iterator[FieldViolation]:
    if asked.media_type and asked.media_type not in MEDIA_TYPES:
        yield FieldViolation("output.media_type", f"one of: {', '.join(MEDIA_TYPES)}")
    elif asked.quality is not None and asked.media_type in ("", "image/png"):
        yield FieldViolation("output.quality", "PNG has no quality; leave it unset or take image/jpeg or image/webp")
    else:
        yield from out_of_range("output.quality", asked.quality, 1, 100)


def _preview(asked: Asked, model: ModelInfo, settings: Settings) -> Iterator[FieldViolation]:
    if asked.preview_interval is not None and asked.preview_interval < 1:
        yield FieldViolation(
            "preview.step_interval",
            f"{asked.preview_interval} is out of range; accepted: 1 or more (set preview.disabled for none)",
        )
    if asked.preview_method == "tiny_autoencoder" and not model.has_preview_autoencoder:
        yield FieldViolation("preview.method", f"{model.name} has no small autoencoder; take PREVIEW_METHOD_LINEAR")
    yield from out_of_range("preview.max_side_px", asked.preview_max_side_px, 8, settings.preview_max_side_px)
    yield from out_of_range("progress_interval_ms", asked.progress_interval_ms, 0, PROGRESS_INTERVAL_MS_MOST)


def _refuse_what_exif_cannot_hold(job: PaintJob) -> None:
    if job.media_type == "image/png":
        return
    size = max(map(metadata.exif_size, job.pictures))
    if size > metadata.EXIF_BYTES_MOST:
        raise faults.invalid_field(
            "prompt",
            f"with the other parameters it takes {size} bytes in the file, and {job.media_type} holds "
            f"{metadata.EXIF_BYTES_MOST}; shorten it or take image/png",
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
