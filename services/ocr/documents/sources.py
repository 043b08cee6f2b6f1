"""A document's file as pages. Runs in the render process only: the decoders work on files of strangers."""

from typing import Protocol

from services.ocr.documents import kinds
from services.ocr.documents.frames import Limits, Rendered, TextPage
from services.ocr.documents.pdf import PdfSource
from services.ocr.documents.pictures import PictureSource


class Source(Protocol):
    """An opened file."""

    @property
    def page_count(self) -> int:
        """At least 1."""

    def render(self, page: int, dpi: int) -> Rendered:
        """The page's pixels, `page` from 1; raises Fault when they cannot be had or are beyond the limits."""

    def searchable_pdf(self, pages: tuple[TextPage, ...], *, whole: bool) -> bytes:
        """These pages, or with `whole` the whole file, as PDF with the text lying invisibly over the writing."""


def open_source(content: bytes, limits: Limits) -> Source:
    """Open the file by its content, whatever it was called; raises Fault (INVALID_ARGUMENT) when it is none."""
    return PdfSource(content, limits) if kinds.is_pdf(content) else PictureSource(content, limits)
