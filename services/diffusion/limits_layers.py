"""Judges what a request lays on its model by name: controls, image prompts, LoRAs, another VAE."""

from collections.abc import Iterator, Mapping, Sequence

from services.diffusion import adapters_catalog, preprocessor_table
from services.diffusion.adapters_catalog import Known
from services.diffusion.domain import Asked, Control, ImagePrompt, Lora, ModelInfo
from services.diffusion.limits_modes import needs_torch, out_of_range
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.faults import FieldViolation

SCALE_MOST = 2.0
LORA_WEIGHT_MOST = 4.0


def counts(asked: Asked, settings: Settings) -> Iterator[FieldViolation]:
    """Numbers of things and their ranges, before any name is looked up."""
    for field, given, most in (
        ("controls", len(asked.controls), settings.max_controls),
        ("image_prompts", len(asked.image_prompts), settings.max_image_prompts),
        ("loras", len(asked.loras), settings.max_loras),
    ):
        if given > most:
            yield FieldViolation(field, f"{given} are more than the limit of {most}")
    for index, control in enumerate(asked.controls[: settings.max_controls]):
        place = f"controls[{index}]"
        yield from out_of_range(f"{place}.scale", control.scale, 0, SCALE_MOST)
        yield from out_of_range(f"{place}.start", control.start, 0, 1)
        yield from out_of_range(f"{place}.end", control.end, 0, 1)
        start, end = control.start or 0.0, 1.0 if control.end is None else control.end
        if start >= end:
            yield FieldViolation(f"{place}.end", f"{end:g} is not after the start, {start:g}; start must be below end")
    for index, prompt in enumerate(asked.image_prompts[: settings.max_image_prompts]):
        yield from out_of_range(f"image_prompts[{index}].scale", prompt.scale, 0, SCALE_MOST)
    for index, lora in enumerate(asked.loras[: settings.max_loras]):
        yield from out_of_range(f"loras[{index}].weight", lora.weight, -LORA_WEIGHT_MOST, LORA_WEIGHT_MOST)


def vae(asked: Asked, model: ModelInfo) -> Iterator[FieldViolation]:
    """A VAE that the model does not have."""
    if asked.vae is not None and asked.vae.name and asked.vae.name not in model.vaes:
        there = ", ".join(model.vaes) or "none"
        yield FieldViolation("vae.name", f"{model.name} has no VAE {asked.vae.name[:80]!r}; it has: {there}")


def controls(asked: Asked, model: ModelInfo, settings: Settings, digests: Sequence[str]) -> tuple[Control, ...]:
    """The controls with their defaults. Raises Fault for a name that is not known or does not fit the model."""
    known = adapters_catalog.known_controls(settings) if asked.controls else {}
    preprocessors = preprocessor_table.names(settings)
    found = []
    for index, (control, digest) in enumerate(zip(asked.controls, digests, strict=True)):
        place = f"controls[{index}]"
        name = _name(control.model, known, model, "control", f"{place}.model")
        if control.preprocessor and control.preprocessor not in preprocessors:
            raise faults.not_found("preprocessor", control.preprocessor, preprocessors, field=f"{place}.preprocessor")
        found.append(
            Control(
                model=name,
                image_sha256=digest,
                preprocessor=control.preprocessor,
                scale=1.0 if control.scale is None else control.scale,
                start=control.start or 0.0,
                end=1.0 if control.end is None else control.end,
            )
        )
    for index, one in enumerate(found):
        if model.artifact and known[one.model].kind == "t2i_adapter":
            raise needs_torch(f"controls[{index}].model", model, "a T2I-Adapter")
    if len({known[control.model].kind for control in found}) > 1:
        raise faults.invalid_field("controls", "ControlNets and T2I-Adapters do not go into one call; take one kind")
    return tuple(found)


def image_prompts(
    asked: Asked, model: ModelInfo, settings: Settings, digests: Sequence[str]
) -> tuple[ImagePrompt, ...]:
    """The image prompts with their defaults. Raises Fault as `controls` does."""
    known = adapters_catalog.known_image_prompt_adapters(settings) if asked.image_prompts else {}
    return tuple(
        ImagePrompt(
            _name(prompt.adapter, known, model, "adapter", f"image_prompts[{index}].adapter"),
            digest,
            1.0 if prompt.scale is None else prompt.scale,
        )
        for index, (prompt, digest) in enumerate(zip(asked.image_prompts, digests, strict=True))
    )


def loras(asked: Asked, from_prompt: Sequence[Lora], model: ModelInfo, settings: Settings) -> tuple[Lora, ...]:
    """Those of the field, then those of the prompt; the weights of one that is named twice add up.

    Raises Fault as `controls` does.
    """
    known = adapters_catalog.known_loras(settings) if asked.loras or from_prompt else {}
    given = [
        (f"loras[{index}].name", lora.name, 1.0 if lora.weight is None else lora.weight)
        for index, lora in enumerate(asked.loras)
    ]
    given += [("prompt", lora.name, lora.weight) for lora in from_prompt]
    if given and model.artifact:
        raise needs_torch(given[0][0], model, "a LoRA")
    weights: dict[str, float] = {}
    for field, name, weight in given:
        found = _name(name, known, model, "lora", field, may_be_empty=False)
        weights[found] = weights.get(found, 0.0) + weight
    for name, weight in weights.items():
        if abs(weight) > LORA_WEIGHT_MOST:
            raise faults.invalid_field(
                "loras", f"the weight of {name}, {weight:g}, is out of range; accepted: -{LORA_WEIGHT_MOST:g} to 4"
            )
    if len(weights) > settings.max_loras:
        raise faults.invalid_field("loras", f"{len(weights)} are more than the limit of {settings.max_loras}")
    return tuple(Lora(name, weight) for name, weight in weights.items())


def _name(
    name: str, known: Mapping[str, Known], model: ModelInfo, kind: str, field: str, *, may_be_empty: bool = True
) -> str:
    """The name that is meant, which is known and fits the model. An empty one means the only one that fits."""
    fitting = adapters_catalog.fitting(known, model.name)
    if not name:
        if may_be_empty and len(fitting) == 1:
            return next(iter(fitting))
        there = ", ".join(sorted(fitting)) or "none"
        raise faults.invalid_field(field, f"it is empty; name one of those that fit {model.name}: {there}")
    one = known.get(name)
    if one is None:
        raise faults.not_found(kind, name, fitting, field=field)
    if one.trouble:
        raise faults.failed_precondition(
            f"{kind.upper()}_UNUSABLE", f"{field}: {name} cannot be used: {one.trouble}", field=field, name=name
        )
    if not one.fits(model.name):
        raise faults.invalid_field(
            field, f"{name} is for {', '.join(one.models)}, not for {model.name}", reason=f"{kind.upper()}_UNFIT"
        )
    return name
