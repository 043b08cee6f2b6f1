"""Loads what `diffusion_sources.py` found, part by part.

What is wrong is said with the part's name, and no weight that is missing is ever made up.

May run on any thread while other models paint. Two things about the libraries make that delicate. While they build a
model in another type than float32, that type is the default of every thread; so parts are built in float32 and
converted. And they replace torch's own functions for building modules meanwhile; so whoever builds or loads modules, on
whatever thread, holds `BUILDING`.
"""

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers import pipelines as diffusers_pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from torch import nn

from services.runtimes.diffusion_sources import ModelError, Source, check_weights, is_refiner

BUILDING = threading.RLock()

_NAMES_SHOWN = 3


def load(
    source: Source, dtype: torch.dtype, device: torch.device, modules: Mapping[str, nn.Module] | None = None
) -> Any:
    """The text-to-image pipeline of a source, its modules on `device` as `dtype` and in evaluation mode.

    modules: parts that the source does not have, by name. A refiner, which paints no picture of its own, comes as the
    pipeline that its index names. Raises ModelError.
    """
    in_file = _load_single_file(source, dtype, device) if source.file else {}
    in_folder = {
        part.name: load_module(
            part.cls, source.folder / part.name, what=part.name, variant=part.variant, dtype=dtype, device=device
        )
        for part in source.parts
        if not part.in_file
    }
    # diffusers insists on some parts even where the index itself says that there are none.
    absent = {name: None for name, described in source.index.items() if described == [None, None]}
    loader = diffusers.DiffusionPipeline if is_refiner(source.index) else diffusers.AutoPipelineForText2Image
    try:
        with BUILDING:
            return loader.from_pretrained(
                str(source.folder),
                **in_file,
                **in_folder,
                **(modules or {}),
                **absent,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise many kinds for a tokenizer or an index that does not fit
        raise ModelError(f"{source.folder} cannot be put together: {_first_line(error)}") from error


def load_module(
    cls: type[Any],
    folder: Path,
    *,
    what: str,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> Any:
    """One module of diffusers or transformers out of its own folder, in evaluation mode.

    what: how the caller's users know it, such as "unet". Raises ModelError for files that are missing, pickled, not
    whole, or that do not hold every weight in the shape that config.json says.
    """
    check_weights(folder, what, variant)
    # transformers prints what does not fit, unless it is told to go on; it is refused below, by name.
    options = {"ignore_mismatched_sizes": True} if issubclass(cls, transformers.PreTrainedModel) else {}
    try:
        with BUILDING:
            module, report = cls.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                variant=variant,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise many kinds for files that do not fit together
        raise ModelError(f"{what}: {folder} cannot be loaded: {_first_line(error)}") from error
    if missing := report["missing_keys"]:
        raise ModelError(f"{what}: the weights in {folder} lack {_some(missing)}, which config.json asks for")
    if mismatched := report["mismatched_keys"]:
        names = [name for name, *_ in mismatched]
        raise ModelError(f"{what}: the weights in {folder} have another shape than config.json says: {_some(names)}")
    return _placed(module, what, dtype, device)


def _load_single_file(source: Source, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The modules that are in the single file, by name."""
    assert source.file is not None
    try:
        checkpoint = safetensors.torch.load_file(source.file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{source.file.name} cannot be read: {error}") from error
    modules = {}
    # In the order that diffusers takes: some of its conversions take what they read out of the checkpoint.
    for part in sorted(source.parts, key=lambda part: part.name):
        if not part.in_file:
            continue
        try:
            with BUILDING:
                module = load_single_file_sub_model(
                    library_name=part.library,
                    class_name=part.cls.__name__,
                    name=part.name,
                    checkpoint=checkpoint,
                    pipelines=diffusers_pipelines,
                    is_pipeline_module=hasattr(diffusers_pipelines, part.library),
                    cached_model_config_path=str(source.folder),
                    local_files_only=True,
                    torch_dtype=torch.float32,
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except NotImplementedError as error:  # torch refuses to move what was given no numbers
            raise ModelError(f"{part.name}: {source.file.name} lacks some of its weights") from error
        except KeyError as error:
            raise ModelError(f"{part.name}: {source.file.name} lacks {error.args[0]}") from error
        except Exception as error:  # the conversions raise many kinds for tensors that do not fit together
            raise ModelError(f"{part.name}: {source.file.name} cannot be loaded: {_first_line(error)}") from error
        if isinstance(module, transformers.PreTrainedModel):
            module.tie_weights()
        modules[part.name] = _placed(module, f"{part.name}: {source.file.name}", dtype, device)
    return modules


def _placed(module: nn.Module, what: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise ModelError(f"{what} lacks {_some(empty)}")
    kept = _kept_in_float32(module, dtype)
    for name, tensor in tensors:
        as_is = not tensor.is_floating_point()
        wanted = torch.float32 if kept.intersection(name.split(".")) else dtype
        # In place: parameters that are tied stay tied.
        tensor.data = tensor.data.to(device=device, dtype=tensor.dtype if as_is else wanted)
    return module.eval()


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the submodules whose numbers leave the range of 16-bit types, as the libraries know them."""
    # transformers means float16 by the first of these, diffusers any type.
    known = ["_keep_in_fp32_modules_strict"]
    if dtype is torch.float16 or isinstance(module, diffusers.ModelMixin):
        known.append("_keep_in_fp32_modules")
    return {name for attribute in known for name in getattr(module, attribute, None) or ()}


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = len(listed) - _NAMES_SHOWN
    return ", ".join(listed[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    """What went wrong, without the libraries' advice to call them another way."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("If you want to instead")[0].split("You may consider")[0].split())[:500]
