"""The files that a document's result is written as.

Files grow page by page, on disk beyond some size, so that a long document takes no more memory than a short one.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from types import ModuleType
from typing import IO, Literal, Protocol

from services.ocr.documents.exports import alto, hocr, json, page_xml, text
from services.ocr.documents.result import Origin, PageResult, Summary

Format = Literal["json", "text", "hocr", "alto", "page_xml", "searchable_pdf"]

_IN_MEMORY_BYTES = 4 << 20


class Export(Protocol):
    """One file being written."""

    @property
    def media_type(self) -> str:
        """Of the finished file."""

    def add(self, page: PageResult) -> None:
        """Write a page that is done."""

    def finish(self, summary: Summary) -> None:
        """Write the rest."""

    def pieces(self, size: int) -> Iterator[bytes]:
        """The finished file in pieces of at most `size` bytes, at least one."""

    def close(self) -> None:
        """Let go of the file."""


class _Spooled:
    def __init__(self, media_type: str) -> None:
        self.media_type = media_type
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - see close

    def pieces(self, size: int) -> Iterator[bytes]:
        self._file.seek(0)
        yield self._file.read(size)
        while piece := self._file.read(size):
            yield piece

    def close(self) -> None:
        self._file.close()


class TextExport(_Spooled):
    """A file of text whose module writes head, pages and tail."""

    def __init__(self, module: ModuleType, origin: Origin) -> None:
        super().__init__(module.MEDIA_TYPE)
        self._module = module
        self._count = 0
        self._file.write(module.head(origin).encode())

    def add(self, page: PageResult) -> None:
        self._file.write(self._module.page(page, self._count).encode())
        self._count += 1

    def finish(self, summary: Summary) -> None:
        self._file.write(self._module.tail(summary).encode())


class PageXmlExport(_Spooled):
    """One XML file, or of several pages a ZIP archive of one file each."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        several = origin.page_count > 1
        super().__init__("application/zip" if several else page_xml.MEDIA_TYPE)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED) if several else None

    def add(self, page: PageResult) -> None:
        document = page_xml.document(page, self._origin).encode()
        if self._archive is None:
            self._file.write(document)
        else:
            self._archive.writestr(f"page-{page.info.page:04d}.xml", document)

    def finish(self, summary: Summary) -> None:
        if self._archive is not None:
            self._archive.close()


_MODULES: dict[Format, ModuleType] = {"json": json, "text": text, "hocr": hocr, "alto": alto}


def create(wanted: Format, origin: Origin) -> Export:
    """The file of a format, begun. The searchable PDF is not one of these: the render process writes it."""
    return PageXmlExport(origin) if wanted == "page_xml" else TextExport(_MODULES[wanted], origin)
