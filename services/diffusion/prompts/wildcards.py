"""Wildcards: __name__ in a prompt becomes a line of name.txt, __folder/name__ one of folder/name.txt.

A file has one option a line; blank lines and those that begin with # are skipped; a line may hold wildcards itself.
Which line is drawn is decided by a seed alone, so that a picture is repeatable: from left to right, and within a line
before what follows it, each wildcard takes option number floor(r * count), with r the next number of
random.Random(seed).random() (the Mersenne Twister, whose numbers Python keeps the same between its versions).
"""

import functools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.diffusion.prompts.syntax import PromptError
from services.kit import faults

SETTING = "INKWELL_DIFFUSION_WILDCARD_FOLDER"
FILES_MOST = 10_000
FILE_BYTES_MOST = 1024 * 1024
LINE_CHARACTERS_MOST = 4096
DEPTH_MOST = 8  # wildcards within lines of wildcards
DRAWS_MOST = 256  # of one call's prompts
NAMES_SHOWN = 50
_KEPT_FILES = 256

_WILDCARD = re.compile(r"__(?=[^\W_])([\w ./-]+?)__")


@dataclass(frozen=True)
class _Options:
    """A wildcard's file. references: the wildcards that its lines hold."""

    lines: tuple[str, ...]
    references: frozenset[str]


class Wildcards:
    """Fills in the wildcards of one picture's prompts, one after the other, out of the folder as it is now.

    folder: that of the .txt files, empty for none; subfolders count, unless their name begins with a dot.
    seed: 0 to 2^32 - 1.
    """

    def __init__(self, folder: str, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._draws = 0
        self._acyclic: set[str] = set()

    @property
    def drawn(self) -> bool:
        """True once a wildcard was filled in."""
        return self._draws > 0

    def fill_in(self, text: str, field: str, *, characters_most: int) -> str:
        """The text with a line for every wildcard.

        Raises Fault NOT_FOUND (naming `field`) for a wildcard without a file, and PromptError for one that leads back
        to itself, for files that break a limit, and for a text that grows beyond `characters_most`.
        """
        if not _WILDCARD.search(text):
            return text
        filled = self._fill_in(text, field, (), characters_most)
        if len(filled) > characters_most:
            raise _too_long(characters_most)
        return filled

    def _fill_in(self, text: str, field: str, within: tuple[str, ...], room: int) -> str:
        parts: list[str] = []
        size = done = 0
        for match in _WILDCARD.finditer(text):
            parts += text[done : match.start()], self._draw(match[1], field, within, room)
            size += len(parts[-2]) + len(parts[-1])
            if size > room:
                raise _too_long(room)
            done = match.end()
        return "".join((*parts, text[done:]))

    def _draw(self, name: str, field: str, within: tuple[str, ...], room: int) -> str:
        options = self._options(name, field)
        self._refuse_cycles(name, field)
        if len(within) >= DEPTH_MOST:
            raise PromptError(f"wildcards stand more than {DEPTH_MOST} deep within each other: {_way((*within, name))}")
        self._draws += 1
        if self._draws > DRAWS_MOST:
            raise PromptError(f"it takes more than {DRAWS_MOST} wildcards to fill in, with those in their lines")
        line = options.lines[int(self._random.random() * len(options.lines))]
        return self._fill_in(line, field, (*within, name), room)

    def _options(self, name: str, field: str) -> _Options:
        if not self._folder:
            raise PromptError(
                f"it has the wildcard __{name[:80]}__, and this service has no folder of wildcards ({SETTING}); "
                "take prompt_syntax PLAIN if it is meant as text"
            )
        path = self._files.get(name)
        if path is None:
            raise faults.not_found("wildcard", name, _shown(self._files), field=field)
        return _read(name, path)

    def _refuse_cycles(self, name: str, field: str) -> None:
        """Refuse a wildcard that can lead back to itself, whatever line is drawn this time."""
        # By hand instead of by recursion: a chain of files may be longer than the stack.
        way: dict[str, Iterator[str]] = {}
        if name not in self._acyclic:
            way[name] = iter(sorted(self._options(name, field).references))
        while way:
            last = next(reversed(way))
            below = next(way[last], None)
            if below is None:
                self._acyclic.add(last)
                del way[last]
            elif below in way:
                cycle = list(way)[list(way).index(below) :]
                raise PromptError(f"a wildcard leads back to itself: {_way((*cycle, below))}")
            elif below not in self._acyclic and below in self._files:  # a missing one is told when it is drawn
                way[below] = iter(sorted(_read(below, self._files[below]).references))

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        """The files by wildcard. Names are looked up here and nowhere else, so none leads out of the folder."""
        root = Path(self._folder)
        files: dict[str, Path] = {}
        for place, folders, names in os.walk(root):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for file in sorted(names):
                if file.endswith(".txt") and not file.startswith("."):
                    path = Path(place, file)
                    files[path.relative_to(root).with_suffix("").as_posix()] = path
            if len(files) > FILES_MOST:
                raise PromptError(f"the folder of wildcards ({SETTING}) has more than {FILES_MOST} files")
        return files


def _read(name: str, path: Path) -> _Options:
    try:
        status = path.stat()
    except OSError as error:
        raise PromptError(f"the file of wildcard {name} cannot be read: {error.strerror}") from error
    return _read_as_of(name, path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=_KEPT_FILES)
def _read_as_of(name: str, path: Path, modified_ns: int, size: int) -> _Options:
    if size > FILE_BYTES_MOST:
        raise PromptError(f"the file of wildcard {name} has {size} bytes; at most {FILE_BYTES_MOST}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"the file of wildcard {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"the file of wildcard {name} is not UTF-8 (at byte {error.start})") from error
    lines = tuple(line for raw in text.split("\n") if (line := raw.strip()) and not line.startswith("#"))
    if not lines:
        raise PromptError(f"the file of wildcard {name} has no lines to take")
    longest = max(map(len, lines))
    if longest > LINE_CHARACTERS_MOST:
        raise PromptError(f"wildcard {name} has a line of {longest} characters; at most {LINE_CHARACTERS_MOST}")
    return _Options(lines, frozenset(name for line in lines for name in _WILDCARD.findall(line)))


def _shown(names: dict[str, Path]) -> list[str]:
    # The list travels in the trailers of the answer, which are small; "~" keeps its place when it is sorted.
    listed = sorted(name for name in names if _WILDCARD.fullmatch(f"__{name}__"))
    left = len(listed) - NAMES_SHOWN
    return listed[:NAMES_SHOWN] + ([f"~ and {left} more"] if left > 0 else [])


def _way(names: tuple[str, ...]) -> str:
    return " -> ".join(f"__{name}__" for name in names)


def _too_long(most: int) -> PromptError:
    return PromptError(f"with its wildcards filled in it has more than the limit of {most} characters")
