"""A document's file as pages. Runs in the render process only: the decoders work on files of strangers."""

from typing import Protocol

from services.kit.faults import Fault, invalid_field, too_large
from services.ocr import images
from services.ocr.documents.frames import Limits, Rendered, TextPage

FIELD = "content"
ACCEPTED = f"PDF, or one image: {images.ACCEPTED}"
# Readers of PDF allow for as many bytes of something else before the header.
_PDF_HEADER_WITHIN = 1024


class Source(Protocol):
    """An opened file."""

    @property
    def page_count(self) -> int:
        """At least 1."""

    def render(self, page: int, dpi: int) -> Rendered:
        """The page's pixels, `page` from 1; raises Fault when they cannot be had or are beyond the limits."""

    def searchable_pdf(self, pages: tuple[TextPage, ...], *, whole: bool) -> bytes:
        """These pages, or with `whole` the whole file, as PDF with the text lying invisibly over the writing."""


def is_pdf(content: bytes) -> bool:
    """Whether the file says that it is a PDF."""
    return b"%PDF-" in content[:_PDF_HEADER_WITHIN]


def is_recognised(content: bytes) -> bool:
    """Whether the first bytes are those of a file that can be read; looks no further."""
    return is_pdf(content) or images.signature(content) is not None


def open_source(content: bytes, limits: Limits) -> Source:
    """Open the file by its content, whatever it was called; raises Fault (INVALID_ARGUMENT) when it is none."""
    # Each library is loaded only for the files that need it: the process serves one document.
    if is_pdf(content):
        from services.ocr.documents.pdf import PdfSource

        return PdfSource(content, limits)
    from services.ocr.documents.pictures import PictureSource

    return PictureSource(content, limits)


def damaged(what: str) -> Fault:
    """The file, or the part of it that `what` names, cannot be read."""
    return invalid_field(FIELD, f"{what}; send the whole file, undamaged", reason="DOCUMENT_DAMAGED")


def too_many_pixels(page: int, width: int, height: int, limit: int, advice: str) -> Fault:
    """The page would have more pixels than the limit; `advice` says what would help."""
    return too_large(
        FIELD,
        "PAGE_TOO_MANY_PIXELS",
        f"page {page} has {width}x{height} pixels, {width * height}, more than the limit of {limit}; {advice}",
        page=page,
        width=width,
        height=height,
        limit_pixels=limit,
    )


def too_small(page: int, width: int, height: int, limit: int) -> Fault:
    """The page is too small to hold writing."""
    return invalid_field(
        FIELD,
        f"page {page} has {width}x{height} pixels; each side must be at least {limit}",
        reason="PAGE_TOO_SMALL",
        page=page,
        width=width,
        height=height,
        min_side=limit,
    )
