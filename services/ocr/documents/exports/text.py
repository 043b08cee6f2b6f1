"""Plain text: a line a line, an empty line between blocks, a form feed between pages."""

from services.ocr.documents.result import Origin, PageResult, Summary

MEDIA_TYPE = "text/plain; charset=utf-8"


def head(origin: Origin) -> str:
    """Nothing stands before the first page."""
    return ""


def page(result: PageResult, index: int) -> str:
    """One page; `index` counts from 0 within the file."""
    blocks = ("".join(f"{line.text}\n" for line in lines) for _, lines in result.blocks)
    return ("\f" if index else "") + "\n".join(blocks)


def tail(summary: Summary) -> str:
    """Nothing stands after the last page."""
    return ""
