"""What became of a document: its pages and lines, as the stream and the exports tell them."""

from datetime import datetime

import msgspec

from services.ocr.domain import Recognition

Point = tuple[float, float]


class PageInfo(msgspec.Struct, frozen=True):
    """What is known of a page before its lines are read."""

    page: int  # from 1, in the document
    width: int  # pixels
    height: int
    dpi: float  # 0 when unknown
    rotation: int  # degrees clockwise that bring it upright: 0, 90, 180 or 270
    skew: float  # degrees clockwise that the writing leans after that
    line_count: int  # lines found

    @property
    def turn(self) -> float:
        """Degrees clockwise that bring the writing level, above -180 to 180."""
        turn = (self.rotation - self.skew) % 360
        return turn - 360 if turn > 180 else turn


class LineResult(msgspec.Struct, frozen=True):
    """One line that was read."""

    order: int  # among the lines found on the page, from 1
    block: int  # from 1, in reading order
    polygon: tuple[Point, ...]  # four corners, clockwise from the text's top left, in pixels of the page as it came
    angle: float  # degrees clockwise from level, on the page as it came
    detection_score: float  # 0 to 1
    recognition: Recognition
    queue_ms: float = 0.0
    engine_ms: float = 0.0

    @property
    def text(self) -> str:
        """The best reading."""
        return self.recognition.hypotheses[0].text


class PageResult(msgspec.Struct, frozen=True):
    """A page that is done; only lines that count, in reading order."""

    info: PageInfo
    lines: tuple[LineResult, ...]

    @property
    def blocks(self) -> list[tuple[int, list[LineResult]]]:
        """The lines by block, in reading order."""
        blocks: dict[int, list[LineResult]] = {}
        for line in self.lines:
            blocks.setdefault(line.block, []).append(line)
        return list(blocks.items())


class Summary(msgspec.Struct, frozen=True):
    """The end of a document."""

    page_count: int
    line_count: int
    dropped_line_count: int  # confidence below the one asked for
    blank_line_count: int  # found, but without writing
    confidence: float  # mean over the lines, each counted by the length of its text; 0 without a line


class Origin(msgspec.Struct, frozen=True):
    """Who made a result, for the files that want to say."""

    model: str
    version: str
    created: datetime  # UTC
    page_count: int  # pages that the file will have


class Tally:
    """Counts lines as they come, towards the Summary."""

    def __init__(self) -> None:
        self.page_count = 0
        self.line_count = 0
        self.dropped_line_count = 0
        self.blank_line_count = 0
        self._weight = 0
        self._weighted = 0.0

    def count(self, line: LineResult) -> None:
        """A line of the result."""
        self.line_count += 1
        self._weight += len(line.text)
        self._weighted += len(line.text) * line.recognition.confidence

    def summary(self) -> Summary:
        """What was counted so far."""
        return Summary(
            self.page_count,
            self.line_count,
            self.dropped_line_count,
            self.blank_line_count,
            self._weighted / self._weight if self._weight else 0.0,
        )
