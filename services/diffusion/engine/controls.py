"""ControlNets and T2I-Adapters: modules beside the denoiser that steer it by a picture. The model does not change."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from services.diffusion.adapters_catalog import ControlKind, KnownControl
from services.diffusion.engine import artifacts
from services.diffusion.engine.adapter_files import Unfit, Unusable, header_of, without_path
from services.diffusion.engine.artifacts import InUse, Wanted
from services.diffusion.settings import Settings
from services.kit.faults import Fault
from services.runtimes import graph_diffusion
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.graph_diffusion import class_name, is_compiled
from services.runtimes.hardware import detect
from services.runtimes.sessions.interface import SessionError
from services.runtimes.torch_speed import pack_convolutions

# Where a ControlNet's config says otherwise than the denoiser's, what it takes in or gives out has another shape.
_SAME: dict[str, tuple[str, ...]] = {
    "ControlNetModel": (
        "cross_attention_dim",
        "block_out_channels",
        "layers_per_block",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "class_embed_type",
        "encoder_hid_dim",
    ),
    "SD3ControlNetModel": (
        "in_channels",
        "patch_size",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "caption_projection_dim",
        "pooled_projection_dim",
    ),
    "FluxControlNetModel": (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    ),
}
_DENOISERS = {
    "ControlNetModel": "UNet2DConditionModel",
    "T2IAdapter": "UNet2DConditionModel",
    "SD3ControlNetModel": "SD3Transformer2DModel",
    "FluxControlNetModel": "FluxTransformer2DModel",
}


@dataclass(frozen=True, eq=False)
class LoadedControl:
    """A control in memory. condition_mode: how the picture that it looks at is coloured."""

    name: str
    kind: ControlKind
    module: nn.Module
    condition_mode: Literal["RGB", "L"]
    close: Callable[[], None] = lambda: None  # frees what it holds outside of Python's memory


def load(control: KnownControl, pipeline: Any, denoiser: Any, settings: Settings) -> LoadedControl:
    """Read a control and hold it against the model. Raises Unusable or Unfit.

    A ControlNet is run from an artifact that `inkwell use` chose for it, or that was measured to be faster than torch;
    else on torch, whatever its model runs on.
    """
    if control.kind is None:
        raise Unusable(control.trouble)
    name = control.class_name
    if (theirs := class_name(denoiser)) != _DENOISERS[name]:
        raise Unfit(f"it is a {name}, for models with a {_DENOISERS[name]}; this one has a {theirs}")
    if is_compiled(denoiser) and name != "ControlNetModel":
        raise Unusable(f"a {name} changes layers of torch, and the model runs as compiled graphs")
    model_class = getattr(diffusers, name)
    for file in sorted(control.folder.glob("*.safetensors")):
        header_of(file)
    # Before its weights are read, which may be as many as half the model's.
    differing = list(_differences(_config(model_class, control), name, pipeline, denoiser))
    if differing:
        raise Unfit("; ".join(differing))
    if (in_use := _artifact(control, denoiser, settings)) is not None:
        return _compiled(control, in_use)
    module = _read(model_class, control, denoiser.dtype).to(denoiser.device).eval()
    pack_convolutions(module, denoiser.device)
    if control.kind == "t2i_adapter":
        _check_features(module, pipeline, denoiser)
        channels = module.config.in_channels
    else:
        channels = module.config.get("conditioning_channels") or 3
    return LoadedControl(control.name, control.kind, module, "L" if channels == 1 else "RGB")


def _artifact(control: KnownControl, denoiser: Any, settings: Settings) -> InUse | None:
    # Graphs hand their numbers over on the CPU.
    if control.kind != "controlnet" or settings.runtime == "torch" or denoiser.device.type != "cpu":
        return None
    hardware = detect()
    try:
        stored = artifacts.find(control.name, control.folder, Wanted("auto"), settings, hardware)
        if stored is None:
            return None
        return artifacts.hold(stored, settings, hardware, f"diffusion service, control {control.name}")
    except (Fault, StoreError) as error:
        raise Unusable(f"its artifact cannot be used: {error}") from error


def _compiled(control: KnownControl, in_use: InUse) -> LoadedControl:
    try:
        module, close = graph_diffusion.open_controlnet(in_use.folder, in_use.stored.manifest, in_use.options)
    except BaseException as error:
        in_use.close()
        if isinstance(error, SessionError | ModelError):
            raise Unusable(f"its artifact {in_use.stored.id[:12]} cannot be used: {error}") from error
        raise
    in_use.close_with(close)
    channels = module.config.get("conditioning_channels") or 3
    return LoadedControl(control.name, "controlnet", module, "L" if channels == 1 else "RGB", in_use.close)


def _config(model_class: Any, control: KnownControl) -> dict[str, Any]:
    """The control's config, with the defaults of what it leaves out."""
    defaults = {name: one.default for name, one in inspect.signature(model_class.__init__).parameters.items()}
    own: dict[str, Any] = model_class.load_config(control.folder, local_files_only=True)
    return defaults | own


def _differences(config: dict[str, Any], class_name: str, pipeline: Any, denoiser: Any) -> Iterator[str]:
    """Each setting that decides a shape and is another than the model's, in words."""
    for key in _SAME.get(class_name, ()):
        theirs, ours = _plain(config.get(key)), _plain(denoiser.config.get(key))
        if theirs != ours:
            yield f"its {key} is {theirs}, this model's {ours}"
    if extra := config.get("extra_conditioning_channels"):
        yield f"it wants {extra} more channels of condition than a picture has, such as a mask"
    if class_name == "ControlNetModel":
        latents = pipeline.vae.config.latent_channels
        if config["in_channels"] != latents:
            yield f"it looks at {config['in_channels']} latent channels, this model has {latents}"
        # One convolution of its embedding after another halves the condition until it is as large as the latents.
        scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        ours = pipeline.vae_scale_factor
        if scale != ours:
            yield f"it shrinks the condition by {scale}, this model's latents are smaller by {ours}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(model_class: Any, control: KnownControl, dtype: torch.dtype) -> Any:
    try:
        module, told = model_class.from_pretrained(
            control.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise Unusable(f"{control.folder.name} cannot be loaded: {without_path(error, control.folder)}") from error
    if told["missing_keys"]:
        raise Unusable(f"{control.folder.name} lacks weights: {min(told['missing_keys'])}, …")
    return module


def _check_features(adapter: Any, pipeline: Any, unet: Any) -> None:
    """Raises Unfit unless what a T2I-Adapter makes of a picture has the shapes that the U-Net adds it to."""
    side = 2 * adapter.total_downscale_factor
    with torch.no_grad():
        made = adapter(torch.zeros(1, adapter.config.in_channels, side, side, dtype=unet.dtype, device=unet.device))
    theirs = [(feature.shape[1], feature.shape[2]) for feature in made]
    ours = list(_places(unet, side // pipeline.vae_scale_factor))
    if theirs[: len(ours)] != ours[: len(theirs)]:
        raise Unfit(
            f"of {side} pixels it makes features of channels x side {_by(theirs)}; this model adds them at {_by(ours)}"
        )


def _places(unet: Any, side: int) -> Iterator[tuple[int, int]]:
    """Channels and side of the hidden states that features are added to, for latents of this side."""
    for block, channels in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
        attends = getattr(block, "has_cross_attention", False)
        if attends:
            yield channels, side  # added before the block shrinks them
        if block.downsamplers is not None:
            side //= 2
        if not attends:
            yield channels, side


def _by(shapes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{channels}x{side}" for channels, side in shapes)
