"""A model in memory: its pipeline, what goes with it, and how it describes itself."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from services.diffusion.domain import ModelInfo, Sampling
from services.diffusion.engine import decoding, features, lanes
from services.diffusion.engine.conditioning import Conditioner
from services.diffusion.engine.previews import Previews
from services.diffusion.engine.schedulers import Schedulers
from services.diffusion.settings import ModelSettings
from services.runtimes import diffusion_sources as sources
from services.runtimes import torch_diffusion as loading
from services.runtimes.diffusion_sources import ModelError, Source
from services.runtimes.hardware import Hardware

PREVIEW_FOLDER = "preview_autoencoder"
# Tokenizers without a limit of their own say some huge number.
_TOKEN_LIMIT_MOST = 100_000


class LoadedModel:
    """A pipeline on its device, with what the engine needs to know about it.

    pipeline: paints from text; a refiner's starts from a picture. index: the folder's model_index.json.
    """

    def __init__(
        self, name: str, row: ModelSettings, hardware: Hardware, dtype: torch.dtype, source: Source | None = None
    ) -> None:
        """Raises ModelError. source: what `sources.find` answered for the row; it is looked for when None."""
        self.name = name
        self.device = torch.device(hardware.device)
        self._dtype = dtype
        self._row = row
        self._vaes: dict[str, Any] = {}
        try:
            source = source or sources.find(row.source, row.config)
            _check_vaes(row)
            self.index = source.index
            self.pipeline = loading.load(source, dtype, self.device)
            self.pipeline.set_progress_bar_config(disable=True)
            self.call_parameters = inspect.signature(self.pipeline.__call__).parameters
            self.denoiser = self._find_denoiser()
            self.preview = self._load_preview(source.folder)
        except ModelError as error:
            raise type(error)(f"model {name}: {error}") from error
        with loading.BUILDING:  # noise schedules are made of numbers of torch's default type
            self._schedulers = Schedulers(self.pipeline.scheduler)
        self.info = self._describe(source)
        self.conditioner = Conditioner(self.pipeline)
        self.previews = Previews(self.pipeline.vae, self.preview, _pixels_a_latent(self.pipeline.vae))
        lanes.open_gate(self.denoiser)
        decoding.open_gate(self.pipeline.vae)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._dtype

    def scheduler(self, name: str, step_count: int, sampling: Sampling) -> Any:
        """A scheduler for one pass of one picture. Raises KeyError for a name that is not fit."""
        return self._schedulers.make(name, step_count, sampling)

    def vae(self, name: str) -> Any:
        """The other VAE of that name in the model's row, loaded when it is first asked for.

        Raises KeyError for a name that is not in `info.vaes`, ModelError for one that cannot decode this model's
        latents or cannot be loaded.
        """
        if name not in self._vaes:
            folder = Path(self._row.vaes[name]).expanduser()
            what = f"vaes.{name}"
            try:
                vae = loading.load_module(
                    diffusers.AutoencoderKL, folder, what=what, dtype=self._dtype, device=self.device
                )
                self._check_vae(vae, what)
            except ModelError as error:
                raise ModelError(f"model {self.name}: {error}") from error
            decoding.open_gate(vae)
            self._vaes[name] = vae
        return self._vaes[name]

    def _find_denoiser(self) -> nn.Module:
        denoiser = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        if not isinstance(denoiser, nn.Module) or "callback_on_step_end" not in self.call_parameters:
            raise ModelError(f"{type(self.pipeline).__name__} has no unet or transformer that denoises step by step")
        return denoiser

    def _load_preview(self, folder: Path) -> Any:
        """The small autoencoder that previews are decoded with, None if the model has none."""
        what = PREVIEW_FOLDER
        if self._row.preview_autoencoder is not None:
            place = Path(self._row.preview_autoencoder).expanduser()
        elif (folder / PREVIEW_FOLDER).is_dir():
            place = folder / PREVIEW_FOLDER
        else:
            return None
        preview = loading.load_module(
            diffusers.AutoencoderTiny, place, what=what, dtype=self._dtype, device=self.device
        )
        channels = self.pipeline.vae.config.latent_channels
        if preview.config.latent_channels != channels:
            raise ModelError(
                f"{what}: {place} decodes {preview.config.latent_channels} latent channels, the model has {channels}"
            )
        try:
            # Folders whose layer widths differ load without complaint and fail only here.
            preview.decode(torch.zeros(1, channels, 8, 8, dtype=self._dtype, device=self.device))
        except RuntimeError as error:
            raise ModelError(f"{what}: {place} does not decode: {error}") from error
        return preview

    def _check_vae(self, vae: Any, what: str) -> None:
        own = self.pipeline.vae
        channels, wanted = vae.config.latent_channels, own.config.latent_channels
        if channels != wanted:
            raise ModelError(f"{what} decodes {channels} latent channels, the model has {wanted}")
        scale, wanted = _pixels_a_latent(vae), _pixels_a_latent(own)
        if scale != wanted:
            raise ModelError(f"{what} makes {scale} pixels of a latent, the model's own VAE {wanted}")

    def _modules(self) -> Iterator[nn.Module]:
        yield from (part for part in self.pipeline.components.values() if isinstance(part, nn.Module))

    def _describe(self, source: Source) -> ModelInfo:
        width, height, multiple = _sizes(self.pipeline, self.denoiser)
        held = [*self._modules(), *([self.preview] if self.preview is not None else [])]
        return ModelInfo(
            name=self.name,
            pipeline=type(self.pipeline).__name__,
            dtype=str(self._dtype).removeprefix("torch."),
            parameter_count=sum(weight.numel() for part in self._modules() for weight in part.parameters()),
            default_width=width,
            default_height=height,
            size_multiple=multiple,
            default_step_count=self._row.default_step_count,
            default_guidance_scale=self._row.default_guidance_scale,
            default_scheduler=self._schedulers.default,
            prompt_token_limit=_token_limit(self.pipeline, self.call_parameters),
            has_preview_autoencoder=self.preview is not None,
            schedulers=self._schedulers.fit,
            unfit_schedulers=self._schedulers.unfit,
            family=features.family_of(self.pipeline),
            features=features.features_of(
                self.pipeline, self.call_parameters, is_refiner=sources.is_refiner(self.index)
            ),
            vaes=tuple(self._row.vaes),
            file_bytes=source.file_bytes,
            memory_bytes=sum(
                weight.numel() * weight.element_size()
                for part in held
                for weight in (*part.parameters(), *part.buffers())
            ),
        )


def needed_bytes(row: ModelSettings, source: Source, dtype: torch.dtype) -> int:
    """Memory that the model's weights will take, its other VAEs included. Raises ModelError."""
    numbers = source.number_count + _check_vaes(row)
    for place in (row.preview_autoencoder, source.folder / PREVIEW_FOLDER):
        if place is not None and Path(place).expanduser().is_dir():
            numbers += sources.check_module_folder(Path(place).expanduser(), PREVIEW_FOLDER)
            break
    return numbers * dtype.itemsize


def _check_vaes(row: ModelSettings) -> int:
    """Numbers in the other VAEs of a row. Raises ModelError for a folder that has none, though it is needed later."""
    return sum(
        sources.check_module_folder(Path(folder).expanduser(), f"vaes.{name}") for name, folder in row.vaes.items()
    )


def choose_dtype(wanted: str, hardware: Hardware) -> torch.dtype:
    """The data type that the setting means on this hardware."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if hardware.label in ("cuda", "rocm"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def _pixels_a_latent(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _sizes(pipeline: Any, denoiser: Any) -> tuple[int, int, int]:
    """Default width and height, and what both must be multiples of, all in pixels."""
    factor = int(getattr(pipeline, "vae_scale_factor", 8))
    sample = getattr(pipeline, "default_sample_size", None) or denoiser.config.sample_size
    rows, columns = (sample, sample) if isinstance(sample, int) else (int(sample[0]), int(sample[1]))
    if hasattr(pipeline, "unet"):
        multiple = max(8, factor)  # the pipelines themselves demand 8
    else:
        patch = denoiser.config.get("patch_size") or 1
        # Pipelines that pack latents two by two say patch size 1.
        multiple = max(8, factor * max(patch, 2))
    return columns * factor, rows * factor, multiple


def _tokenizers(pipeline: Any) -> list[Any]:
    found = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _widest_tokenizer(pipeline: Any) -> Any:
    # A model with a short-sighted and a long-sighted text encoder takes in what the latter can see.
    return max(_tokenizers(pipeline), key=lambda tokenizer: tokenizer.model_max_length, default=None)


def _token_limit(pipeline: Any, call_parameters: Any) -> int:
    tokenizer = _widest_tokenizer(pipeline)
    if tokenizer is None:
        return 0
    limit = int(min(tokenizer.model_max_length, _TOKEN_LIMIT_MOST))
    if "max_sequence_length" in call_parameters:
        own = call_parameters["max_sequence_length"].default
        limit = min(limit, own) if isinstance(own, int) else limit
    return limit - int(tokenizer.num_special_tokens_to_add())
