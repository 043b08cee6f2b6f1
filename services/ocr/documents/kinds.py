"""Which files are documents, and the faults that pages end in. Known to the front and to the render process."""

from services.kit import images
from services.kit.faults import Fault, invalid_field, too_large

FIELD = "content"
ACCEPTED = f"PDF, or one image: {images.ACCEPTED}"
# Readers of PDF allow for as many bytes of something else before the header.
_PDF_HEADER_WITHIN = 1024


def is_pdf(content: bytes) -> bool:
    """Whether the file says that it is a PDF."""
    return b"%PDF-" in content[:_PDF_HEADER_WITHIN]


def is_recognised(content: bytes) -> bool:
    """Whether the first bytes are those of a file that can be read; looks no further."""
    return is_pdf(content) or images.signature(content) is not None


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
