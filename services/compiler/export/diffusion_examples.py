"""What the graphs of diffusion models are traced and verified with; the same every time."""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.compiler.export.diffusion_networks import UNet
from services.compiler.export.exported import repeated
from services.runtimes import diffusion_graphs as names
from services.runtimes.artifacts.manifest import Axis

# Chunks of a long prompt that are verified.
_CHUNKS_MOST = 2
_CPU = torch.device("cpu")
_PROMPTS = ("a red fox in the snow, oil on canvas", "", "three cups of tea on a wooden table", "grinning face")


class Example:
    """Inputs as they come while pictures are painted: prompts that were encoded, noise, a picture's latents."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.factor = int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        sample = denoiser.config.get("sample_size") or getattr(pipeline, "default_sample_size", None) or 64
        self.side = int(sample if isinstance(sample, int) else max(sample))
        self._denoiser = denoiser

    @property
    def token_axis(self) -> Axis:
        """Of the denoiser's prompt."""
        length = self._prompts[0].shape[1]
        has_t5 = hasattr(self._pipeline, "transformer")
        # A T5's embeddings come as one, those of CLIP alone in chunks.
        return Axis(names.TOKENS, length, length if has_t5 else _CHUNKS_MOST * length)

    def token_ids(self, component: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Of a text encoder."""
        tokenizer = getattr(self._pipeline, component.replace("text_encoder", "tokenizer"))
        length = sizes.get(names.TOKENS) if type(self._encoder(component)).__name__ == "T5EncoderModel" else None
        ids = tokenizer(
            list(_PROMPTS),
            padding="max_length",
            max_length=length or int(tokenizer.model_max_length),
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        return {names.INPUT_IDS: repeated(ids, sizes[names.BATCH])}

    def unet(self, network: UNet, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Of a U-Net; residuals as small as those of a ControlNet are."""
        config = self._denoiser.config
        rows = sizes[names.BATCH]
        feeds = {
            names.SAMPLE: noise(1, rows, config.in_channels, sizes[names.HEIGHT], sizes[names.WIDTH]),
            **self._told(sizes),
        }
        feeds |= conditions(config, rows, self._prompts[1])
        shapes = _residual_shapes(self._denoiser, sizes[names.HEIGHT], sizes[names.WIDTH])
        residuals = [0.05 * noise(2 + index, rows, *shape) for index, shape in enumerate(shapes)]
        inputs = [*map(names.down_residual, range(network.residual_count)), names.MID_RESIDUAL]
        return feeds | dict(zip(inputs, residuals, strict=True))

    def sd3(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Of Stable Diffusion 3's transformer."""
        rows, channels = sizes[names.BATCH], self._denoiser.config.in_channels
        return {
            names.HIDDEN_STATES: noise(1, rows, channels, sizes[names.HEIGHT], sizes[names.WIDTH]),
            **self._told(sizes),
            names.POOLED_PROJECTIONS: self._pooled(rows),
        }

    def flux(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Of Flux's transformer."""
        rows, patches, tokens = sizes[names.BATCH], sizes[names.PATCHES], sizes[names.TOKENS]
        told = self._told(sizes)
        side = max(1, round(patches**0.5))
        places = torch.arange(patches)
        feeds = {
            names.HIDDEN_STATES: noise(1, rows, patches, self._denoiser.config.in_channels),
            names.ENCODER_HIDDEN_STATES: told[names.ENCODER_HIDDEN_STATES],
            names.POOLED_PROJECTIONS: self._pooled(rows),
            names.TIMESTEP: told[names.TIMESTEP] / 1000,
            names.IMG_IDS: torch.stack([0 * places, places // side, places % side], dim=1).float(),
            names.TXT_IDS: torch.zeros(tokens, 3),
        }
        if self._denoiser.config.guidance_embeds:
            feeds[names.GUIDANCE] = torch.full((rows,), 3.5)
        return feeds

    def vae_encoder(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Smooth pictures."""
        size = sizes[names.PIXEL_HEIGHT], sizes[names.PIXEL_WIDTH]
        return {names.PIXELS: pictures(sizes[names.BATCH], *size) * 2 - 1}

    def vae_decoder(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The latents of smooth pictures."""
        size = sizes[names.HEIGHT] * self.factor, sizes[names.WIDTH] * self.factor
        pixels = pictures(sizes[names.BATCH], *size) * 2 - 1
        with torch.no_grad():
            return {names.LATENTS: self._pipeline.vae.encode(pixels).latent_dist.mode()}

    def _told(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        rows = sizes[names.BATCH]
        prompts = self._prompts[0]
        prompts = prompts[:, torch.arange(sizes[names.TOKENS]) % prompts.shape[1]]
        return {names.ENCODER_HIDDEN_STATES: repeated(prompts, rows), names.TIMESTEP: timesteps(rows)}

    def _pooled(self, rows: int) -> Tensor:
        pooled = self._prompts[1]
        assert pooled is not None
        return repeated(pooled, rows)

    @cached_property
    def _prompts(self) -> tuple[Tensor, Tensor | None]:
        """Some prompts as the pipeline encodes them: sequences [prompts, tokens, channels], pooled or None."""
        options: dict[str, Any] = {"prompt": list(_PROMPTS), "device": _CPU, "num_images_per_prompt": 1}
        kind = type(self._denoiser).__name__
        if kind == "UNet2DConditionModel":
            options["do_classifier_free_guidance"] = False
        elif kind == "SD3Transformer2DModel":
            options |= {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
        else:
            options["prompt_2"] = None
        with torch.no_grad():
            encoded = self._pipeline.encode_prompt(**options)
        if kind == "FluxTransformer2DModel":
            return encoded[0], encoded[1]
        # Prompt, negative prompt, and of models that have them the pooled ones likewise.
        return encoded[0], encoded[2] if len(encoded) > 2 else None

    def _encoder(self, component: str) -> Any:
        return getattr(self._pipeline, component)


def conditions(config: Any, rows: int, pooled: Tensor | None) -> dict[str, Tensor]:
    """What a U-Net or a ControlNet is told beside the prompt."""
    feeds = {}
    if (width := config.get("time_cond_proj_dim")) is not None:
        feeds[names.TIMESTEP_COND] = noise(90, rows, width)
    if config.get("addition_embed_type") == "text_time":
        numbers = config.projection_class_embeddings_input_dim
        if pooled is None:
            pooled = noise(91, rows, 1280 if numbers > 1280 else numbers - 6 * config.addition_time_embed_dim)
        count = (numbers - pooled.shape[-1]) // config.addition_time_embed_dim
        # Sizes and a crop, or of a refiner the aesthetics score that its pipeline asks for.
        times = [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0] if count == 6 else [1024.0, 1024.0, 0.0, 0.0, 6.0]
        feeds[names.TEXT_EMBEDS] = repeated(pooled, rows)
        feeds[names.TIME_IDS] = torch.tensor([times]).repeat(rows, 1)
    return feeds


def _residual_shapes(net: Any, height: int, width: int) -> list[tuple[int, int, int]]:
    """Channels, rows and columns of each skip connection of a U-Net, and of its middle."""
    channels = net.config.block_out_channels
    shapes = [(channels[0], height, width)]
    for block, wide in zip(net.down_blocks, channels, strict=True):
        shapes += [(wide, height, width)] * len(block.resnets)
        if block.downsamplers is not None:
            height, width = names.halved_size(height, 1), names.halved_size(width, 1)
            shapes.append((wide, height, width))
    return [*shapes, (channels[-1], height, width)]


def timesteps(rows: int) -> Tensor:
    """Early, late and in between, one a row."""
    return torch.tensor([999.0 - 271 * row % 999 for row in range(rows)])


def noise(seed: int, *shape: int) -> Tensor:
    """Of a standard deviation of 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth pictures in 0 to 1, [count, 3, height, width]."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
