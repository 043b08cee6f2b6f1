"""Lines decoded and resized once: a cache of uint8 arrays, so that training waits for arithmetic only."""

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from services.kit.images import Limits
from services.ocr import images
from services.ocr.finetune.rows import DEFAULT_LIMITS, Row

VERSION = 1  # part of every cache's name: raise it when what is stored changes


def resized(
    rows: Sequence[Row],
    processor: Any,
    channels: int,
    folder: Path,
    *,
    wider: float = 1.0,
    grey: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """All rows as uint8 [rows, height, width, channels], mapped from `folder`, made by the model's own image processor.

    `wider` stores them that much wider than the model sees them, so that distorting them loses nothing; `grey` stores
    one channel of them. The file is written once, whole or not at all, and found again by the rows, the stamps of their
    images and the size. Raises OSError if an image is gone or the disk is full, Fault if an image has become unreadable
    since it was checked.
    """
    size = processor_size(processor)
    shape = (len(rows), size[0], round(size[1] * wider), 1 if grey else channels)
    digest = hashlib.sha256(f"{VERSION}:{shape}:{processor.resample}".encode())
    for row in rows:
        digest.update(f"\n{row.place}\t{row.stamp}".encode())
    path = folder / f"lines-{digest.hexdigest()[:24]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            for index, row in enumerate(rows):
                array[index] = _resize(row, processor, channels, shape, limits)[..., : shape[3]]
                tick()
            array.flush()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def _resize(row: Row, processor: Any, channels: int, shape: tuple[int, ...], limits: Limits) -> np.ndarray:
    line = images.decode(row.read(), limits)
    image = Image.frombytes("RGB", (line.width, line.height), line.pixels).convert("L" if channels == 1 else "RGB")
    settings = {"size": {"height": shape[1], "width": shape[2]}, "do_rescale": False, "do_normalize": False}
    pixels = np.asarray(processor([image], return_tensors="np", **settings)["pixel_values"][0])
    return pixels.transpose(1, 2, 0).astype(np.uint8)


def are_grey(rows: Sequence[Row], limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether some fifty of the rows, from all over, have no colour; then one channel holds them all."""
    for row in rows[:: max(1, len(rows) // 50)]:
        line = images.decode(row.read(), limits)
        pixels = np.frombuffer(line.pixels, np.uint8).reshape(-1, 3)
        if (pixels != pixels[:, :1]).any():
            return False
    return True


def processor_size(processor: Any) -> tuple[int, int]:
    """Height and width that an image processor makes of every image."""
    return int(processor.size["height"]), int(processor.size["width"])


def normalise(grey: Any, processor: Any) -> Any:
    """Pixels 0..255 (tensor [lines, channels, height, width]) to what the processor would answer."""
    import torch

    pixels = grey.float()
    if processor.do_rescale:
        pixels = pixels * processor.rescale_factor
    if processor.do_normalize:
        channels = pixels.shape[1]
        mean = torch.tensor(list(processor.image_mean)[:channels])[None, :, None, None]
        deviation = torch.tensor(list(processor.image_std)[:channels])[None, :, None, None]
        pixels = (pixels - mean) / deviation
    return pixels
