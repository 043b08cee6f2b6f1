"""Depth of a picture, by a transformers depth estimation model from a local folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from services.kit.faults import Fault, failed_precondition
from services.runtimes.checkpoints import CheckpointError, require_weights
from services.runtimes.torch_diffusion import BUILDING

_MODEL_TYPES = ("depth_anything", "dpt")
# Parts that only training uses; published folders leave them out.
_UNUSED_WEIGHTS = re.compile(r"(^|\.)fusion_stage\.layers\.0\.residual_layer1\.|\.pooler\.|^auxiliary_head\.")


class DepthModel:
    """Loads its model at the first picture, and keeps it."""

    def __init__(self, folder: str, device: torch.device) -> None:
        self._folder = Path(folder).expanduser()
        self._device = device
        self._loaded: tuple[Any, Any] | None = None

    def nearness(self, image: Image.Image) -> np.ndarray:
        """How near everything in an "RGB" picture is: uint8 [h, w], 255 the nearest and 0 the farthest.

        Raises Fault (FAILED_PRECONDITION) if the model cannot be loaded or run; the next call tries to load it again.
        """
        if self._loaded is None:
            self._loaded = self._load()
        model, processor = self._loaded
        try:
            with torch.inference_mode():
                seen = processor(images=image, return_tensors="pt").to(self._device)
                said = model(pixel_values=seen["pixel_values"])
                sizes = [(image.height, image.width)]
                depth = processor.post_process_depth_estimation(said, target_sizes=sizes)[0]["predicted_depth"]
                depth = depth.float().cpu()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # configurations that contradict each other fail here, in any way
            raise self._unusable(f"it fails on a picture: {type(error).__name__}: {error}") from error
        if not bool(torch.isfinite(depth).all()):
            raise self._unusable("its depths are not finite numbers")
        if _is_metric(model.config):
            # Metres, of which the near ones tell most apart: the inverse is what depth controls are trained on.
            depth = 1 / depth.clamp(min=1e-3)
        low, high = float(depth.min()), float(depth.max())
        scaled = (depth - low) / (high - low) if high > low else torch.zeros_like(depth)
        made: np.ndarray = np.rint(scaled.numpy() * 255).astype(np.uint8)
        return made

    def _load(self) -> tuple[Any, Any]:
        """Model and image processor; raises Fault for anything but a whole depth estimation folder."""
        kind = self._model_type()
        if kind not in _MODEL_TYPES:
            raise self._unusable(f"its model_type is {kind!r}; accepted: {', '.join(_MODEL_TYPES)}")
        try:
            require_weights(self._folder, allow_pickled_weights=False)
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            with BUILDING:
                model, report = AutoModelForDepthEstimation.from_pretrained(
                    self._folder,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                    **options,
                )
            processor = AutoImageProcessor.from_pretrained(self._folder, backend="pil", **options)
        except CheckpointError as error:
            raise self._unusable(str(error)) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a folder can be broken in any way, and the library raises whatever it met
            raise self._unusable(f"it cannot be loaded: {type(error).__name__}: {error}") from error
        missing = [key for key in report["missing_keys"] if not _UNUSED_WEIGHTS.search(key)]
        if missing:
            # The library would fill them with random numbers and go on.
            raise self._unusable(f"{len(missing)} weights are missing, first {min(missing)}")
        if report["mismatched_keys"]:
            name = min(key for key, *_ in report["mismatched_keys"])
            raise self._unusable(f"weights have another shape than config.json says, first {name}")
        return model.eval().to(self._device), processor

    def _model_type(self) -> Any:
        file = self._folder / "config.json"
        try:
            config = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise self._unusable("there is no such folder, or it has no config.json") from None
        except (OSError, ValueError) as error:
            raise self._unusable(f"its config.json cannot be read: {error}") from None
        return config.get("model_type") if isinstance(config, dict) else None

    def _unusable(self, why: str) -> Fault:
        return failed_precondition(
            "PREPROCESSOR_UNUSABLE",
            f"preprocessor depth: {self._folder}, which preprocessor_models names, cannot be used: {why}",
            preprocessor="depth",
        )


def _is_metric(config: Any) -> bool:
    """Whether the model says metres, and not how near things are as MiDaS does."""
    if config.model_type == "depth_anything":
        return bool(config.depth_estimation_type == "metric")
    # Published DPTs on DINOv2 were trained on the metres of NYU and KITTI, all others on MiDaS's inverse depth.
    backbone = config.backbone_config
    return getattr(backbone, "model_type", None) == "dinov2"
