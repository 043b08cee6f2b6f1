"""What a model's pipelines can do, as far as diffusers itself says: its task tables and the calls' signatures."""

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines import auto_pipeline

from services.diffusion.domain import Family, Feature
from services.runtimes.graph_diffusion import is_compiled

_FAMILIES: dict[str, Family] = {
    "stable-diffusion": "sd",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
}


def family_of(pipeline: Any) -> Family:
    """Which of the families a pipeline belongs to; models of one family can share adapters and refine each other."""
    return _FAMILIES.get(_kin(pipeline), "other")


def features_of(pipeline: Any, call_parameters: Mapping[str, Any], *, is_refiner: bool) -> tuple[Feature, ...]:
    """What a call may set for the model. call_parameters: of the pipeline's `__call__`."""
    kin = _kin(pipeline)
    from_image = kin in auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    if is_refiner:
        return ("image",) if from_image else ()
    inpainting = kin in auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING
    from_text = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    denoiser = getattr(pipeline, "unet", None)
    compiled = is_compiled(denoiser or getattr(pipeline, "transformer", None))
    found: dict[Feature, bool] = {
        "text": True,
        "image": from_image,
        "inpaint": inpainting,
        "outpaint": inpainting,
        "controls": f"{kin}-controlnet" in from_text,
        "image_prompts": "ip_adapter_image" in call_parameters,
        "loras": hasattr(pipeline, "load_lora_weights"),
        "hires": from_image,
        "refiner": family_of(pipeline) in ("sd", "sdxl"),
        "perturbed_attention": f"{kin}-pag" in from_text,
        "freeu": hasattr(pipeline, "enable_freeu") and hasattr(denoiser, "enable_freeu"),
        "clip_skip": "clip_skip" in call_parameters,
        "guidance_rescale": "guidance_rescale" in call_parameters,
        "variation": "latents" in call_parameters,
    }
    if compiled:
        # These change layers of torch. Graphs of U-Nets have inputs for what ControlNets add, transformers' have none.
        found |= dict.fromkeys(("image_prompts", "loras", "perturbed_attention", "freeu"), False)
        found["controls"] &= denoiser is not None
    return tuple(feature for feature, there in found.items() if there)


def _kin(pipeline: Any) -> str:
    """diffusers' own name for the kind of model that pipelines of one kind share, empty if it has none."""
    name = type(pipeline).__name__
    return str(auto_pipeline._get_model(name) or "")
