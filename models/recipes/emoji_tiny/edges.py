"""Edges as the control sees them, the measure of following them, and drawings moved about to learn from."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from . import adapters, data

#: the thresholds of cv2.Canny on the grey 64x64 picture; a condition made with others was not trained for
THRESHOLDS = (100, 200)


def canny(picture: np.ndarray) -> np.ndarray:
    """Edges of a uint8 RGB picture (h, w, 3), as bool (h, w)."""
    return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), *THRESHOLDS) > 0


def overlap(drawn: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> float:
    """Intersection over union of two bool edge maps; an edge counts as met within `tolerance` pixels (also diagonally).

    With P the drawn and C the wanted edges, hits are the mean of how many of P lie in C widened by the tolerance and
    how many of C lie in P widened; the result is hits / (|P| + |C| - hits), the plain IoU when there is no tolerance.
    """
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)
    wide_drawn, wide_wanted = (cv2.dilate(m.astype(np.uint8), kernel) > 0 for m in (drawn, wanted))
    hits = (int((drawn & wide_wanted).sum()) + int((wanted & wide_drawn).sum())) / 2
    union = int(drawn.sum()) + int(wanted.sum()) - hits
    return hits / union if union else 1.0


def move(picture: np.ndarray, random: np.random.Generator, scale: tuple[float, float] = (0.5, 1.1)) -> np.ndarray:
    """A 128x128 drawing turned, mirrored, scaled and put elsewhere on white; uint8 RGB 64x64.

    Half are mirrored, a third turned by up to 30 degrees; the middle stays where at most a few pixels of the drawing's
    square fall off the paper.
    """
    factor = random.uniform(*scale)
    angle = random.uniform(-30, 30) if random.random() < 1 / 3 else 0.0
    room = data.SIZE * (1 - factor) + 6 if factor < 1 else 6.0
    x, y = random.uniform(-room, room, 2)
    size = picture.shape[0]
    matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, factor)
    matrix[:, 2] += (x, y)
    if random.random() < 0.5:
        matrix = matrix @ np.array([[-1, 0, size - 1], [0, 1, 0], [0, 0, 1.0]])
    moved = cv2.warpAffine(
        picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(255,) * 3
    )
    return cv2.resize(moved, (data.SIZE, data.SIZE), interpolation=cv2.INTER_AREA)


class Bank:
    """Moved drawings with their edges, prompts and latents; a few are replaced by new ones after every batch."""

    def __init__(self, pipeline: StableDiffusionPipeline, work: Path, names: list[str], count: int) -> None:
        self._pipeline = pipeline
        self._large = data.large(work, names)
        self._known = np.setdiff1d(np.arange(len(names)), adapters.held_out(len(names)))
        self._random = np.random.default_rng(0)
        self._next = 0
        self.edges = torch.empty(count, data.SIZE, data.SIZE, dtype=torch.bool)
        self.latents = torch.empty(count, 16, 8, 8)
        #: what the model itself last took the latents for
        self.believed = torch.empty(count, 16, 8, 8)
        #: numbers of prompts, style * names + name, in the order noto, twemoji
        self.pairs = torch.empty(count, dtype=torch.long)
        self.refresh(count)

    def __len__(self) -> int:
        return len(self.pairs)

    def newest(self, count: int) -> Tensor:
        """Places of the `count` drawings that came last, which training has hardly met yet."""
        return (torch.arange(count) + self._next - count) % len(self)

    def refresh(self, count: int) -> None:
        """Replace the `count` oldest.

        A quarter of the prompts name another style than the drawing has (Fluent's included): where edges and style
        disagree, the edges are right.
        """
        images, pairs = [], []
        for name in self._random.choice(self._known, count):
            style = int(self._random.integers(2))
            drawing = style if self._random.random() < 0.75 else int(self._random.integers(len(data.STYLES)))
            picture = self._large[drawing, name]
            still = self._random.random() < 0.15
            images.append(
                cv2.resize(picture, (data.SIZE, data.SIZE), interpolation=cv2.INTER_AREA)
                if still
                else move(picture, self._random)
            )
            pairs.append(style * self._large.shape[1] + int(name))
        places = (torch.arange(count) + self._next) % len(self)
        self._next = (self._next + count) % len(self)
        self.latents[places] = adapters.encode(self._pipeline, np.stack(images))
        self.believed[places] = self.latents[places]
        self.edges[places] = torch.from_numpy(np.stack([canny(image) for image in images]))
        self.pairs[places] = torch.tensor(pairs)


def as_condition(edges: Tensor) -> Tensor:
    """Bool edge maps (n, 64, 64) as a ControlNet takes them: RGB floats 0 or 1, (n, 3, 64, 64)."""
    return edges[:, None].float().expand(-1, 3, -1, -1)
