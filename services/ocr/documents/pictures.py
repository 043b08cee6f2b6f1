"""Images as documents: every page of a TIFF, or the one page of a photo."""

import io

import pypdfium2 as pdfium
from PIL import Image, ImageFile

from services.kit import images
from services.kit.faults import Fault, FaultData
from services.ocr.documents import kinds
from services.ocr.documents.frames import Limits, Rendered, TextPage
from services.ocr.documents.invisible_text import Affine, lay_text
from services.ocr.documents.pdf import saved

_POINTS_PER_INCH = 72.0
# What a PDF page's size is reckoned by when the image does not say; as PDF pages are rendered by default.
_ASSUMED_DPI = 200.0
# Resolutions outside are not those of a scanner or a camera, but some program's filler.
_DPI_LEAST, _DPI_MOST = 30.0, 4800.0
# The longest side a PDF page may have (ISO 32000-1, annex C.2), points.
_PDF_SIDE_MOST = 14_400.0
# Where the picture's own corners go on a unit square that is upright, for each EXIF orientation.
_PLACED = {
    1: (1, 0, 0, 1, 0, 0),
    2: (-1, 0, 0, 1, 1, 0),
    3: (-1, 0, 0, -1, 1, 1),
    4: (1, 0, 0, -1, 0, 1),
    5: (0, -1, -1, 0, 1, 1),
    6: (0, -1, 1, 0, 0, 1),
    7: (0, 1, 1, 0, 0, 0),
    8: (0, 1, -1, 0, 1, 0),
}


class PictureSource:
    """An opened image file. Implements `sources.Source`."""

    def __init__(self, content: bytes, limits: Limits) -> None:
        self._content = content
        self._limits = limits
        try:
            self._image = images.open_image(content, kinds.FIELD)
            # Only in a TIFF are further frames further pages; elsewhere they are an animation.
            tiff = self._image.format == "TIFF"
            self.page_count = self._count_frames() if tiff else 1
        except Fault as fault:
            raise _of_document(fault) from None

    def render(self, page: int, dpi: int) -> Rendered:
        """Decode the page, upright by its EXIF orientation, transparency laid on white."""
        image = self._decode(page)
        across, _ = self._resolution()
        return Rendered(image.width, image.height, across, image.tobytes())

    def searchable_pdf(self, pages: tuple[TextPage, ...], *, whole: bool) -> bytes:
        """A PDF of the images, a JPEG kept byte for byte, with the text."""
        pdf = pdfium.PdfDocument.new()
        targets: list[pdfium.PdfPage] = []
        affines: list[Affine] = []
        for number, page in enumerate(pages):
            width, height = self._add_page(pdf, page)
            targets.append(pdf[number])
            affines.append(Affine(width / page.width, 0, 0, -height / page.height, 0, height))
        lay_text(pdf, targets, pages, affines)
        return saved(pdf)

    def _add_page(self, pdf: pdfium.PdfDocument, page: TextPage) -> tuple[float, float]:
        """Append the picture as a page; answers its size in points."""
        decoded = self._decode(page.page)
        across, down = (dpi or _ASSUMED_DPI for dpi in self._resolution())
        width, height = decoded.width * _POINTS_PER_INCH / across, decoded.height * _POINTS_PER_INCH / down
        shrink = min(1.0, _PDF_SIDE_MOST / max(width, height))
        width, height = width * shrink, height * shrink
        # A document of its own, written and read again: so its pixels are compressed before the next page comes.
        single = pdfium.PdfDocument.new()
        target = single.new_page(width, height)
        picture = pdfium.PdfImage.new(single)
        orientation = 1
        if self._image.format == "JPEG":
            picture.load_jpeg(io.BytesIO(self._content), inline=True)
            orientation = images.orientation(self._image)
        else:
            grey = self._image.mode in ("1", "L")
            picture.set_bitmap(pdfium.PdfBitmap.from_pil(decoded.convert("L") if grey else decoded))
        a, b, c, d, e, f = _PLACED[orientation]
        picture.set_matrix(pdfium.PdfMatrix(a * width, b * height, c * width, d * height, e * width, f * height))
        target.insert_obj(picture)
        target.gen_content()
        pdf.import_pages(pdfium.PdfDocument(saved(single)))
        return width, height

    def _decode(self, page: int) -> Image.Image:
        limits = images.Limits(len(self._content), self._limits.max_page_pixels, self._limits.min_page_side)
        try:
            self._seek(page)
            return images.to_rgb(self._image, limits, kinds.FIELD)
        except Fault as fault:
            width, height = self._image.size
            match fault.data.reason:
                case "IMAGE_TOO_MANY_PIXELS":
                    advice = "scale the image down"
                    raise kinds.too_many_pixels(page, width, height, limits.max_pixels, advice) from None
                case "IMAGE_TOO_SMALL":
                    raise kinds.too_small(page, width, height, limits.min_side) from None
            raise _of_document(fault, page) from None

    def _seek(self, page: int) -> None:
        try:
            self._image.seek(page - 1)
        except Exception as error:  # noqa: BLE001 - a directory of the file can be broken in any way
            raise images.damaged("TIFF", error, kinds.FIELD) from None

    def _count_frames(self) -> int:
        image: ImageFile.ImageFile = self._image
        try:
            return int(getattr(image, "n_frames", 1))
        except Exception as error:  # noqa: BLE001 - as above
            raise images.damaged("TIFF", error, kinds.FIELD) from None

    def _resolution(self) -> tuple[float, float]:
        """Dots per inch across and down the upright image; 0 where unknown."""
        stated = self._image.info.get("dpi", (0, 0))
        try:
            across, down = (float(value) for value in stated)
        except (TypeError, ValueError, ZeroDivisionError):
            return 0.0, 0.0
        if not (_DPI_LEAST <= across <= _DPI_MOST and _DPI_LEAST <= down <= _DPI_MOST):
            return 0.0, 0.0
        turned = images.orientation(self._image) in (5, 6, 7, 8)
        return (down, across) if turned else (across, down)


def _of_document(fault: Fault, page: int = 0) -> Fault:
    """The same fault in the words of documents."""
    data = fault.data
    reason = "DOCUMENT_DAMAGED" if data.reason in ("IMAGE_DAMAGED", "IMAGE_TRUNCATED") else data.reason
    reason = "DOCUMENT_NOT_RECOGNISED" if reason == "IMAGE_NOT_RECOGNISED" else reason
    message = data.message.replace(f"{kinds.FIELD}: ", f"{kinds.FIELD}: page {page}: ", 1) if page else data.message
    return Fault(FaultData(data.kind, reason, message, fields=data.fields, metadata=data.metadata))
