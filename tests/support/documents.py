"""Documents to read: pages of the embedded model's samples with known truth, and files that are wrong on purpose."""

import csv
import difflib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
from PIL import Image

from inkwell.ocr.v1 import ocr_pb2

SAMPLES = Path(__file__).resolve().parents[2] / "models" / "handwriting-tiny" / "samples"

_LINE_HEIGHT, _PITCH, _LEFT = 64, 110, 80


@dataclass(frozen=True)
class WrittenPage:
    """A page and, for each line in reading order, its text and the box it was written in."""

    image: Image.Image
    texts: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


def written(*numbers: int, width: int = 900) -> WrittenPage:
    """A white page with the samples of these numbers (from 0) on it, one below the other."""
    with (SAMPLES / "labels.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    image = Image.new("RGB", (width, 160 + _PITCH * len(numbers)), "white")
    texts, boxes = [], []
    for place, number in enumerate(numbers):
        line = Image.open(SAMPLES / rows[number]["file"]).convert("RGB")
        line = line.resize((round(line.width * _LINE_HEIGHT / line.height), _LINE_HEIGHT), Image.Resampling.LANCZOS)
        top = 90 + _PITCH * place
        image.paste(line, (_LEFT, top))
        texts.append(rows[number]["text"])
        boxes.append((_LEFT, top, _LEFT + line.width, top + _LINE_HEIGHT))
    return WrittenPage(image, tuple(texts), tuple(boxes))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(images: Sequence[Image.Image]) -> bytes:
    """All images in one TIFF."""
    return encoded(images[0], "TIFF", save_all=True, append_images=images[1:], compression="tiff_lzw", dpi=(150, 150))


def pdf(images: Iterable[Image.Image], *, dpi: float = 100, turned: int = 0, inset: float = 0) -> bytes:
    """A PDF of one image a page, one pixel a dot. turned: /Rotate of every page. inset: points that the crop box
    leaves out on every side, around the image."""
    document = pdfium.PdfDocument.new()
    for image in images:
        upright = image.rotate(turned, expand=True)  # counter-clockwise, so that the viewer's turn undoes it
        width, height = upright.width * 72 / dpi, upright.height * 72 / dpi
        page = document.new_page(width + 2 * inset, height + 2 * inset)
        picture = pdfium.PdfImage.new(document)
        picture.set_bitmap(pdfium.PdfBitmap.from_pil(upright))
        picture.set_matrix(pdfium.PdfMatrix(width, 0, 0, height, inset, inset))
        page.insert_obj(picture)
        page.gen_content()
        page.set_rotation(turned)
        if inset:
            page.set_cropbox(inset, inset, inset + width, inset + height)
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def bare_pdf(*, pages: int = 1, media_box: str = "0 0 144 144", content: bytes = b"", trailer: str = "") -> bytes:
    """A PDF written by hand, every page with the same content."""
    first_page = 4
    kids = " ".join(f"{number} 0 R" for number in range(first_page, first_page + pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {pages} /Kids [{kids}] /MediaBox [{media_box}] >>".encode(),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        *([b"<< /Type /Page /Parent 2 0 R /Contents 3 0 R /Resources << >> >>"] * pages),
    ]
    body, offsets = b"%PDF-1.7\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, text)
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    return (
        body
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(body)}\n%%EOF\n"
        ).encode()
    )


def encrypted_pdf() -> bytes:
    """A PDF that opens with a password only (which nobody knows)."""
    word = "<" + "5a" * 32 + ">"
    return bare_pdf(trailer=f"/Encrypt << /Filter /Standard /V 1 /R 2 /O {word} /U {word} /P -4 >> /ID [<0123> <0123>]")


@dataclass
class Told:
    """What a stream said about a document."""

    responses: list[ocr_pb2.ReadDocumentResponse] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [str(response.WhichOneof("event")) for response in self.responses]

    def all(self, kind: str) -> list[Any]:
        """The events of one kind."""
        return [getattr(r, kind) for r in self.responses if r.WhichOneof("event") == kind]

    @property
    def pages(self) -> list[ocr_pb2.PageRead]:
        return self.all("page")

    @property
    def result(self) -> ocr_pb2.DocumentResult:
        result: ocr_pb2.DocumentResult
        (result,) = self.all("result")
        assert self.kinds[-1] == "result"
        return result

    def texts(self, page: int = 0) -> list[str]:
        """The best text of each line of a page, pages counted from 0 as they came."""
        return [line.recognition.hypotheses[0].text for line in self.pages[page].lines]

    def export(self, wanted: ocr_pb2.ExportFormat.ValueType) -> bytes:
        """A whole exported file."""
        pieces = [chunk for chunk in self.all("export") if chunk.format == wanted]
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len({piece.media_type for piece in pieces}) == 1
        return b"".join(piece.content for piece in pieces)


def alike(read: Sequence[str], truth: Sequence[str], least: float = 0.85) -> bool:
    """Whether as many lines were read, in the same order, each nearly as written: the model makes small mistakes."""
    return len(read) == len(truth) and all(
        difflib.SequenceMatcher(None, a, b).ratio() >= least for a, b in zip(read, truth, strict=True)
    )
