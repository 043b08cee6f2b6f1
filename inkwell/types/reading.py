"""A line that was read."""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from inkwell.types.common import Queued, ServedBy, Started, Timing


class EarlyStopping(enum.StrEnum):
    """When a beam search ends that has `beam_width` finished hypotheses."""

    FIRST = "first"
    """At once."""
    HEURISTIC = "heuristic"
    """When the best unfinished one cannot become better by its present length."""
    NEVER = "never"
    """Only when no unfinished one can become better by any length."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a text is searched for; the fields are those of `Client.read`."""

    beam_width: int
    hypothesis_count: int
    length_penalty: float
    max_new_token_count: int
    no_repeat_ngram_size: int = 0
    early_stopping: EarlyStopping | None = None
    """None when the server does not say."""


@dataclass(frozen=True, slots=True)
class Token:
    """One decoded token. `confidence` is its probability, 0 to 1; `log_probability` the natural logarithm of it."""

    id: int
    text: str
    log_probability: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One reading of a line.

    `log_probability` sums its tokens, the end token included; `score` is what beams are ranked by; `confidence` is
    the geometric mean of the token probabilities, 0 to 1.
    """

    text: str
    log_probability: float
    score: float
    confidence: float
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one picture; `hypotheses` has at least one, best first."""

    hypotheses: tuple[Hypothesis, ...]
    truncated: bool
    """True when decoding stopped at `max_new_token_count` and the text may go on."""
    model: str
    timing: Timing
    served_by: ServedBy
    confidence: float
    """How far to trust the text, 0 to 1. If `confidence_calibrated`, the expected share of right characters (1 -
    character error rate), fitted on lines the model was not trained on; else only the best hypothesis' confidence."""
    confidence_calibrated: bool = False
    repetition_suspected: bool = False
    """True when the text goes round in circles, as decoders do that have lost the line."""
    blank: bool = False
    """True when the picture holds no writing: nothing was decoded, the text is empty."""

    @property
    def text(self) -> str:
        """The best hypothesis' text."""
        return self.hypotheses[0].text

    @property
    def log_probability(self) -> float:
        """The best hypothesis' log-probability."""
        return self.hypotheses[0].log_probability

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The best hypothesis' tokens."""
        return self.hypotheses[0].tokens

    @property
    def alternatives(self) -> tuple[Hypothesis, ...]:
        """The hypotheses after the best one."""
        return self.hypotheses[1:]


@dataclass(frozen=True, slots=True)
class Partial:
    """The best text so far. Under beam search a later one may differ from an earlier one anywhere."""

    sequence: int
    text: str
    token_count: int


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Always the last event of a read."""

    sequence: int
    reading: Reading


ReadEvent: TypeAlias = Queued | Started | Partial | ReadResult
