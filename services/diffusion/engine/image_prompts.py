"""IP-Adapters: pictures that say, beside the prompt, what to paint.

diffusers puts an IP-Adapter into a U-Net for good: other attention processors, a projection, a switch in its config.
Here that is done once, what came of it is kept, and the U-Net is set back; an overlay puts it in for a picture's turns.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from services.diffusion.engine.adapter_files import Unfit, Unusable, header_of, without_path
from services.runtimes.safetensors_files import Tensor as Described

PROJECTION = "image_proj."
ATTENTION = "ip_adapter."
_TOKENS = 4  # that a plain IP-Adapter makes of a picture


@dataclass(eq=False)
class ImageEncoder:
    """A CLIP vision model and the processor of its pictures."""

    model: Any
    processor: Any


# A large model that several adapters, and models, share for as long as one of them is loaded.
_encoders: weakref.WeakValueDictionary[tuple[str, torch.dtype, torch.device], ImageEncoder]
_encoders = weakref.WeakValueDictionary()


@dataclass(eq=False)
class ImagePromptSet:
    """One or several IP-Adapters that a U-Net listens to together, as they stand in it. The same may stand twice.

    processors: by the name of the attention layer.
    """

    encoders: tuple[ImageEncoder, ...]
    processors: dict[str, Any]
    projection: nn.Module

    def scale(self, scales: Sequence[float]) -> None:
        """How much each adapter counts from now on."""
        for processor in self.processors.values():
            if hasattr(processor, "scale"):
                processor.scale = list(scales)

    def embeds(self, pipeline: Any, images: Sequence[Image.Image], *, guided: bool) -> list[Tensor]:
        """What the pipeline's call takes as ip_adapter_image_embeds: [1 or 2, 1, …] an adapter, negative first.

        images: one an adapter. guided: whether the call uses classifier-free guidance. Needs no turn of its own.
        """
        own = copy.copy(pipeline)
        embeds = []
        layers: Any = self.projection.image_projection_layers
        for encoder, layer, image in zip(self.encoders, layers, images, strict=True):
            # Set around the pipeline's bookkeeping: a safety checker keeps its own processor.
            own.__dict__.update(image_encoder=encoder.model, feature_extractor=encoder.processor)
            positive, negative = own.encode_image(
                image, encoder.model.device, 1, not isinstance(layer, ImageProjection)
            )
            embeds.append(torch.stack([negative, positive]) if guided else positive[None])
        return embeds


def load(pipeline: Any, adapters: Sequence[tuple[Path, str]]) -> ImagePromptSet:
    """Read IP-Adapters, each a file and the folder of its image encoder; the pipeline's U-Net is left as it was.

    Raises Unfit or Unusable. What lies over the U-Net must have been taken off.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None or not isinstance(pipeline, IPAdapterMixin):
        raise Unfit(f"{type(pipeline).__name__} takes no IP-Adapter here; models with a U-Net do")
    headers = [_checked(unet, file) for file, _ in adapters]
    encoders = tuple(_encoder(folder, unet.dtype, unet.device) for _, folder in adapters)
    for header, encoder in zip(headers, encoders, strict=True):
        _check_encoder(header, encoder)
    states = [_state(file) for file, _ in adapters]
    before = unet.attn_processors
    projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
    own = copy.copy(pipeline)
    own.__dict__["feature_extractor"] = encoders[0].processor
    try:
        own.load_ip_adapter(
            states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
        )
        after = unet.attn_processors
        return ImagePromptSet(encoders, {name: after[name] for name in before}, unet.encoder_hid_proj.eval())
    except (RuntimeError, ValueError, KeyError) as error:
        raise Unusable(f"diffusers cannot load it: {error}") from error
    finally:
        unet.encoder_hid_proj = projection  # first, for a projection may have attention processors of its own
        unet.config.encoder_hid_dim_type = kind
        unet.set_attn_processor(before)


def _state(file: Path) -> dict[str, dict[str, Tensor]]:
    tensors = load_file(file)
    return {
        prefix.rstrip("."): {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
        for prefix in (PROJECTION, ATTENTION)
    }


def _checked(unet: Any, file: Path) -> dict[str, Described]:
    """The file's header. Raises Unfit unless it has a layer for each cross-attention of the U-Net, of its shape."""
    header = header_of(file)
    if not any(name.startswith(PROJECTION) for name in header) or not any(
        name.startswith(ATTENTION) for name in header
    ):
        raise Unusable("it is no IP-Adapter: it needs tensors under image_proj and ip_adapter")
    faces = f"{PROJECTION}norm.weight" in header and f"{PROJECTION}proj.0.weight" in header and not _is_full(header)
    if faces or any("_lora." in name or "perceiver_resampler." in name for name in header):
        raise Unusable("it is a FaceID adapter, which looks at embeddings of faces and not at pictures")
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    theirs = sum(name.startswith(ATTENTION) and name.endswith(".to_k_ip.weight") for name in header)
    if theirs != len(layers):
        raise Unfit(f"it has {theirs} cross-attention layers and this model {len(layers)}")
    for number, layer in enumerate(layers):
        attention = unet.get_submodule(layer)
        ours = (attention.inner_dim, unet.config.cross_attention_dim)
        for side in ("to_k_ip", "to_v_ip"):
            name = f"{ATTENTION}{2 * number + 1}.{side}.weight"
            if name not in header:
                raise Unusable(f"it is no IP-Adapter that diffusers knows: it has no {name}")
            if header[name].shape != ours:
                shape = "x".join(map(str, header[name].shape))
                raise Unfit(f"its {name} is {shape}; this model's {layer} takes {ours[0]}x{ours[1]}")
    width = _output_width(header)
    if width != unet.config.cross_attention_dim:
        raise Unfit(f"it projects pictures to a width of {width}; this model takes {unet.config.cross_attention_dim}")
    return header


def _is_full(header: dict[str, Described]) -> bool:
    return f"{PROJECTION}proj.3.weight" in header


def _output_width(header: dict[str, Described]) -> int:
    if f"{PROJECTION}proj.weight" in header:
        return header[f"{PROJECTION}proj.weight"].shape[0] // _TOKENS
    for name in ("proj.3.weight", "proj_out.weight"):
        if f"{PROJECTION}{name}" in header:
            return header[f"{PROJECTION}{name}"].shape[0]
    raise Unusable("it has no projection of pictures that diffusers knows")


def _check_encoder(header: dict[str, Described], encoder: ImageEncoder) -> None:
    """Raises Unfit unless the adapter takes in what the image encoder gives out."""
    config = encoder.model.config
    for name, kind in (
        ("proj.weight", "projection_dim"),
        ("proj.0.weight", "hidden_size"),
        ("proj_in.weight", "hidden_size"),
    ):
        tensor = header.get(f"{PROJECTION}{name}")
        if tensor is not None:
            theirs, ours = tensor.shape[-1], getattr(config, kind)
            if theirs != ours:
                raise Unfit(f"it was trained with an image encoder of {kind} {theirs}; the one set for it has {ours}")
            return


def _encoder(folder: str, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    place = Path(folder).expanduser()
    key = (str(place), dtype, device)
    if (known := _encoders.get(key)) is not None:
        return known
    try:
        model, told = CLIPVisionModelWithProjection.from_pretrained(
            place, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Unusable(f"its image encoder {place.name} cannot be loaded: {without_path(error, place)}") from error
    if told["missing_keys"]:
        raise Unusable(f"its image encoder {place.name} lacks weights: {min(told['missing_keys'])}, …")
    side = model.config.image_size
    encoder = ImageEncoder(
        model.to(device).eval(),
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
    )
    _encoders[key] = encoder
    return encoder
