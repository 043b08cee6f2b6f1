"""What a model's weights are computed with."""

from typing import Literal

import torch
from transformers import VisionEncoderDecoderModel

from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware

Precision = Literal["float32", "bfloat16", "float16", "int8_dynamic", "int8_weight_only", "int8_static"]

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def apply_precision(
    model: VisionEncoderDecoderModel, precision: Precision, hardware: Hardware
) -> VisionEncoderDecoderModel:
    """The model with its weights in that precision; raises CheckpointError when that cannot be."""
    if precision not in _FLOATS:
        raise CheckpointError(f"precision {precision} cannot be computed with on {hardware.label}")
    return model.to(_FLOATS[precision])
