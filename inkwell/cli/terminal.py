"""Progress on a terminal. It goes to stderr and vanishes before the result is printed; elsewhere nothing is drawn."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class Screen(Protocol):
    """Where progress is drawn."""

    def update(self, renderable: RenderableType, /) -> None:
        """Show this instead of what was shown."""


class _NoScreen:
    def update(self, renderable: RenderableType, /) -> None:
        pass


def console() -> Console:
    """For stderr."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def live(*, quiet: bool) -> Iterator[Screen]:
    """A live region at the bottom of the terminal; one that shows nothing if stderr is none, or if `quiet`."""
    errors = console()
    if quiet or not errors.is_terminal:
        yield _NoScreen()
        return
    # Lines printed meanwhile appear above the region, but stdout is left alone if it goes elsewhere.
    with Live(console=errors, transient=True, refresh_per_second=12, redirect_stdout=sys.stdout.isatty()) as region:
        yield region


def status(text: str) -> RenderableType:
    """A line that shows that something is under way."""
    return Spinner("dots", text=Text(text, style="dim"))


def bar(done: int, total: int, unit: str, note: str = "") -> RenderableType:
    """A progress bar with its count, and a note behind it."""
    line = Table.grid(padding=(0, 1))
    line.add_row(
        ProgressBar(total=max(total, 1), completed=done, width=32), f"{done}/{total} {unit}", Text(note, style="dim")
    )
    return line


def above(*parts: RenderableType) -> RenderableType:
    """One below the other."""
    return Group(*parts)


def remaining(eta_ms: int) -> str:
    """A time as one would say it."""
    seconds = eta_ms / 1000
    if seconds < 10:
        return f"{seconds:.1f} s left"
    if seconds < 120:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left"
