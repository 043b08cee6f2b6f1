"""PDF files, by PDFium: pages drawn as pixels, and text laid invisibly over them."""

import ctypes
import io
import math

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from services.kit.faults import invalid_field
from services.ocr.documents import kinds
from services.ocr.documents.frames import Limits, Rendered, TextPage
from services.ocr.documents.invisible_text import Affine, lay_text

_POINTS_PER_INCH = 72.0
DPI_LEAST = 72
# Device coordinates are whole numbers; so many to a pixel make their rounding too small to see.
_STEPS_PER_PIXEL = 64


class PdfSource:
    """An opened PDF. Implements `sources.Source`."""

    def __init__(self, content: bytes, limits: Limits) -> None:
        self._limits = limits
        try:
            self._pdf = pdfium.PdfDocument(content)
            self.page_count = len(self._pdf)
        except pdfium.PdfiumError as error:
            if error.err_code in (pdfium_c.FPDF_ERR_PASSWORD, pdfium_c.FPDF_ERR_SECURITY):
                raise invalid_field(
                    kinds.FIELD,
                    "the PDF is encrypted and needs a password; send it without one",
                    reason="DOCUMENT_ENCRYPTED",
                ) from None
            raise kinds.damaged("the PDF is damaged or ends too early") from None
        if self.page_count < 1:
            raise invalid_field(kinds.FIELD, "the PDF has no pages", reason="DOCUMENT_EMPTY")

    def render(self, page: int, dpi: int) -> Rendered:
        """Draw the page with its annotations on white."""
        scale = dpi / _POINTS_PER_INCH
        try:
            width_pt, height_pt = self._pdf.get_page_size(page - 1)
            self._check_size(page, width_pt, height_pt, dpi)
            opened = self._pdf[page - 1]
            bitmap = opened.render(scale=scale, rev_byteorder=True, draw_annots=True)
        except pdfium.PdfiumError:
            raise kinds.damaged(f"page {page} of the PDF is damaged and cannot be drawn") from None
        image = bitmap.to_pil().convert("RGB")
        rendered = Rendered(image.width, image.height, float(dpi), image.tobytes())
        opened.close()
        return rendered

    def searchable_pdf(self, pages: tuple[TextPage, ...], *, whole: bool) -> bytes:
        """The pages as they are, with text added; the content of the original pages is not touched."""
        pdf = self._pdf
        numbers = [page.page - 1 for page in pages]
        if not whole:
            pdf = pdfium.PdfDocument.new()
            pdf.import_pages(self._pdf, numbers)
            numbers = list(range(len(pages)))
        targets = [pdf[number] for number in numbers]
        lay_text(pdf, targets, pages, [_to_user_space(t, p) for t, p in zip(targets, pages, strict=True)])
        return saved(pdf)

    def _check_size(self, page: int, width_pt: float, height_pt: float, dpi: int) -> None:
        if not (math.isfinite(width_pt) and math.isfinite(height_pt) and width_pt > 0 and height_pt > 0):
            raise kinds.damaged(f"page {page} of the PDF has no size")
        width, height = _pixels(width_pt, height_pt, dpi)
        limit = self._limits.max_page_pixels
        if width * height > limit:
            fits = _fitting_dpi(width_pt, height_pt, limit)
            advice = (
                f"at {fits} dpi it would fit" if fits >= DPI_LEAST else f"it does not fit at {DPI_LEAST} dpi either"
            )
            raise kinds.too_many_pixels(page, width, height, limit, f"{dpi} dpi were asked for, {advice}")
        if min(width, height) < self._limits.min_page_side:
            raise kinds.too_small(page, width, height, self._limits.min_page_side)


def saved(pdf: pdfium.PdfDocument) -> bytes:
    """The document as a file; raises Fault when PDFium cannot write it."""
    buffer = io.BytesIO()
    try:
        pdf.save(buffer)
    except pdfium.PdfiumError:
        raise kinds.damaged("the PDF cannot be written anew") from None
    return buffer.getvalue()


def _fitting_dpi(width_pt: float, height_pt: float, limit: int) -> int:
    """The most dots per inch, a whole number, at which a page has no more pixels than the limit."""
    dpi = math.floor(_POINTS_PER_INCH * math.sqrt(limit / (width_pt * height_pt)))
    # Sides are rounded up to whole pixels, which may be too much by a little.
    while dpi > 0 and math.prod(_pixels(width_pt, height_pt, dpi)) > limit:
        dpi -= 1
    return dpi


def _pixels(width_pt: float, height_pt: float, dpi: int) -> tuple[int, int]:
    scale = dpi / _POINTS_PER_INCH
    return math.ceil(width_pt * scale), math.ceil(height_pt * scale)


def _to_user_space(target: pdfium.PdfPage, page: TextPage) -> Affine:
    """From pixels of the rendered page to the page's own coordinates, its crop box and rotation reckoned with."""
    width, height = page.width * _STEPS_PER_PIXEL, page.height * _STEPS_PER_PIXEL

    def at(x: int, y: int) -> tuple[float, float]:
        user_x, user_y = ctypes.c_double(), ctypes.c_double()
        pdfium_c.FPDF_DeviceToPage(target, 0, 0, width, height, 0, x, y, user_x, user_y)
        return user_x.value, user_y.value

    origin, right, down = at(0, 0), at(width, 0), at(0, height)
    return Affine(
        (right[0] - origin[0]) / page.width,
        (right[1] - origin[1]) / page.width,
        (down[0] - origin[0]) / page.height,
        (down[1] - origin[1]) / page.height,
        *origin,
    )
