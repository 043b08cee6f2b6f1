"""From a model's own confidence to the share of right characters to expect, as measured on lines it never saw.

A model folder may bring `calibration.json`, which `python -m services.ocr.calibrate` writes. It holds one map for
greedy and one for beam search, because a search among many texts finds one with a higher probability than it merits.
"""

from bisect import bisect_right
from pathlib import Path

import msgspec

from services.runtimes.checkpoints import weights_sha256

FILE = "calibration.json"
FORMAT = 1


class Map(msgspec.Struct, frozen=True):
    """A rising line through points (confidence of the model, expected share of right characters), each 0 to 1.

    Level before the first and after the last point.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, confidence: float) -> float:
        """The share of right characters to expect, 0 to 1."""
        after = bisect_right(self.points, confidence, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[min(after, len(self.points) - 1)][1]
        (left, low), (right, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (confidence - left) / (right - left)


class Error(msgspec.Struct, frozen=True):
    """How far confidences are from the truth on lines that the map was not fitted on: expected calibration error."""

    before: float
    after: float


class Calibration(msgspec.Struct, frozen=True):
    """The content of calibration.json."""

    format: int
    quantity: str  # what the maps answer
    weights_sha256: str  # of the weights it was fitted with; it says nothing of others
    fitted_on: str  # date, ISO 8601
    data: tuple[str, ...]  # names of the folders of lines
    line_count: int
    greedy: Map
    greedy_error: Error
    beams: Map
    beams_error: Error
    beam_width: int  # that `beams` was fitted with

    def expected(self, confidence: float, beam_width: int) -> float:
        """The share of right characters to expect of a best hypothesis, 0 to 1."""
        return (self.greedy if beam_width == 1 else self.beams)(confidence)


class CalibrationError(Exception):
    """calibration.json is there and cannot be used."""


def read(folder: Path, weights: str | None = None) -> Calibration | None:
    """The folder's calibration; None if it brings none, or one that belongs to other weights.

    weights: the digest of the weights that read with it, where they are not in the folder.

    Raises CalibrationError for a file that is no calibration.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error
    try:
        found = msgspec.json.decode(content, type=Calibration)
    except msgspec.DecodeError as error:
        raise CalibrationError(f"{path}: {error}") from error
    if found.format != FORMAT:
        raise CalibrationError(f"{path}: its format is {found.format}; this version reads format {FORMAT}")
    for name, line in (("greedy", found.greedy), ("beams", found.beams)):
        _check(line, f"{path}: {name}")
    return found if found.weights_sha256 == (weights or weights_sha256(folder)) else None


def _check(line: Map, where: str) -> None:
    flat = [value for point in line.points for value in point]
    lefts, rights = flat[::2], flat[1::2]
    if not flat or not all(0 <= value <= 1 for value in flat):
        raise CalibrationError(f"{where}: points must be pairs of numbers from 0 to 1, at least one")
    if rights != sorted(rights) or lefts != sorted(set(lefts)):
        raise CalibrationError(f"{where}: the points must rise")
