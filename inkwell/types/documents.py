"""A document that was read: pages, their lines, and files made of them."""

import enum
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from inkwell.files import write_atomically
from inkwell.types.common import Queued, ServedBy, Started, Timing
from inkwell.types.reading import Reading


class ExportFormat(enum.StrEnum):
    """A file that a document's result is written as."""

    TEXT = "text"
    """UTF-8, a line a line, an empty line between blocks, a form feed between pages."""
    JSON = "json"
    HOCR = "hocr"
    ALTO = "alto"
    PAGE_XML = "page-xml"
    """A ZIP archive of one file a page when there are several."""
    SEARCHABLE_PDF = "pdf"


@dataclass(frozen=True, slots=True)
class Export:
    """A file that the service made of a document."""

    format: ExportFormat
    media_type: str
    content: bytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to `path`, whole or not at all; raises OSError."""
        return write_atomically(path, self.content)


@dataclass(frozen=True, slots=True)
class DocumentLine:
    """One line of a page."""

    order: int
    """Place among the lines found on its page, in reading order from 1; lines left out leave gaps."""
    block: int
    """Column or paragraph it belongs to, from 1, in reading order."""
    polygon: tuple[tuple[float, float], ...]
    """Its corners (x, y) in pixels of the page as it came, clockwise from where its text begins at the top."""
    angle: float
    """Direction of the writing in degrees clockwise from level, -180 to 180, on the page as it came."""
    detection_score: float
    """How sure the detector is that this is a line, 0 to 1."""
    reading: Reading

    @property
    def text(self) -> str:
        """What was read."""
        return self.reading.text

    @property
    def confidence(self) -> float:
        """The reading's confidence, 0 to 1."""
        return self.reading.confidence


@dataclass(frozen=True, slots=True)
class DocumentPage:
    """One page. Its `lines` are in reading order, and empty while it is not read."""

    page: int
    """From 1, in the document."""
    width: int
    height: int
    dpi: float
    """Dots per inch that its pixels stand for; 0 when unknown."""
    rotation: int
    """Degrees it was turned clockwise to be upright: 0, 90, 180 or 270."""
    skew: float
    """Degrees clockwise that the writing leans after that."""
    line_count: int
    """Lines found on it, those of too little confidence included."""
    lines: tuple[DocumentLine, ...] = ()

    @property
    def text(self) -> str:
        """Its lines in reading order, an empty line between blocks."""
        blocks = groupby(self.lines, key=lambda line: line.block)
        return "\n\n".join("\n".join(line.text for line in block) for _, block in blocks)


@dataclass(frozen=True, slots=True)
class Document:
    """All pages that were read, in the order asked for, and the files made of them."""

    pages: tuple[DocumentPage, ...]
    exports: Mapping[str, Export]
    """By format, such as "hocr"."""
    page_count: int
    line_count: int
    dropped_line_count: int
    """Lines left out for `min_confidence`."""
    blank_line_count: int
    """Lines found that hold no writing; left out too."""
    confidence: float
    """Mean of the lines' confidences, each counted by the length of its text; 0 without a line."""
    timing: Timing
    served_by: ServedBy

    @property
    def text(self) -> str:
        """The pages' texts; every page but the first begins with a form feed."""
        return "\n\f".join(page.text for page in self.pages)

    @property
    def lines(self) -> Iterator[DocumentLine]:
        """The lines of all pages, in reading order."""
        return (line for page in self.pages for line in page.lines)


@dataclass(frozen=True, slots=True)
class DocumentProgress:
    """Pages done and to be read; lines done and found so far; `eta_ms` until the end, 0 while nothing is done."""

    sequence: int
    page_done_count: int
    page_count: int
    line_done_count: int
    line_count: int
    eta_ms: int


@dataclass(frozen=True, slots=True)
class PageStarted:
    """A page's lines are found and will be read."""

    sequence: int
    page: DocumentPage


@dataclass(frozen=True, slots=True)
class LineRead:
    """A line of the page `page` was read. Lines come as they are ready, not in reading order."""

    sequence: int
    page: int
    line: DocumentLine


@dataclass(frozen=True, slots=True)
class PageRead:
    """A page is done, with every line of it that counts."""

    sequence: int
    page: DocumentPage


@dataclass(frozen=True, slots=True)
class ExportReady:
    """A file is complete."""

    sequence: int
    export: Export


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """Always the last event of a document."""

    sequence: int
    document: Document


DocumentEvent: TypeAlias = (
    Queued | Started | DocumentProgress | PageStarted | LineRead | PageRead | ExportReady | DocumentResult
)
