"""An artifact as a store tells of it, and lists of them that are told a page at a time."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import Manifest

PAGE_SIZE_MOST = 200


@dataclass(frozen=True)
class Stored:
    """An artifact in a store."""

    id: str
    manifest: Manifest
    manifest_json: bytes = field(repr=False)
    published_at: float  # by the store's clock, seconds since 1970

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return len(self.manifest_json) + sum(file.size_bytes for file in self.manifest.files)


@dataclass(frozen=True)
class Page:
    """A part of the list of artifacts. next_page_token: "" on the last page."""

    artifacts: tuple[Stored, ...]
    next_page_token: str


def order(stored: Stored) -> tuple[float, str]:
    """Newest first, and always the same."""
    return (-datetime.fromisoformat(stored.manifest.created_at).timestamp(), stored.id)


def check_page_size(page_size: int) -> None:
    """Raises StoreError unless it is from 1 to PAGE_SIZE_MOST."""
    if not 1 <= page_size <= PAGE_SIZE_MOST:
        raise StoreError(Reason.INVALID, f"page_size: {page_size}; it has to be from 1 to {PAGE_SIZE_MOST}")


def page_of(found: Sequence[Stored], page_size: int, page_token: str, filters: str) -> Page:
    """The page that a token stands for, of all artifacts in their order. filters: by which they were found.

    Raises StoreError for a token that is none, or of other filters.
    """
    if page_token:
        last = _read_token(page_token, filters)
        found = [stored for stored in found if order(stored) > last]
    shown = tuple(found[:page_size])
    return Page(shown, _token(order(shown[-1]), filters) if len(found) > page_size else "")


def _token(last: tuple[float, str], filters: str) -> str:
    content = json.dumps([*last, sha256(filters.encode()).hexdigest()[:16]])
    return base64.urlsafe_b64encode(content.encode()).decode()


def _read_token(token: str, filters: str) -> tuple[float, str]:
    try:
        at, last, digest = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        place = (float(at), str(last))
    except (ValueError, TypeError):
        raise StoreError(
            Reason.INVALID, "page_token: it is none that this store gave; leave it empty for the first page"
        ) from None
    if digest != sha256(filters.encode()).hexdigest()[:16]:
        raise StoreError(Reason.INVALID, "page_token: it belongs to other filters; leave it empty for the first page")
    return place
