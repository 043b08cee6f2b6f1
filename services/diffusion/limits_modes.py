"""Judges what a request says about its mode: starting picture, mask, edges, second pass, refiner, and the small knobs.

Each check yields a violation a wrong field, and what it answers besides is only good when there was none.
"""

import math
from collections.abc import Iterator

from services.diffusion.domain import (
    LATENT_UPSCALERS,
    SEED_MOST,
    UPSCALERS,
    Asked,
    AskedOutpaint,
    FreeU,
    Hires,
    ModelInfo,
    PerturbedAttention,
    Refiner,
)
from services.diffusion.settings import Settings
from services.kit.faults import Fault, FaultData, FieldViolation, Kind

BLUR_MOST_PX = 64
CROP_PADDING_MOST_PX = 512
HIRES_SCALE_MOST = 4.0
STRENGTH = 0.75
HIRES_STRENGTH = 0.7
LATENT_STRENGTH_LEAST = 0.5
PAG_SCALE_MOST = 20.0
FREEU_MOST = 4.0
CLIP_SKIP_MOST = 11
OUTPAINT_BLUR_PX = 4


def out_of_range(
    field: str, value: float | None, least: float, most: float, *, above: bool = False
) -> Iterator[FieldViolation]:
    """A violation if the value is set and not within least … most; above: least itself does not count."""
    if value is None:
        return
    if not math.isfinite(value) or value > most or value < least or (above and value == least):
        accepted = f"above {_shown(least)} to {_shown(most)}" if above else f"{_shown(least)} to {_shown(most)}"
        yield FieldViolation(field, f"{_shown(value)} is out of range; accepted: {accepted}")


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def refuse_compiled(asked: Asked, model: ModelInfo) -> None:
    """Raises Fault (FAILED_PRECONDITION) for what changes layers of torch, of a model that runs as compiled graphs."""
    own_vae = asked.vae is not None and not asked.vae.name
    wanted = {
        "loras": bool(asked.loras),
        "image_prompts": bool(asked.image_prompts),
        "perturbed_attention": asked.perturbed_attention is not None,
        "freeu": asked.freeu is not None,
        "controls": bool(asked.controls) and "controls" not in model.features,
        "vae.tiled": own_vae and asked.vae is not None and asked.vae.tiled,
        "vae.upcast": own_vae and asked.vae is not None and asked.vae.upcast,
    }
    for field, is_wanted in wanted.items():
        if is_wanted and model.artifact:
            raise needs_torch(field, model)


def needs_torch(field: str, model: ModelInfo, what: str = "it") -> Fault:
    """The refusal of something that compiled models do not have."""
    description = (
        f"{what} changes layers of torch, and {model.name} runs as compiled graphs on {model.runtime}; leave it out, or"
        " load the model with runtime torch"
    )
    return Fault(
        FaultData(
            Kind.FAILED_PRECONDITION,
            "NEEDS_TORCH",
            f"{field}: {description}",
            fields=(FieldViolation(field, description),),
            metadata={"field": field, "model": model.name, "runtime": model.runtime},
        )
    )


def features(asked: Asked, model: ModelInfo) -> Iterator[FieldViolation]:
    """What the request sets and the model's family does not have."""
    wanted = {
        "image": asked.image is not None,
        "inpaint": asked.inpaint is not None,
        "outpaint": asked.outpaint is not None,
        "controls": bool(asked.controls),
        "image_prompts": bool(asked.image_prompts),
        "loras": bool(asked.loras),
        "hires": asked.hires is not None,
        "refiner": asked.refiner is not None,
        "perturbed_attention": asked.perturbed_attention is not None,
        "freeu": asked.freeu is not None,
        "clip_skip": bool(asked.clip_skip),
        "guidance_rescale": bool(asked.guidance_rescale),
        "variation": asked.variation is not None,
    }
    if "text" not in model.features and asked.image is None:
        yield FieldViolation("image", f"{model.name} ({model.pipeline}) starts from a picture: set image")
    for field, is_wanted in wanted.items():
        if is_wanted and field not in model.features:
            has = ", ".join(model.features) or "none of these"
            yield FieldViolation(field, f"{model.name} ({model.pipeline}) does not have it; it has: {has}")


def start(asked: Asked, step_count: int) -> Iterator[FieldViolation]:
    """Starting picture, strength, mask and edges, as far as no pixel has to be seen."""
    if asked.inpaint is not None and asked.outpaint is not None:
        yield FieldViolation("outpaint", "it goes with image alone; leave inpaint out, or paint twice")
    for field, value in (("inpaint", asked.inpaint), ("outpaint", asked.outpaint), ("strength", asked.strength)):
        if value is not None and asked.image is None:
            yield FieldViolation(field, "it needs a picture to start from: set image")
    yield from out_of_range("strength", asked.strength, 0, 1, above=True)
    strength = asked.strength
    if strength is not None and 0 < strength <= 1 and asked.image is not None and int(step_count * strength) < 1:
        least = math.ceil(1 / strength)
        yield FieldViolation(
            "strength",
            f"{strength:g} of {step_count} steps leaves none to paint; accepted: {1 / step_count:.3g} or more, or a"
            f" step_count of {least} or more",
        )
    if asked.inpaint is not None:
        yield from out_of_range("inpaint.blur_px", asked.inpaint.blur_px, 0, BLUR_MOST_PX)
        yield from out_of_range("inpaint.crop_padding_px", asked.inpaint.crop_padding_px, 0, CROP_PADDING_MOST_PX)
    if asked.outpaint is not None:
        yield from _outpaint(asked.outpaint)


def _outpaint(outpaint: AskedOutpaint) -> Iterator[FieldViolation]:
    sides = {field: getattr(outpaint, field) for field in ("left_px", "top_px", "right_px", "bottom_px")}
    negative = [field for field, side in sides.items() if side < 0]
    for field in negative:
        yield FieldViolation(f"outpaint.{field}", f"{sides[field]} is below 0; accepted: 0 or more")
    if not negative and not any(sides.values()):
        yield FieldViolation("outpaint", "all four sides are 0; set how many pixels to paint on at least one")
    yield from out_of_range("outpaint.blur_px", outpaint.blur_px, 0, BLUR_MOST_PX)
    if outpaint.fill == "original":
        yield FieldViolation("outpaint.fill", "beyond the edges there is no original; take SURROUNDINGS, NOISE or GREY")


def outpainted_sides(asked: Asked) -> tuple[int, int]:
    """Pixels that outpainting adds to width and height."""
    outpaint = asked.outpaint
    if outpaint is None:
        return 0, 0
    return outpaint.left_px + outpaint.right_px, outpaint.top_px + outpaint.bottom_px


def hires(
    asked: Asked, model: ModelInfo, settings: Settings, size: tuple[int, int], step_count: int
) -> tuple[Hires | None, list[FieldViolation]]:
    """The second pass over a first one of `size` pixels, and what is wrong with it."""
    wanted = asked.hires
    if wanted is None:
        return None, []
    violations: list[FieldViolation] = []
    if asked.inpaint is not None or asked.outpaint is not None:
        violations.append(
            FieldViolation("hires", "it does not go with inpaint or outpaint; enlarge the result in a second call")
        )
    violations += out_of_range("hires.scale", wanted.scale, 1, HIRES_SCALE_MOST, above=True)
    if (wanted.width is None) != (wanted.height is None):
        violations.append(FieldViolation("hires.width, hires.height", "set both or none"))
    elif wanted.width is not None and wanted.scale is not None:
        violations.append(
            FieldViolation("hires.scale", "it says the size that hires.width and height say too; set one of the two")
        )
    multiple, most = model.size_multiple, model.largest_side_px
    if wanted.width is not None and wanted.height is not None:
        width, height = wanted.width, wanted.height
        for field, side in (("hires.width", width), ("hires.height", height)):
            if side % multiple or side < multiple:
                violations.append(FieldViolation(field, f"{side} is not a multiple of {multiple}"))
    else:
        scale = wanted.scale if wanted.scale is not None and math.isfinite(wanted.scale) else 2.0
        width, height = (round(side * scale / multiple) * multiple for side in size)
    if most and max(width, height) > most:
        why = f"{model.name} was compiled for {model.runtime} with sides of up to {most} pixels"
        violations.append(FieldViolation("hires", f"{width}x{height} is too large: {why}"))
    if not violations:
        if width < size[0] or height < size[1] or (width, height) == size:
            violations.append(
                FieldViolation("hires", f"{width}x{height} is not larger than the first pass, {size[0]}x{size[1]}")
            )
        elif max(width, height) > settings.max_side_px or width * height > settings.max_pixels:
            violations.append(
                FieldViolation(
                    "hires",
                    f"{width}x{height} exceeds the limits: sides up to {settings.max_side_px},"
                    f" {settings.max_pixels} pixels in all",
                )
            )
    upscaler = wanted.upscaler or "lanczos"
    if upscaler not in UPSCALERS:
        violations.append(FieldViolation("hires.upscaler", f"one of: {', '.join(UPSCALERS)}"))
    violations += out_of_range("hires.step_count", wanted.step_count, 1, settings.max_step_count)
    violations += out_of_range("hires.strength", wanted.strength, 0, 1, above=True)
    steps = step_count if wanted.step_count is None else wanted.step_count
    strength = HIRES_STRENGTH if wanted.strength is None else wanted.strength
    if not violations and int(steps * strength) < 1:
        violations.append(
            FieldViolation(
                "hires.strength", f"{strength:g} of {steps} steps leaves none; accepted: {1 / steps:.3g} or more"
            )
        )
    if not violations and upscaler in LATENT_UPSCALERS and strength < LATENT_STRENGTH_LEAST:
        violations.append(
            FieldViolation(
                "hires.strength",
                f"{strength:g} leaves enlarged latents blurred; accepted with {upscaler}:"
                f" {LATENT_STRENGTH_LEAST:g} to 1, or take lanczos",
            )
        )
    if violations:
        return None, violations
    return Hires(width, height, upscaler, steps, strength), []  # type: ignore[arg-type]


def refiner(asked: Asked, model: ModelInfo) -> tuple[Refiner | None, list[FieldViolation]]:
    """The model that takes over; whether it fits is seen once it is loaded."""
    wanted = asked.refiner
    if wanted is None:
        return None, []
    violations: list[FieldViolation] = []
    if not wanted.model:
        violations.append(FieldViolation("refiner.model", "it is empty; name a model that ListModels shows"))
    elif wanted.model == model.name:
        violations.append(
            FieldViolation("refiner.model", f"{wanted.model} paints the first steps already; name another")
        )
    switch_at = wanted.switch_at
    if switch_at is not None and not 0 < switch_at < 1:
        violations.append(
            FieldViolation(
                "refiner.switch_at", f"{switch_at:g} is out of range; accepted: between 0 and 1, neither of them"
            )
        )
    if asked.inpaint is not None or asked.outpaint is not None:
        violations.append(FieldViolation("refiner", "it does not go with inpaint or outpaint"))
    if violations:
        return None, violations
    return Refiner(wanted.model, 0.8 if switch_at is None else switch_at), []


def refiner_unfit(model: ModelInfo, other: ModelInfo) -> FieldViolation | None:
    """Why one model cannot take over from another, None if it can."""
    if model.family != other.family:
        return FieldViolation(
            "refiner.model",
            f"{other.name} is a {other.pipeline} and cannot take over from {model.name}, a {model.pipeline}; name"
            " one of the same family",
        )
    return None


def knobs(asked: Asked, *, guided: bool) -> Iterator[FieldViolation]:
    """Guidance rescale, perturbed attention, FreeU, clip skip, variation, wildcard seed."""
    yield from out_of_range("guidance_rescale", asked.guidance_rescale, 0, 1)
    if asked.guidance_rescale and not guided:
        yield FieldViolation(
            "guidance_rescale", "there is nothing to rescale at guidance_scale 1 and below; use more than 1"
        )
    if (pag := asked.perturbed_attention) is not None:
        yield from out_of_range("perturbed_attention.scale", pag.scale, 0, PAG_SCALE_MOST, above=True)
        yield from out_of_range("perturbed_attention.adaptive_scale", pag.adaptive_scale, 0, PAG_SCALE_MOST)
    if (freeu := asked.freeu) is not None:
        for field in ("s1", "s2", "b1", "b2"):
            yield from out_of_range(f"freeu.{field}", getattr(freeu, field), 0, FREEU_MOST)
    yield from out_of_range("clip_skip", asked.clip_skip, 0, CLIP_SKIP_MOST)
    if (variation := asked.variation) is not None:
        yield from out_of_range("variation.seed", variation.seed, 0, SEED_MOST)
        yield from out_of_range("variation.strength", variation.strength, 0, 1)
    yield from out_of_range("wildcard_seed", asked.wildcard_seed, 0, SEED_MOST)
    for field in asked.unknown_enums:
        yield FieldViolation(field, "this service does not know that value; see its proto for those it knows")


def perturbed_attention(asked: Asked) -> PerturbedAttention | None:
    """With its defaults filled in."""
    wanted = asked.perturbed_attention
    if wanted is None:
        return None
    scale = 3.0 if wanted.scale is None else wanted.scale
    return PerturbedAttention(scale, 0.0 if wanted.adaptive_scale is None else wanted.adaptive_scale)


def freeu(asked: Asked) -> FreeU | None:
    """With its defaults filled in."""
    wanted = asked.freeu
    if wanted is None:
        return None
    given = {field: value for field in ("s1", "s2", "b1", "b2") if (value := getattr(wanted, field)) is not None}
    return FreeU(**given)
