"""Loads diffusers pipelines from folders or pinned hub revisions, and describes them."""

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from services.diffusion.domain import ModelInfo
from services.diffusion.engine import lanes
from services.diffusion.engine.schedulers import Schedulers
from services.diffusion.settings import ModelSettings
from services.runtimes.hardware import Hardware

PREVIEW_FOLDER = "preview_autoencoder"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
# Tokenizers without a limit of their own say some huge number.
_TOKEN_LIMIT_MOST = 100_000


class ModelError(Exception):
    """A model of the table cannot be served; the message says which and why."""


class LoadedModel:
    """A pipeline on its device, with what the engine needs to know about it."""

    def __init__(self, name: str, row: ModelSettings, hardware: Hardware, dtype: torch.dtype) -> None:
        self.name = name
        self.device = torch.device(hardware.device)
        self.pipeline = _load_pipeline(name, row.source, dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        denoiser = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        self.call_parameters = inspect.signature(self.pipeline.__call__).parameters
        if not isinstance(denoiser, nn.Module) or "callback_on_step_end" not in self.call_parameters:
            raise ModelError(
                f"model {name}: {type(self.pipeline).__name__} has no unet or transformer that denoises step by step"
            )
        self.denoiser: nn.Module = denoiser
        self.preview = _load_preview(name, row, self.pipeline, dtype, self.device)
        self._schedulers = Schedulers(self.pipeline.scheduler)
        self.info = self._describe(row, dtype)
        lanes.open_gate(denoiser)

    def lane_pipeline(self, scheduler: str, step_count: int) -> Any:
        """A pipeline for one picture: the shared weights, but call state and a scheduler of its own."""
        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = self._schedulers.make(scheduler, step_count)
        return pipeline

    def cut_off(self, text: str) -> str:
        """The end of a prompt that does not fit the model's token limit; empty if all of it does."""
        tokenizer = _widest_tokenizer(self.pipeline)
        if tokenizer is None or not text:
            return ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[self.info.prompt_token_limit :]).strip())

    def _describe(self, row: ModelSettings, dtype: torch.dtype) -> ModelInfo:
        width, height, multiple = _sizes(self.pipeline, self.denoiser)
        parts = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        return ModelInfo(
            name=self.name,
            pipeline=type(self.pipeline).__name__,
            dtype=str(dtype).removeprefix("torch."),
            parameter_count=sum(weight.numel() for part in parts for weight in part.parameters()),
            default_width=width,
            default_height=height,
            size_multiple=multiple,
            default_step_count=row.default_step_count,
            default_guidance_scale=row.default_guidance_scale,
            default_scheduler=self._schedulers.default,
            prompt_token_limit=_token_limit(self.pipeline, self.call_parameters),
            has_preview_autoencoder=self.preview is not None,
            schedulers=self._schedulers.fit,
            unfit_schedulers=self._schedulers.unfit,
        )


def choose_dtype(wanted: str, hardware: Hardware) -> torch.dtype:
    """The data type that the setting means on this hardware."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if hardware.label in ("cuda", "rocm"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def _load_pipeline(name: str, source: str, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    folder = Path(source)
    if folder.is_dir():
        index = _read_index(name, folder / "model_index.json")
        _refuse_pickles(name, folder, index)
        # diffusers insists on some parts even where the folder itself says that it has none.
        options.update({part: None for part, described in index.items() if described == [None, None]})
        where = str(folder)
        options["local_files_only"] = True
    elif match := _HUB_ID.fullmatch(source):
        where, options["revision"] = match["repository"], match["revision"]
    else:
        raise ModelError(
            f"model {name}: {source!r} is neither a folder here nor a hub model pinned as owner/name@revision"
        )
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {name}: {source} cannot be loaded: {error}") from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def _read_index(name: str, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"model {name}: {file.parent} is not a diffusers folder: it has no model_index.json")
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"model {name}: {file} is not JSON: {error}") from error
    if not isinstance(index, dict):
        raise ModelError(f"model {name}: {file} is not a JSON object")
    return index


def _refuse_pickles(name: str, folder: Path, index: dict[str, Any]) -> None:
    """Say clearly which part has no safetensors, instead of diffusers' general complaint."""
    for part, described in index.items():
        place = folder / part
        if not isinstance(described, list) or not place.is_dir() or any(place.glob("*.safetensors")):
            continue
        pickles = sorted(path.name for path in place.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                f"model {name}: {part} has only pickled weights ({', '.join(pickles)}), which can run code when "
                "loaded; convert them to safetensors"
            )


def _load_preview(name: str, row: ModelSettings, pipeline: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The small autoencoder that previews are decoded with, None if the model has none."""
    inside = Path(row.source) / PREVIEW_FOLDER
    if row.preview_autoencoder is not None:
        folder = Path(row.preview_autoencoder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name}: preview_autoencoder {folder} is not a diffusers model folder")
    elif inside.is_dir():
        folder = inside
    else:
        return None
    try:
        preview = diffusers.AutoencoderTiny.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name}: preview autoencoder {folder} cannot be loaded: {error}") from error
    latent_channels = pipeline.vae.config.latent_channels
    if preview.config.latent_channels != latent_channels:
        raise ModelError(
            f"model {name}: preview autoencoder {folder} decodes {preview.config.latent_channels} latent channels, "
            f"the model has {latent_channels}"
        )
    if hasattr(pipeline, "_unpack_latents"):
        raise ModelError(f"model {name}: {type(pipeline).__name__} packs its latents; previews cannot decode those")
    preview = preview.to(device).eval()
    try:
        # Folders whose layer widths differ load without complaint and fail only here.
        preview.decode(torch.zeros(1, latent_channels, 8, 8, dtype=dtype, device=device))
    except RuntimeError as error:
        raise ModelError(f"model {name}: preview autoencoder {folder} does not decode: {error}") from error
    return preview


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
