"""The rows that a TrOCR-style model is decoding, whatever runs its networks.

Bookkeeping only: which row stands where and looks at which image, and the tensors that hold their keys and values.
What is computed from them is the networks' (torch_trocr.py, graph_trocr.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FIRST_LENGTH = 64
_FIRST_ROWS = 4
# Where the whole buffer is read, it is longer than its rows by less than this.
_LENGTH_STEP = 32


@dataclass(frozen=True)
class Encoded:
    """Images that the encoder has seen, and that rows may look at."""

    images: int
    patches: int
    # Puts their cross-attention keys and values into [layers, 2 (keys, values), images, heads, patches, head size].
    write: Callable[[Tensor], None]


@dataclass(frozen=True)
class Step:
    """One token of every row. All tensors lie on the networks' device; indices are int64."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows], where each token stands in its row
    longest: int  # the largest position
    shortest: int  # the smallest
    # [layers, 2, rows or more, heads, longest + 1 or more, head size]: keys and values of earlier tokens at their
    # positions; what else it holds is finite. A step puts those of its own tokens there.
    past: Tensor
    places: Tensor  # 0, 1 … for each place of past
    row_numbers: Tensor  # 0, 1 … for each row
    cross: Tensor  # [layers, 2, images or more, heads, patches, head size]
    image_count: int
    # Which row is the n-th of each image [images, most rows of one], filled up with rows whose result nobody takes, and
    # where each row stands in it, flat [rows]. None when there is one row an image, in the same order.
    grid: Tensor | None
    grid_places: Tensor | None


class Networks(Protocol):
    """The two networks of one model, for inference on one thread at a time."""

    @property
    def runtime(self) -> str:
        """What computes, such as "torch"."""

    device: torch.device  # of all tensors that go in and come out
    dtype: torch.dtype  # of keys and values
    layer_count: int
    head_count: int
    head_size: int
    position_limit: int  # tokens that a row can have at most
    row_limit: int  # rows and images of one step at most
    image_limit: int  # images that are encoded together at most
    channels: int  # of images
    parameter_count: int
    weight_bytes: int
    has_class_token: bool
    # Whether a step reads the whole of `Step.past`, which is then kept short, or the part that rows fill.
    reads_whole_past: bool

    def states(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed images float [images, channels, height, width] to what the encoder answers for them.

        The result is [images, tokens, width of the encoder].
        """

    def encode(self, pixel_values: Tensor) -> Encoded:
        """Preprocessed images as in `states` to what the decoder looks at."""

    def step(self, step: Step) -> Tensor:
        """Write the tokens' keys and values into `past`; answers scores, float32 [rows, vocabulary]."""


class Rows:
    """The rows that a model is decoding: their caches, positions and the images they look at.

    Rows 0 … count-1 and images 0 … image_count-1 are in use, without holes, so that attention runs on slices of
    preallocated tensors. A row's keys and values lie at its own positions; a mask hides what is beyond. An image's
    cross-attention keys and values are computed once and shared by its rows.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        # [layers, 2 (keys, values), rows, heads, length, head size]
        self._past = self._empty(_FIRST_ROWS, _LENGTH_STEP if networks.reads_whole_past else _FIRST_LENGTH)
        # [layers, 2, images, heads, patches, head size]; its shape is known with the first image
        self._cross: Tensor | None = None
        self._row_positions: list[int] = []
        self._row_images: list[int] = []
        self._image_count = 0
        self._places: Tensor
        self._positions: Tensor
        self._grid: Tensor | None
        self._grid_places: Tensor | None
        self._seat()

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self._row_positions)

    @property
    def image_count(self) -> int:
        """Images in use."""
        return self._image_count

    def join(self, encoded: Encoded) -> list[int]:
        """Add images with one row each, at position 0; answers the rows.

        An image's number is image_count before the call, plus its place.
        """
        used, images = self._image_count, encoded.images
        self._grow_cross(used + images, encoded.patches)
        assert self._cross is not None
        # Straight to their places: together these are the largest tensors there are.
        encoded.write(self._cross[:, :, used : used + images])
        rows = list(range(self.count, self.count + images))
        self._row_positions += [0] * images
        self._row_images += range(used, used + images)
        self._image_count += images
        self._grow(self.count, 1)
        self._seat()
        return rows

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to every row and move each one position on; answers scores, float32 [rows, vocabulary].

        The networks' position_limit bounds a row's steps.
        """
        assert self._cross is not None
        longest = max(self._row_positions)
        self._grow(self.count, longest + 1)
        scores = self._networks.step(
            Step(
                tokens=torch.tensor(tokens, device=self._networks.device),
                positions=self._positions,
                longest=longest,
                shortest=min(self._row_positions),
                past=self._past,
                places=self._places,
                row_numbers=self._row_numbers,
                cross=self._cross,
                image_count=self._image_count,
                grid=self._grid,
                grid_places=self._grid_places,
            )
        )
        self._row_positions = [position + 1 for position in self._row_positions]
        self._positions = self._positions + 1
        return scores

    def rearrange(self, groups: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, list[int]]]:
        """Keep only these: for each image its number and, for each row it is to have, the row to continue from.

        A row may be continued by several; rows and images that are not named are gone. Answers for each image its
        number and rows from now on, in the order asked.
        """
        wanted = [source for _, sources in groups for source in sources]
        if wanted == list(range(self.count)) and [image for image, _ in groups] == list(range(self._image_count)):
            return [(image, list(sources)) for image, sources in groups]
        rows = _seats(wanted)
        images = _seats([image for image, _ in groups])
        length = max((self._row_positions[source] for source in wanted), default=0)
        self._grow(len(wanted), length)
        _move(self._past[..., :length, :], wanted, rows)
        if self._cross is not None:
            _move(self._cross, [image for image, _ in groups], images)
        positions, row_images, placed = [0] * len(rows), [0] * len(rows), []
        taken = iter(zip(rows, wanted, strict=True))
        for image, (_, sources) in zip(images, groups, strict=True):
            own = []
            for row, source in (next(taken) for _ in sources):
                positions[row], row_images[row] = self._row_positions[source], image
                own.append(row)
            placed.append((image, own))
        self._row_positions, self._row_images, self._image_count = positions, row_images, len(images)
        self._shorten(length)
        self._seat()
        return placed

    def _seat(self) -> None:
        """Rebuild the index tensors after rows or images changed."""
        device = self._networks.device
        self._row_numbers = torch.arange(self.count, device=device)
        self._positions = torch.tensor(self._row_positions, dtype=torch.int64, device=device)
        self._places = torch.arange(self._past.shape[4], device=device)
        self._grid = self._grid_places = None
        if self._row_images != list(range(self._image_count)):
            own: list[list[int]] = [[] for _ in range(self._image_count)]
            places = []
            for row, image in enumerate(self._row_images):
                places.append((image, len(own[image])))
                own[image].append(row)
            most = max(map(len, own))
            # Images with fewer rows are filled up with a row whose result nobody takes.
            self._grid = torch.tensor([rows + rows[:1] * (most - len(rows)) for rows in own]).to(device)
            self._grid_places = torch.tensor([image * most + place for image, place in places]).to(device)

    def _grow(self, rows: int, length: int) -> None:
        has_rows, has_length = self._past.shape[2], self._past.shape[4]
        if rows <= has_rows and length <= has_length:
            return
        new_rows = has_rows if rows <= has_rows else max(rows, 2 * has_rows)
        if length <= has_length:
            new_length = has_length
        elif self._networks.reads_whole_past:
            new_length = _rounded_up(length)
        else:
            new_length = max(length, 2 * has_length)
        past = self._empty(new_rows, new_length)
        past[:, :, :has_rows, :, :has_length] = self._past
        self._set_past(past)

    def _shorten(self, length: int) -> None:
        """Give places back when the longest rows have left, where empty ones cost time."""
        length = _rounded_up(length + 1)
        if self._networks.reads_whole_past and 2 * length <= self._past.shape[4]:
            past = self._empty(self._past.shape[2], length)
            past[:, :, : self.count] = self._past[:, :, : self.count, :, : past.shape[4]]
            self._set_past(past)

    def _set_past(self, past: Tensor) -> None:
        self._past = past
        self._places = torch.arange(past.shape[4], device=past.device)

    def _grow_cross(self, images: int, patches: int) -> None:
        has = 0 if self._cross is None else self._cross.shape[2]
        if images <= has:
            return
        networks = self._networks
        shape = (
            networks.layer_count,
            2,
            max(images, 2 * has, _FIRST_ROWS),
            networks.head_count,
            patches,
            networks.head_size,
        )
        grown = torch.empty(shape, dtype=networks.dtype, device=networks.device)
        if self._cross is not None:
            grown[:, :, : self._image_count] = self._cross[:, :, : self._image_count]
        self._cross = grown

    def _empty(self, rows: int, length: int) -> Tensor:
        networks = self._networks
        length = min(length, networks.position_limit)
        shape = (networks.layer_count, 2, rows, networks.head_count, length, networks.head_size)
        # Zeros, because masked places are still multiplied, and zero times an uninitialised NaN is NaN.
        return torch.zeros(shape, dtype=networks.dtype, device=networks.device)


def _rounded_up(length: int) -> int:
    return -(-max(length, 1) // _LENGTH_STEP) * _LENGTH_STEP


def _seats(sources: Sequence[int]) -> list[int]:
    """A place below len(sources) for each source, its own where that is free, so that little has to be moved.

    A place other than the source's own is never a source too: the first to ask for a source below len(sources) stays
    there.
    """
    places: list[int | None] = [None] * len(sources)
    free = set(range(len(sources)))
    for index, source in enumerate(sources):
        if source in free:
            places[index] = source
            free.remove(source)
    rest = iter(sorted(free))
    return [next(rest) if place is None else place for place in places]


def _move(cache: Tensor, sources: Sequence[int], places: Sequence[int]) -> None:
    """Copy rows (dimension 2) of a cache to places out of `_seats`."""
    for source, place in zip(sources, places, strict=True):
        if source != place:
            # One by one: gathering them first takes memory as large again, and up to seven times as long.
            cache[:, :, place] = cache[:, :, source]
