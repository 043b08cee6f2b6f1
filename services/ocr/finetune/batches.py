"""Which line stands where in the run, and batches of distorted lines with their tokens.

Everything about a place in the run follows from the seed and the place alone. So a run that was killed goes on as if
nothing had happened, and two processes see together exactly what one would see alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from services.ocr.finetune import augment
from services.ocr.finetune.lines import normalise, processor_size

IGNORED = -100  # a label that no loss counts
WINDOW = 8  # batches among which lines of like length are put together: less padding for the decoder to work through


@dataclass(frozen=True)
class Lines:
    """Resized lines (uint8 [lines, height, width, channels]) and their tokens, end mark included."""

    images: np.ndarray
    tokens: Sequence[Sequence[int]]


class Plan(Dataset[tuple[int, int, int]]):
    """The order of training: item i is (source, line, place). Sources with a share are drawn at random, line by line;
    without any share all lines come once before any comes twice."""

    def __init__(
        self, sources: Sequence[Lines], shares: Sequence[float | None], *, batch: int, steps: int, seed: int
    ) -> None:
        """`batch`: lines of one optimizer step, over all processes."""
        self.sources = sources
        self.batch, self.steps, self.seed = batch, steps, seed
        self.sizes = np.array([len(source.tokens) for source in sources])
        self.weights = None if all(share is None for share in shares) else weights(self.sizes.tolist(), shares)
        self._window = lru_cache(maxsize=4)(self._draw_window)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, place: int) -> tuple[int, int, int]:
        window, offset = divmod(place, self.batch * WINDOW)
        source, line = self._window(window)[offset]
        return int(source), int(line), place

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 1, epoch)).permutation(int(self.sizes.sum()))

    def _draw_window(self, window: int) -> np.ndarray:
        count = self.batch * WINDOW
        random = np.random.default_rng((self.seed, 2, window))
        if self.weights is None:
            places = np.arange(window * count, (window + 1) * count)
            total = int(self.sizes.sum())
            flat = np.array([self._permutation(int(place // total))[place % total] for place in places])
            ends = np.cumsum(self.sizes)
            source = np.searchsorted(ends, flat, side="right")
            line = flat - (ends - self.sizes)[source]
        else:
            source = random.choice(len(self.sizes), size=count, p=self.weights)
            line = (random.random(count) * self.sizes[source]).astype(np.int64)
        lengths = np.array([len(self.sources[s].tokens[n]) for s, n in zip(source, line, strict=True)])
        order = np.argsort(lengths, kind="stable").reshape(WINDOW, self.batch)
        order = order[random.permutation(WINDOW)]
        # Within a batch shuffled again: processes that share it get lines of like lengths.
        order = np.concatenate([random.permutation(part) for part in order])
        return np.stack([source[order], line[order]], axis=1)


def weights(sizes: Sequence[int], shares: Sequence[float | None]) -> np.ndarray:
    """Probability of each source: the shares, and what they leave over to the others by size; raises ValueError."""
    given = sum(share for share in shares if share is not None)
    rest = sum(size for size, share in zip(sizes, shares, strict=True) if share is None)
    if given > 1 + 1e-6:
        raise ValueError(f"the shares add up to {given:g}, which is more than 1")
    if rest and given > 1 - 1e-6:
        raise ValueError("the shares add up to 1 and leave nothing for the folders without one")
    left = 1 - given
    found = np.array(
        [share if share is not None else left * size / rest for size, share in zip(sizes, shares, strict=True)]
    )
    probabilities: np.ndarray = found / found.sum()
    return probabilities


@dataclass
class Collator:
    """Turns places of the plan into what the model is trained on."""

    sources: Sequence[Lines]
    processor: Any
    channels: int  # that the model wants; grey lines are stored with one
    start_id: int
    pad_id: int
    fillers: np.ndarray  # token ids that may stand in for others in the decoder's input
    seed: int
    strength: float  # of the distortion, 0 for none
    token_noise: float  # share of the decoder's input tokens that are replaced at random

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """Answers pixel_values [lines, channels, height, width], decoder_input_ids and labels [lines, tokens]."""
        randoms = [np.random.default_rng((self.seed, 3, place)) for _, _, place in items]
        stored = np.stack([self.sources[source].images[line] for source, line, _ in items])
        pixels = torch.from_numpy(stored).permute(0, 3, 1, 2)
        height, width = processor_size(self.processor)
        if self.strength > 0:
            changes = [augment.draw(random, self.strength, self.channels) for random in randoms]
            pixels = (1 - augment.apply(1 - pixels.float() / 255, changes, height, width, self.channels)) * 255
        rows = [self.sources[source].tokens[line] for source, line, _ in items]
        longest = max(len(row) for row in rows)
        labels = torch.full((len(rows), longest), IGNORED)
        inputs = torch.full((len(rows), longest), self.pad_id)
        for index, (row, random) in enumerate(zip(rows, randoms, strict=True)):
            tokens = np.array(row)
            labels[index, : len(tokens)] = torch.from_numpy(tokens)
            fed = tokens[:-1].copy()
            if self.token_noise > 0:
                wrong = random.random(len(fed)) < self.token_noise
                fed[wrong] = random.choice(self.fillers, size=int(wrong.sum()))
            inputs[index, 0] = self.start_id
            inputs[index, 1 : len(tokens)] = torch.from_numpy(fed)
        return {
            "pixel_values": normalise(pixels.expand(-1, self.channels, -1, -1), self.processor).contiguous(
                memory_format=torch.channels_last
            ),
            "decoder_input_ids": inputs,
            "labels": labels,
            "use_cache": False,
        }


def eval_pixels(lines: np.ndarray, processor: Any) -> Tensor:
    """Stored lines [lines, height, width, channels] as the model reads them."""
    pixels: Tensor = normalise(torch.from_numpy(np.array(lines)).permute(0, 3, 1, 2), processor)
    return pixels
