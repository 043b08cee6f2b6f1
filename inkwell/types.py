"""What calls answer with: plain frozen dataclasses, no protobuf.

Names, units and ranges are those of the protos; a field called `x_ms` is in milliseconds, `x_count` counts.
"""

import enum
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

ImageSource: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str]
"""An encoded picture: its bytes, or the path of its file."""


class ModelState(enum.StrEnum):
    """Whether a model can serve."""

    UNKNOWN = "unknown"
    LOADING = "loading"
    READY = "ready"


class EndpointState(enum.StrEnum):
    """Whether a gateway gives calls to an endpoint."""

    UNKNOWN = "unknown"
    CONNECTING = "connecting"
    READY = "ready"
    NOT_READY = "not_ready"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a call went, as the service saw it."""

    queue_ms: float
    engine_ms: float


@dataclass(frozen=True, slots=True)
class ServedBy:
    """Who did the work; what nobody told is empty. Only a gateway names pools, only streams name the runtime."""

    hardware: str = ""
    runtime: str = ""
    pool: str = ""
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture and its IANA media type, such as "image/jpeg"."""

    content: bytes
    media_type: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the encoded bytes to `path`, whole or not at all; raises OSError."""
        return write_atomically(path, self.content)


# --- reading -------------------------------------------------------------------------------------------------------


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

    @property
    def text(self) -> str:
        """The best hypothesis' text."""
        return self.hypotheses[0].text

    @property
    def confidence(self) -> float:
        """The best hypothesis' confidence, 0 to 1."""
        return self.hypotheses[0].confidence

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


# --- painting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerationParameters:
    """Everything that decides a picture, all defaults filled in. The same values are embedded in its file."""

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    step_count: int
    guidance_scale: float
    scheduler: str
    seed: int


@dataclass(frozen=True, slots=True)
class Picture(Image):
    """One finished picture. `warnings` say what the caller should know, such as a prompt that was cut off."""

    parameters: GenerationParameters
    served_by: ServedBy
    warnings: tuple[str, ...]


# --- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """The call waits; `position` admitted calls stand before it."""

    sequence: int
    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """An engine took the call; these ran it."""

    sequence: int
    hardware: str
    runtime: str
    model: str


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


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` (1 to `step_count`) is done; the result is estimated to come in `eta_ms`."""

    sequence: int
    step: int
    step_count: int
    eta_ms: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What the pictures of the call, in order, look like after `step`."""

    sequence: int
    step: int
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class PaintResult:
    """Always the last event of a paint."""

    sequence: int
    pictures: tuple[Picture, ...]
    timing: Timing
    served_by: ServedBy
    warnings: tuple[str, ...]


ReadEvent: TypeAlias = Queued | Started | Partial | ReadResult
PaintEvent: TypeAlias = Queued | Started | Progress | Preview | PaintResult


# --- what there is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a text is searched for; the fields are those of `Client.read`."""

    beam_width: int
    hypothesis_count: int
    length_penalty: float
    max_new_token_count: int


@dataclass(frozen=True, slots=True)
class OcrModel:
    """A model that reads. `dtype` is that of its weights in memory; `default_decoding` is what unset options mean."""

    name: str
    state: ModelState
    hardware: str
    runtime: str
    dtype: str
    parameter_count: int
    is_default: bool
    default_decoding: Decoding
    max_new_token_limit: int


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """A model that paints. Width and height (pixels) must be multiples of `size_multiple`."""

    name: str
    state: ModelState
    hardware: str
    runtime: str
    dtype: str
    parameter_count: int
    is_default: bool
    pipeline: str
    default_width: int
    default_height: int
    size_multiple: int
    default_step_count: int
    default_guidance_scale: float
    default_scheduler: str
    prompt_token_limit: int
    has_preview_autoencoder: bool


Model: TypeAlias = OcrModel | DiffusionModel


@dataclass(frozen=True, slots=True)
class Scheduler:
    """A scheduler by the short name that `Client.paint` takes, and the diffusers class behind it."""

    name: str
    diffusers_class: str
    description: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server behind a gateway, and what that gateway has sent it since it started."""

    address: str
    state: EndpointState
    in_flight_count: int
    call_count: int
    unavailable_count: int
    last_error: str


@dataclass(frozen=True, slots=True)
class Pool:
    """Endpoints that run one service ("ocr" or "diffusion") on one kind of hardware."""

    name: str
    service: str
    hardware: str
    targets: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to a temporary neighbour and rename it to `path`, so that no reader ever sees half a file.

    Permissions are those of the file that is replaced, or of any new file. Raises OSError.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, _mode_for(target))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _mode_for(target: Path) -> int:
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
