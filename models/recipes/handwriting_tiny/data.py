"""Batches: rendered shards and real lines, distorted together, with labels for every loss."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .model import COLUMNS, FRAMES
from .render import HEIGHT, STORED_WIDTH, WIDTH, shard_stems, squash
from .text import MAX_LENGTH
from .vocabulary import BOS, EOS, PAD, encodable, encode, normalise


@dataclass
class Lines:
    """Model-sized images with their texts, and character spans where known."""

    images: np.ndarray
    texts: list[str]
    spans: np.ndarray | None = None


@dataclass
class Batch:
    """What one training step needs; ``known`` marks lines with character places."""

    pixels: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor
    centres: torch.Tensor
    frame_labels: torch.Tensor
    known: torch.Tensor
    lengths: torch.Tensor


def read_real(folder: Path, keep: set[str] | None = None, drop: set[str] | None = None) -> Lines:
    """Lines of a ``labels.tsv`` folder, by writer; texts outside the vocabulary or too long are left out."""
    images, texts = [], []
    for row in (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, text, writer = row.split("\t")[:3]
        text = normalise(text)
        if (keep and writer not in keep) or (drop and writer in drop) or not encodable(text) or len(text) > MAX_LENGTH:
            continue
        with Image.open(folder / file) as image:
            images.append(squash(image, STORED_WIDTH))
        texts.append(text)
    return Lines(np.stack(images), texts)


def read_shards(folder: Path) -> list[Lines]:
    """All complete shards, images mapped from disk."""
    found = []
    for stem in shard_stems(folder):
        try:
            texts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
            images = np.load(stem.with_suffix(".images.npy"), mmap_mode="r")
            spans = np.load(stem.with_suffix(".spans.npy"))
        except FileNotFoundError:
            continue  # replaced while we looked
        found.append(Lines(images, texts, spans))
    return found


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Grey 0..1 to the -1..1 the exported processor gives."""
    return (pixels - 0.5) / 0.5


def _warp(count: int, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sampling grid for each line: affine and a gentle rubber sheet; with the x scale and shift it used."""
    scale_x = torch.empty(count).uniform_(0.97, 1.0 + 0.20 * strength)
    scale_y = torch.empty(count).uniform_(0.92, 1.0 + 0.30 * strength)
    shift_x = (torch.rand(count) - 0.5) * 2 * (0.01 + 0.8 * (scale_x - 1).clamp_min(0))
    shift_y = (torch.rand(count) - 0.5) * 2 * (0.05 + 0.9 * (scale_y - 1).clamp_min(0))
    shear = torch.randn(count).clamp(-2, 2) * 0.045 * strength
    turn = torch.randn(count).clamp(-2, 2) * 0.06 * strength
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    sheet = torch.randn(count, 2, 3, 10)
    sheet[:, 0] *= 0.022 * strength
    sheet[:, 1] *= 0.07 * strength
    sheet = F.interpolate(sheet, size=(12, 36), mode="bicubic", align_corners=True)  # smooth, then cheaply larger
    sheet = F.interpolate(sheet, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=True)
    grid_x = scale_x[:, None, None] * x + shift_x[:, None, None] + shear[:, None, None] * y + sheet[:, 0]
    grid_y = scale_y[:, None, None] * y + shift_y[:, None, None] + turn[:, None, None] * x + sheet[:, 1]
    return torch.stack([grid_x, grid_y], dim=-1), scale_x, shift_x


def distort(ink: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distort ink (batch × 1 × height × width, 1 is black): place, stroke width, blur, contrast, rules, noise."""
    count = ink.shape[0]
    grid, scale_x, shift_x = _warp(count, strength)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=True)

    def some(share: float) -> torch.Tensor:
        return (torch.rand(count, 1, 1, 1) < share).float()

    # Strokes are stretched sideways by the squash, so they are thickened and thinned more in that direction.
    roll = torch.rand(count)
    for chosen, most, change in (
        (roll < 0.3, 0.9, lambda part: F.max_pool2d(part, (3, 5), 1, (1, 2))),
        (roll > 0.8, 0.5, lambda part: -F.max_pool2d(-part, (1, 3), 1, (0, 1))),
        (torch.rand(count) < 0.3, 0.9, lambda part: F.avg_pool2d(part, (3, 3), 1, 1, count_include_pad=False)),
    ):
        if chosen.any():
            part = ink[chosen]
            ink[chosen] = part + most * torch.rand(len(part), 1, 1, 1) * (change(part) - part)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.5, 1.0)
    ink = ink ** torch.exp(torch.randn(count, 1, 1, 1) * 0.25) * contrast
    for index in range(count):
        if random.random() < 0.12:  # a rule of the form under or over the writing
            row, start = random.choice((random.randrange(HEIGHT), random.randrange(HEIGHT - 10, HEIGHT))), 0
            length = random.randrange(WIDTH // 8, WIDTH)
            start = random.randrange(WIDTH - length + 1)
            area = ink[index, 0, row : row + random.choice((1, 1, 2)), start : start + length]
            area.copy_(area.clamp_min(random.uniform(0.2, 0.9)))
        elif random.random() < 0.06:  # squared paper
            step, shade = random.randrange(24, 90), random.uniform(0.1, 0.35)
            column = ink[index, 0, :, random.randrange(step) :: step]
            column.copy_(column.clamp_min(shade))
            line = ink[index, 0, random.randrange(24) :: 24]
            line.copy_(line.clamp_min(shade))
    ink = ink + some(0.4) * torch.rand(count, 1, 1, 1) * 0.12
    ink = ink + some(0.5) * torch.rand(count, 1, 1, 1) * 0.12 * contrast * torch.randn_like(ink)
    return ink.clamp(0, 1), scale_x, shift_x


class Mixer:
    """Draws batches from real and rendered lines in a given proportion."""

    def __init__(self, real: list[tuple[float, Lines]], shards: Path, seed: int) -> None:
        self.real = real
        self.folder = shards
        self.random = random.Random(seed)
        self.waiting: list[list[tuple[np.ndarray, str, np.ndarray | None]]] = []
        self.refresh()

    def refresh(self) -> None:
        """Look for fresh shards."""
        self.rendered = read_shards(self.folder)

    def _pick(self, real_share: float) -> tuple[np.ndarray, str, np.ndarray | None]:
        if self.random.random() < real_share:
            lines = self.random.choices([lines for _, lines in self.real], weights=[w for w, _ in self.real])[0]
        else:
            lines = self.random.choice(self.rendered)
        index = self.random.randrange(len(lines.texts))
        return lines.images[index], lines.texts[index], None if lines.spans is None else lines.spans[index]

    def batch(self, size: int, real_share: float, strength: float, token_noise: float) -> Batch:
        """A distorted batch with the labels of all losses."""
        if not self.waiting:  # lines of like length together: less padding for the decoder to work through
            pool = sorted((self._pick(real_share) for _ in range(size * 6)), key=lambda row: len(row[1]))
            self.waiting = [pool[start : start + size] for start in range(0, len(pool), size)]
            self.random.shuffle(self.waiting)
        rows = self.waiting.pop()
        ink = 1 - torch.from_numpy(np.stack([row[0] for row in rows])).float()[:, None] / 255
        ink, scale_x, shift_x = distort(ink, strength)
        longest = max(len(row[1]) for row in rows)
        labels = torch.full((size, longest + 1), PAD)
        inputs = torch.full((size, longest + 1), PAD)
        centres = torch.full((size, longest + 1), math.nan)
        frame_labels = torch.full((size, FRAMES), PAD)
        known = torch.tensor([row[2] is not None for row in rows])
        frame_places = (torch.arange(FRAMES) + 0.5) / FRAMES
        for index, (_, text, spans) in enumerate(rows):
            ids = torch.tensor(encode(text))
            labels[index, : len(ids)] = ids
            labels[index, len(ids)] = EOS
            noise = torch.rand(len(ids)) < token_noise
            fed = torch.where(noise, torch.randint(EOS + 2, EOS + 150, (len(ids),)), ids)
            inputs[index, 0] = BOS
            inputs[index, 1 : len(ids) + 1] = fed
            if spans is None:
                continue
            # Where the character went: the grid says which source place each target place shows, so invert it.
            source = torch.from_numpy(spans[: len(ids)].astype(np.float32)) * 2 - 1
            target = ((source - shift_x[index]) / scale_x[index] + 1) / 2
            centres[index, : len(ids)] = target.mean(1)
            margin = (target[:, 1] - target[:, 0]) * 0.2
            inside = (frame_places >= (target[:, :1] + margin[:, None])) & (
                frame_places <= (target[:, 1:] - margin[:, None])
            )
            inside &= (ids != encode(" ")[0])[:, None]
            covered = inside.any(0)
            frame_labels[index, covered] = ids[inside.float().argmax(0)[covered]]
        lengths = torch.tensor([len(row[1]) for row in rows])
        return Batch(normalise_pixels(1 - ink), inputs, labels, centres, frame_labels, known, lengths)


def attention_targets(centres: torch.Tensor, width: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """For every decoder step a bump over the columns at its character's place, and which steps have one."""
    have = ~centres.isnan() & (centres > 0) & (centres < 1)
    place = torch.where(have, centres, torch.zeros_like(centres)) * COLUMNS - 0.5
    bump = torch.exp(-0.5 * ((torch.arange(COLUMNS) - place[..., None]) / width) ** 2)
    return bump / bump.sum(-1, keepdim=True).clamp_min(1e-6), have
