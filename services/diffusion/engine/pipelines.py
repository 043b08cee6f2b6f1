"""The diffusers pipeline that serves a picture: which class, made of the model's own parts, and what it can be told.

Nothing is loaded here. A pipeline of another class over the same parts costs about a millisecond to make.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers

from services.diffusion.domain import Parameters
from services.diffusion.engine import schedulers
from services.diffusion.engine.models import LoadedModel
from services.kit import faults

# Arguments that follow from a field of the request; a pipeline that does not take one must not be called without it.
_FIELDS = {
    "eta": "sampling.eta",
    "timesteps": "sampling.timesteps",
    "sigmas": "sampling.sigmas",
    "guidance_rescale": "guidance_rescale",
    "clip_skip": "clip_skip",
    "pag_scale": "perturbed_attention",
    "ip_adapter_image_embeds": "image_prompts",
    "control_image": "controls",
    "denoising_end": "refiner",
    "denoising_start": "refiner",
}


def open_pipeline(
    model: LoadedModel, *, from_image: bool = False, controlnets: Sequence[Any] = (), pag: bool = False
) -> Any:
    """A pipeline for one picture, with call state of its own and the model's scheduler still in it.

    Raises Fault (INVALID_ARGUMENT) where diffusers has no pipeline for the combination.
    """
    inpainting = from_image and is_inpainting(model)
    if not (from_image or controlnets or pag):
        return copy.copy(model.pipeline)
    options: dict[str, Any] = {}
    if controlnets:
        options["controlnet"] = controlnets[0] if len(controlnets) == 1 else list(controlnets)
    if pag:
        options["enable_pag"] = True
    auto = diffusers.AutoPipelineForText2Image
    if from_image:
        auto = diffusers.AutoPipelineForInpainting if inpainting else diffusers.AutoPipelineForImage2Image
    try:
        pipeline = auto.from_pipe(model.pipeline, **options)
    except ValueError:
        combined = [
            field
            for field, wanted in (("image", from_image), ("controls", controlnets), ("perturbed_attention", pag))
            if wanted
        ]
        raise faults.invalid_field(
            combined[-1],
            f"diffusers has no pipeline of {model.info.pipeline}'s family for {' with '.join(combined)}; leave one out",
            reason="COMBINATION_NOT_SUPPORTED",
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_inpainting(model: LoadedModel) -> bool:
    """Whether the denoiser was made for inpainting alone: it sees the mask and the masked picture as channels."""
    config: Any = model.denoiser.config
    latent_channels = model.pipeline.vae.config.latent_channels
    return bool(hasattr(model.pipeline, "unet") and config.in_channels == 2 * latent_channels + 1)


def sampling_arguments(parameters: Parameters, *, from_image: bool) -> dict[str, Any]:
    """What the sampling and guidance fields mean as arguments of a pipeline's call; only what was set."""
    pag = parameters.perturbed_attention
    arguments: dict[str, Any] = {
        "num_inference_steps": parameters.step_count,
        "guidance_scale": parameters.guidance_scale,
        **schedulers.pipeline_arguments(parameters.scheduler, parameters.sampling),
        "guidance_rescale": parameters.guidance_rescale or None,
        "clip_skip": parameters.clip_skip or None,
        "strength": parameters.strength if from_image else None,
    }
    if pag is not None:
        arguments |= {"pag_scale": pag.scale, "pag_adaptive_scale": pag.adaptive_scale}
    return {name: value for name, value in arguments.items() if value is not None}


def accepted(pipeline: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the pipeline's call takes.

    Raises Fault (INVALID_ARGUMENT) naming the request's field for one that was asked for and that it does not take.
    """
    known = inspect.signature(pipeline.__call__).parameters
    for name, field in _FIELDS.items():
        if arguments.get(name) is not None and name not in known:
            raise faults.invalid_field(
                field,
                f"{type(pipeline).__name__}, which this call needs, does not have it; leave it out",
                reason="COMBINATION_NOT_SUPPORTED",
            )
    return {name: value for name, value in arguments.items() if name in known}


def condition_argument(pipeline: Any) -> str:
    """What a ControlNet pipeline calls the condition: `image` where no picture to start from takes that name."""
    return "control_image" if "control_image" in inspect.signature(pipeline.__call__).parameters else "image"


def pack(pipeline: Any, latents: Any) -> Any:
    """Latents [1, channels, rows, columns] as the denoising loop of this pipeline holds them."""
    if not hasattr(pipeline, "_pack_latents"):
        return latents
    count, channels, rows, columns = latents.shape
    return pipeline._pack_latents(latents, count, channels, rows, columns)


def unpack(pipeline: Any, latents: Any, width: int, height: int) -> Any:
    """The inverse of `pack` for a picture of width x height pixels."""
    if not hasattr(pipeline, "_unpack_latents"):
        return latents
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
