"""From the parameters of a picture back to the options that paint it again."""

import hashlib
from collections.abc import Iterable

from inkwell import types
from inkwell.files import load


def repeat_options(
    parameters: types.GenerationParameters, pictures: Iterable[types.ImageSource] = ()
) -> types.PaintOptions:
    """Options with which `client.paint(parameters.prompt, **options)` paints the same picture.

    pictures: those that went into it (start, mask, conditions, image prompts) in any order; they are told apart by
        their SHA-256, for the parameters hold no more of them.
    Raises OSError, and ValueError naming the pictures that are missing.
    """
    found = {sha256(content): content for content in map(load, pictures)}
    missing: list[str] = []

    def picture(what: str, digest: str) -> bytes:
        if digest not in found:
            missing.append(f"{what} (SHA-256 {digest})")
        return found.get(digest, b"")

    options = settings(parameters)
    if parameters.image_sha256:
        options["image"] = picture("image", parameters.image_sha256)
    if parameters.inpaint is not None:
        options["inpaint"] = inpaint(parameters.inpaint, picture("inpaint.mask", parameters.inpaint.mask_sha256))
    options["controls"] = [
        control(each, picture(f"controls[{place}].image", each.image_sha256))
        for place, each in enumerate(parameters.controls)
    ]
    options["image_prompts"] = [
        image_prompt(each, picture(f"image_prompts[{place}].image", each.image_sha256))
        for place, each in enumerate(parameters.image_prompts)
    ]
    if missing:
        raise ValueError(f"pictures that went in are missing: {', '.join(missing)}")
    return options


def settings(parameters: types.GenerationParameters) -> types.PaintOptions:
    """All of them but those that hold pictures. Styles and wildcards are in the prompt already."""
    sampling = parameters.sampling
    by_hand = sampling is not None and bool(sampling.timesteps or sampling.sigmas)
    return types.PaintOptions(
        negative_prompt=parameters.negative_prompt,
        model=parameters.model,
        width=parameters.width,
        height=parameters.height,
        steps=None if by_hand else parameters.step_count,
        guidance_scale=parameters.guidance_scale,
        scheduler=parameters.scheduler,
        seed=parameters.seed,
        prompt_syntax=parameters.prompt_syntax,
        strength=parameters.strength,
        outpaint=parameters.outpaint,
        loras=parameters.loras,
        hires=parameters.hires,
        refiner=parameters.refiner,
        sampling=sampling,
        guidance_rescale=parameters.guidance_rescale,
        perturbed_attention=parameters.perturbed_attention,
        freeu=parameters.freeu,
        clip_skip=parameters.clip_skip,
        variation=parameters.variation,
        vae=parameters.vae,
    )


def inpaint(parameters: types.InpaintParameters, mask: types.PictureSource) -> types.Inpaint:
    """With the mask that the parameters know by its digest."""
    return types.Inpaint(mask, parameters.blur_px, parameters.inverted, parameters.crop_padding_px, parameters.fill)


def control(parameters: types.ControlParameters, image: types.PictureSource) -> types.Control:
    """With the image that the parameters know by its digest."""
    return types.Control(
        image, parameters.model, parameters.preprocessor, parameters.scale, parameters.start, parameters.end
    )  # fmt: skip


def image_prompt(parameters: types.ImagePromptParameters, image: types.PictureSource) -> types.ImagePrompt:
    """With the image that the parameters know by its digest."""
    return types.ImagePrompt(image, parameters.adapter, parameters.scale)


def sha256(content: bytes) -> str:
    """As the parameters name a picture: of its encoded bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
