"""A model in memory: its pipeline, what goes with it, and how it describes itself."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import torch
from torch import nn

from services.diffusion.domain import ModelInfo, Sampling
from services.diffusion.engine import attention, decoding, features, lanes
from services.diffusion.engine.artifacts import InUse
from services.diffusion.engine.conditioning import Conditioner
from services.diffusion.engine.previews import Previews
from services.diffusion.engine.schedulers import Schedulers
from services.diffusion.settings import ModelSettings
from services.runtimes import diffusion_graphs, graph_diffusion, model_version, torch_speed, tuning
from services.runtimes import diffusion_sources as sources
from services.runtimes import torch_diffusion as loading
from services.runtimes.artifacts.manifest import Manifest
from services.runtimes.artifacts.store import Stored
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
        self,
        name: str,
        row: ModelSettings,
        hardware: Hardware,
        dtype: torch.dtype,
        source: Source | None = None,
        in_use: InUse | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        """source: what `sources.find` answered for the row; it is looked for when None.

        in_use: an artifact to run it from, instead of the checkpoint; it is closed with the model, and if this fails.
        compiles: have torch.compile make the denoiser faster. Raises ModelError, and SessionError for an artifact.
        """
        self.name = name
        # Graphs place themselves; what goes between them and beside them is on the CPU.
        self.device = torch.device(hardware.device if in_use is None else "cpu")
        self._dtype = dtype
        self._hardware, self._compiles = hardware, compiles
        self._row = row
        self._in_use = in_use
        self._vaes: dict[str, Any] = {}
        try:
            self._load(source)
        except BaseException as error:
            self.close()
            if isinstance(error, ModelError):
                raise type(error)(f"model {name}: {error}") from error
            raise

    def _load(self, source: Source | None) -> None:
        _check_vaes(self._row)
        if self._in_use is None:
            source = source or sources.find(self._row.source, self._row.config)
            self.pipeline = loading.load(source, self._dtype, self.device)
            tuning.lay_out(self._modules(), self._hardware, self._dtype)
        else:
            source = self._open_graphs(self._in_use)
        self.index = source.index
        self._prepare(source)

    def _open_graphs(self, in_use: InUse) -> Source:
        manifest = in_use.stored.manifest
        source = graph_diffusion.find(in_use.folder, manifest)
        self.pipeline, close = graph_diffusion.open_pipeline(in_use.folder, manifest, source, in_use.options)
        in_use.close_with(close)
        return source

    def _prepare(self, source: Source) -> None:
        self.pipeline.set_progress_bar_config(disable=True)
        self.call_parameters = inspect.signature(self.pipeline.__call__).parameters
        self.denoiser = self._find_denoiser()
        if self._compiles:
            tuning.compile_forward(self.denoiser, self._hardware)
        elif self._in_use is None:
            attention.quicken(self.denoiser)
            torch_speed.pack_convolutions(self.denoiser, self.device)
            torch_speed.pack_convolutions(self.pipeline.vae, self.device)
        self.preview = self._load_preview(source.folder)
        with loading.BUILDING:  # noise schedules are made of numbers of torch's default type
            self._schedulers = Schedulers(self.pipeline.scheduler)
        self.info = self._describe(source)
        self.conditioner = Conditioner(self.pipeline)
        self.previews = Previews(self.pipeline.vae, self.preview, _pixels_a_latent(self.pipeline.vae))
        lanes.open_gate(self.denoiser)
        decoding.open_gate(self.pipeline.vae)

    def close(self) -> None:
        """Free what it holds outside of Python's memory; it may not be used after it."""
        if self._in_use is not None:
            self._in_use.close()

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
            torch_speed.pack_convolutions(vae, self.device)
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
        manifest = self._in_use.stored.manifest if self._in_use is not None else None
        return ModelInfo(
            name=self.name,
            pipeline=type(self.pipeline).__name__,
            dtype=_float_type(manifest) if manifest is not None else str(self._dtype).removeprefix("torch."),
            parameter_count=sum(weight.numel() for part in self._modules() for weight in part.parameters())
            + _parameters(manifest),
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
            file_bytes=source.file_bytes + (manifest.weight_bytes if manifest is not None else 0),
            runtime=manifest.runtime if manifest is not None else f"torch {torch.__version__}",
            precision=manifest.precision if manifest is not None else str(self._dtype).removeprefix("torch."),
            artifact=self._in_use.stored.id if self._in_use is not None else "",
            version=model_version.of_artifact(self._in_use.stored.id)
            if self._in_use is not None
            else model_version.of_checkpoint(source.file or source.folder),
            largest_side_px=_largest_side_px(manifest, _pixels_a_latent(self.pipeline.vae)),
            memory_bytes=sum(
                weight.numel() * weight.element_size()
                for part in held
                for weight in (*part.parameters(), *part.buffers())
            )
            + (manifest.weight_bytes if manifest is not None else 0),
        )


def needed_bytes(row: ModelSettings, source: Source, dtype: torch.dtype, stored: Stored | None = None) -> int:
    """Memory that the model's weights will take, its other VAEs included. Raises ModelError.

    source: the checkpoint. stored: the artifact that it is run from instead.
    """
    if stored is not None:
        beside = [size for size in stored.manifest.files if size.path.endswith(".safetensors")]
        kept = sum(file.size_bytes for file in beside)
        return stored.manifest.weight_bytes + kept + _check_vaes(row) * torch.float32.itemsize
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


def _float_type(manifest: Manifest) -> str:
    """Data type of an artifact's weights that are not rounded to integers."""
    return manifest.precision if manifest.precision in ("bfloat16", "float16") else "float32"


def _parameters(manifest: Manifest | None) -> int:
    """Of the networks that are graphs. Raises ModelError."""
    if manifest is None:
        return 0
    try:
        return msgspec.convert(manifest.details, diffusion_graphs.Details).parameter_count
    except msgspec.ValidationError as error:
        raise ModelError(f"the artifact's details are not those of a diffusion model: {error}") from error


def _largest_side_px(manifest: Manifest | None, pixels_a_latent: int) -> int:
    """Side of the largest picture that the graphs take; 0 for any: other runtimes than these take every size."""
    if manifest is None or manifest.target not in ("tensorrt", "triton"):
        return 0
    decoder = manifest.graph(diffusion_graphs.VAE_DECODER)
    axes = decoder.axes if decoder is not None else ()
    return min((axis.high * pixels_a_latent for axis in axes if axis.name != diffusion_graphs.BATCH), default=0)


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
