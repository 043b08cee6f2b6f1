"""Lines as other hands, pens, papers and cameras would have made them.

What happens to a line is drawn on the CPU from a generator of its own (`draw`), so it depends on nothing but the seed
and the line's place in the run: not on the batch, the number of processes, or a restart. `apply` then does it to a
whole batch at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# The rubber sheet: random offsets at this many places (rows, columns), smoothly filled in between.
SHEET = (3, 10)


@dataclass
class Change:
    """What is done to one line, drawn once. Lengths are shares of the line's half width or half height."""

    scale: np.ndarray  # [2] x, y: above 1 shrinks the writing
    shift: np.ndarray  # [2] x, y
    shear: float
    turn: float
    sheet: np.ndarray  # [2, *SHEET]
    thicken: float  # -1..1: thinner .. thicker
    blur: float  # 0..1
    coarse: float  # 0..1: how much of a low-resolution copy is mixed in
    gamma: float
    contrast: float
    fade: np.ndarray  # [2] ink left at the left and right end
    paper: float  # grey of the ground
    noise: float
    seed: int  # of the noise
    rule: tuple[float, float, float, float, float] | None  # y, start, length, thickness in pixels, ink
    grid: tuple[float, float, float] | None  # step in heights, phase, ink
    tint: np.ndarray  # [channels] how much of the ink each colour channel sees
    tone: np.ndarray  # [channels] how much of the paper's grey each colour channel sees


def draw(random: np.random.Generator, strength: float, channels: int = 1) -> Change:
    """Draw what happens to a line; strength 0 is nothing, 1 the usual, 2 violent."""
    s = strength
    scale = np.array([random.uniform(1 - 0.04 * s, 1 + 0.22 * s), random.uniform(1 - 0.08 * s, 1 + 0.34 * s)])
    room = np.array([0.01, 0.05]) * s + np.array([0.8, 0.9]) * np.clip(scale - 1, 0, None)
    sheet = random.standard_normal((2, *SHEET)) * np.array([0.024, 0.08])[:, None, None] * s
    roll = random.random()
    thicken = random.uniform(0, 0.9) if roll < 0.3 else -random.uniform(0, 0.55) if roll > 0.78 else 0.0
    rule = grid = None
    roll = random.random()
    if roll < 0.12 * s:  # a rule of the form above or below the writing, or through it
        y = random.choice([random.uniform(0, 1), random.uniform(0.78, 1)])
        length = random.uniform(0.12, 1)
        rule = (y, random.uniform(0, 1 - length), length, random.choice([1.0, 1.0, 2.0]), random.uniform(0.2, 0.9))
    elif roll < 0.18 * s:  # squared paper
        grid = (random.uniform(0.5, 1.8), random.random(), random.uniform(0.1, 0.35))
    contrast = 1 - random.uniform(0, 0.5) * min(s, 1.5)
    tint = np.ones(channels)
    tone = np.ones(channels)
    if channels == 3 and random.random() < 0.3 * s:  # blue ink, yellowed paper
        tint = 1 - random.uniform(0, 0.5, 3) * np.array([0.6, 0.8, 1.0])[random.permutation(3)]
        tone = random.uniform(0.2, 1.8, 3)
    return Change(
        scale=scale,
        shift=random.uniform(-1, 1, 2) * room,
        shear=float(np.clip(random.standard_normal(), -2, 2)) * 0.05 * s,
        turn=float(np.clip(random.standard_normal(), -2, 2)) * 0.065 * s,
        sheet=sheet,
        thicken=thicken * min(s, 1.1),
        blur=random.uniform(0, 0.95) * min(s, 1.0) if random.random() < 0.3 else 0.0,
        coarse=random.uniform(0.3, 1.0) * min(s, 1.0) if random.random() < 0.12 else 0.0,
        gamma=float(np.exp(random.standard_normal() * 0.25 * s)),
        contrast=contrast,
        fade=1 - random.uniform(0, 0.5, 2) * min(s, 1.5) if random.random() < 0.15 else np.ones(2),
        paper=random.uniform(0, 0.14) * s if random.random() < 0.4 else 0.0,
        noise=random.uniform(0, 0.12) * s if random.random() < 0.5 else 0.0,
        seed=int(random.integers(2**31)),
        rule=rule,
        grid=grid,
        tint=tint,
        tone=tone,
    )


def apply(ink: Tensor, changes: list[Change], height: int, width: int, channels: int) -> Tensor:
    """Distort ink (float [lines, 1 or channels, any, any], 1 is black, 0 is white paper).

    Answers ink again, 0..1, [lines, channels, height, width]. Lines are squashed sideways, which makes strokes wider
    than high, so thickening reaches further sideways.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None, None]

    ink = F.grid_sample(ink, _grid(changes, height, width), mode="bilinear", padding_mode="zeros", align_corners=True)
    thicken = torch.tensor([change.thicken for change in changes])
    if (thicken > 0).any():
        part = ink[thicken > 0]
        fat = F.max_pool2d(part, (3, 5), 1, (1, 2))
        ink[thicken > 0] = part + thicken[thicken > 0][:, None, None, None].float() * (fat - part)
    if (thicken < 0).any():
        part = ink[thicken < 0]
        thin = -F.max_pool2d(-part, (1, 3), 1, (0, 1))
        ink[thicken < 0] = part - thicken[thicken < 0][:, None, None, None].float() * (thin - part)
    blur = torch.tensor([change.blur for change in changes])
    if (blur > 0).any():
        part = ink[blur > 0]
        soft = F.avg_pool2d(part, 3, 1, 1, count_include_pad=False)
        ink[blur > 0] = part + blur[blur > 0][:, None, None, None].float() * (soft - part)
    coarse = torch.tensor([change.coarse for change in changes])
    if (coarse > 0).any():
        part = ink[coarse > 0]
        low = F.interpolate(part, scale_factor=0.5, mode="area")
        low = F.interpolate(low, size=(height, width), mode="bilinear", align_corners=False)
        ink[coarse > 0] = part + coarse[coarse > 0][:, None, None, None].float() * (low - part)
    contrast = column([change.contrast for change in changes])
    ink = ink.clamp(0, 1) ** column([change.gamma for change in changes]) * contrast
    ends = torch.tensor(np.stack([change.fade for change in changes]), dtype=torch.float32)
    if (ends < 1).any():
        way = torch.linspace(0, 1, width)
        ink = ink * (ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * way)[:, None, None, :]
    for index, change in enumerate(changes):
        _rule(ink[index], change)
    ink = ink.expand(-1, channels, -1, -1)
    if channels == 3:
        tints = torch.tensor(np.stack([change.tint for change in changes]), dtype=torch.float32)
        ink = ink * tints[:, :, None, None]
    tones = torch.tensor(np.stack([change.tone for change in changes]), dtype=torch.float32)
    ink = ink + column([change.paper for change in changes]) * tones[:, :, None, None]
    for index, change in enumerate(changes):
        if change.noise:
            noise = np.random.default_rng(change.seed).standard_normal((1, height, width), dtype=np.float32)
            ink[index] += torch.from_numpy(noise) * (change.noise * change.contrast)
    return ink.clamp(0, 1)


def _grid(changes: list[Change], height: int, width: int) -> Tensor:
    """Where each pixel of the result is taken from, float [lines, height, width, 2], in -1..1."""

    def values(of: list[float]) -> Tensor:
        return torch.tensor(of, dtype=torch.float32)[:, None, None]

    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    sheet = torch.from_numpy(np.stack([change.sheet for change in changes]).astype(np.float32))
    sheet = F.interpolate(sheet, size=(12, 36), mode="bicubic", align_corners=True)  # smooth, then cheaply larger
    sheet = F.interpolate(sheet, size=(height, width), mode="bilinear", align_corners=True)
    scale_x, scale_y = (values([float(change.scale[axis]) for change in changes]) for axis in (0, 1))
    shift_x, shift_y = (values([float(change.shift[axis]) for change in changes]) for axis in (0, 1))
    grid_x = scale_x * x + shift_x + values([change.shear for change in changes]) * y + sheet[:, 0]
    grid_y = scale_y * y + shift_y + values([change.turn for change in changes]) * x + sheet[:, 1]
    return torch.stack([grid_x, grid_y], dim=-1)


def _rule(ink: Tensor, change: Change) -> None:
    """Draw a rule or squared paper under one line's ink, in place."""
    height, width = ink.shape[-2:]
    if change.rule is not None:
        y, start, length, thickness, shade = change.rule
        top = min(height - 1, int(y * height))
        area = ink[:, top : top + int(thickness), int(start * width) : int((start + length) * width)]
        area.copy_(area.clamp_min(shade))
    if change.grid is not None:
        pitch, phase, shade = change.grid
        step = max(4, int(pitch * height))
        columns = ink[:, :, int(phase * step) :: step]
        columns.copy_(columns.clamp_min(shade))
        down = max(4, step // 2)
        rows = ink[:, int(phase * down) :: down]
        rows.copy_(rows.clamp_min(shade))
