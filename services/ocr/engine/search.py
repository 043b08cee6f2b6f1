"""Searching for the likeliest text: greedy and beam search over one line's rows. Pure bookkeeping, no tensors.

A search owns a few rows of the decoder. Each step it is told, for every row, the best next tokens, and answers which
row each of its next rows continues. Its choices are those of the transformers library's `generate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.ocr.domain import Decoding


@dataclass(frozen=True, slots=True)
class Beam:
    """A text under way. `total` is the sum of the scores it was chosen by, `log_probabilities` are the model's own.

    The two differ only where the model's generation config rules tokens out or forces them.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    total: float

    def extended(self, token: int, score: float, log_probability: float) -> "Beam":
        return Beam((*self.ids, token), (*self.log_probabilities, log_probability), self.total + score)

    def ranked(self, length_penalty: float) -> float:
        """The total per token, to the power of the penalty."""
        return self.total / math.pow(len(self.ids), length_penalty)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best next tokens of one row, best first: ids, the scores to rank by, the model's log-probabilities."""

    ids: Sequence[int]
    scores: Sequence[float]
    log_probabilities: Sequence[float]


class Search(Protocol):
    """One line's search. `beams` are its rows, best first; it starts with one row that has no token yet."""

    beams: list[Beam]
    candidate_count: int  # how many candidates it needs for each row

    def advance(self, rows: Sequence[Candidates]) -> list[int]:
        """Take one step; answers for each of the new `beams` the row it continues, nothing when the search ended."""

    def results(self) -> list[tuple[Beam, float]]:
        """The finished beams with their scores, best first; call once the search has ended.

        Empty only if every token was ruled out before any text was finished.
        """


def start(decoding: Decoding, *, eos_ids: frozenset[int]) -> Search:
    """A new search, greedy for a beam_width of 1."""
    if decoding.beam_width == 1:
        return Greedy(decoding, eos_ids)
    return BeamSearch(decoding, eos_ids)


class Greedy:
    """Takes the likeliest token each time."""

    def __init__(self, decoding: Decoding, eos_ids: frozenset[int]) -> None:
        self.beams = [Beam((), (), 0.0)]
        self.candidate_count = 1
        self._decoding = decoding
        self._eos_ids = eos_ids

    def advance(self, rows: Sequence[Candidates]) -> list[int]:
        (row,) = rows
        if row.scores[0] == -math.inf:
            self.beams = []
            return []
        beam = self.beams[0].extended(row.ids[0], row.scores[0], row.log_probabilities[0])
        self.beams = [beam]
        ended = beam.ids[-1] in self._eos_ids or len(beam.ids) >= self._decoding.max_new_token_count
        return [] if ended else [0]

    def results(self) -> list[tuple[Beam, float]]:
        return [(beam, beam.ranked(self._decoding.length_penalty)) for beam in self.beams]


class BeamSearch:
    """Keeps the beam_width likeliest texts under way, and the beam_width best finished ones."""

    def __init__(self, decoding: Decoding, eos_ids: frozenset[int]) -> None:
        self.beams = [Beam((), (), 0.0)]
        # Enough that beam_width can go on even when the best ones all end at this step.
        self.candidate_count = max(2, 1 + len(eos_ids)) * decoding.beam_width
        self._decoding = decoding
        self._eos_ids = eos_ids
        self._finished: list[tuple[float, Beam]] = []  # best first
        self._improvable = True

    def advance(self, rows: Sequence[Candidates]) -> list[int]:
        width, most = self._decoding.beam_width, self._decoding.max_new_token_count
        best = self._best_continuations(rows)
        ended = [beam.ids[-1] in self._eos_ids or len(beam.ids) >= most for _, beam in best]
        # The candidates past beam_width are only there to go on with; a text that ends among them is not good enough.
        self._finish([beam for (_, beam), end in zip(best[:width], ended, strict=False) if end])
        going_on = [pair for pair, end in zip(best, ended, strict=True) if not end][:width]
        if not going_on:
            return []
        self.beams = [beam for _, beam in going_on]
        return [row for row, _ in going_on] if self._worth_going_on() else []

    def results(self) -> list[tuple[Beam, float]]:
        return [(beam, score) for score, beam in self._finished]

    def _best_continuations(self, rows: Sequence[Candidates]) -> list[tuple[int, Beam]]:
        totals = [
            (self.beams[row].total + score, row, place)
            for row, candidates in enumerate(rows)
            for place, score in enumerate(candidates.scores)
            if score > -math.inf  # else the generation config rules it out
        ]
        totals.sort(key=lambda total: -total[0])
        return [
            (row, self.beams[row].extended(rows[row].ids[n], rows[row].scores[n], rows[row].log_probabilities[n]))
            for _, row, n in totals[: self.candidate_count]
        ]

    def _finish(self, ended: list[Beam]) -> None:
        full = len(self._finished) == self._decoding.beam_width
        if not self._improvable or (full and self._decoding.early_stopping == "first"):
            return
        self._finished += [(beam.ranked(self._decoding.length_penalty), beam) for beam in ended]
        self._finished.sort(key=lambda pair: -pair[0])
        del self._finished[self._decoding.beam_width :]

    def _worth_going_on(self) -> bool:
        if len(self._finished) < self._decoding.beam_width:
            return True
        if self._decoding.early_stopping == "first":
            return False
        best, penalty = self.beams[0], self._decoding.length_penalty
        # With a positive penalty a longer text ranks higher: "never" grants it all the length there is.
        hopeful = self._decoding.early_stopping == "never" and penalty > 0
        length = self._decoding.max_new_token_count if hopeful else len(best.ids)
        self._improvable = best.total / length**penalty > self._finished[-1][0]
        return self._improvable
