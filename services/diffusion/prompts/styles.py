"""Styles: named prompts that are laid on the caller's, from a CSV file as AUTOMATIC1111's web UI writes it.

Columns name, prompt, negative_prompt. Where a style says {prompt}, the caller's prompt stands in its place; one that
does not is appended after a comma.
"""

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.kit import faults

SETTING = "INKWELL_DIFFUSION_STYLES_FILE"
FILE_BYTES_MOST = 4 * 1024 * 1024
STYLES_MOST = 16  # of one call
NAMES_SHOWN = 50
PLACE = "{prompt}"
_COLUMNS = ("name", "prompt", "negative_prompt")


@dataclass(frozen=True)
class Style:
    """One row of the file."""

    prompt: str
    negative_prompt: str


def load(file: str) -> dict[str, Style]:
    """The styles by name, in the order of the file; read anew when it has changed. No styles for an empty file name.

    Raises Fault FAILED_PRECONDITION, reason STYLES_FILE_UNUSABLE, for a file that is missing or is no such table.
    """
    if not file:
        return {}
    try:
        status = Path(file).stat()
    except OSError as error:
        raise _unusable(f"it cannot be read: {error.strerror}") from error
    return _load_as_of(file, status.st_mtime_ns, status.st_size)


def apply(prompt: str, styles: Sequence[str]) -> str:
    """Lay the styles' texts (for prompt or negative prompt) on a prompt, in their order."""
    for style in styles:
        if PLACE in style:
            prompt = style.replace(PLACE, prompt)
        else:
            prompt = ", ".join(part for part in (prompt.strip(), style.strip()) if part)
    return prompt


def find(names: Sequence[str], file: str) -> list[Style]:
    """The styles of those names.

    Raises Fault: NOT_FOUND for an unknown one, INVALID_ARGUMENT where there are too many or the service has no file;
    both name the field styles[i].
    """
    if not names:
        return []
    if len(names) > STYLES_MOST:
        raise faults.invalid_field("styles", f"{len(names)} are more than the limit of {STYLES_MOST}")
    if not file:
        raise faults.invalid_field("styles[0]", f"this service has no styles file ({SETTING}); leave styles empty")
    known = load(file)
    for index, name in enumerate(names):
        if name not in known:
            raise faults.not_found("style", name, _shown(known), field=f"styles[{index}]")
    return [known[name] for name in names]


@functools.lru_cache(maxsize=1)
def _load_as_of(file: str, modified_ns: int, size: int) -> dict[str, Style]:
    if size > FILE_BYTES_MOST:
        raise _unusable(f"it has {size} bytes; at most {FILE_BYTES_MOST}")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unusable(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _unusable(f"it is not UTF-8 (at byte {error.start})") from error
    rows = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        if missing := [column for column in _COLUMNS if column not in (rows.fieldnames or ())]:
            raise _unusable(f"its first line lacks the columns {', '.join(missing)}")
        # Rows without a name are separators in files of the web UI; the first of equal names counts.
        found: dict[str, Style] = {}
        for row in rows:
            if name := row["name"].strip():
                found.setdefault(name, Style(row["prompt"], row["negative_prompt"]))
    except csv.Error as error:
        raise _unusable(f"line {rows.line_num} is not CSV: {error}") from error
    return found


def _shown(names: dict[str, Style]) -> list[str]:
    # The list travels in the trailers of the answer, which are small; "~" keeps its place when it is sorted.
    left = len(names) - NAMES_SHOWN
    return sorted(names)[:NAMES_SHOWN] + ([f"~ and {left} more"] if left > 0 else [])


def _unusable(why: str) -> faults.Fault:
    return faults.failed_precondition("STYLES_FILE_UNUSABLE", f"the styles file ({SETTING}) is unusable: {why}")
