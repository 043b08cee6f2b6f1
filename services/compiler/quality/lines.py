"""Lines of text to read: a folder's own, and ones rendered here, the same every time."""

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LABELS = "labels.tsv"
# The commonest words of English, after the frequency lists that any corpus gives; no text of anybody's.
_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but"
    " not what all were we when your can said there use an each which she do how their if will up other about out many"
    " then them these so some her would make like him into time has look two more write go see number no way could"
    " people my than first water been call who oil its now find long down day did get come made may part"
)
_WORDS = _COMMON.split()


class LinesError(Exception):
    """A folder of lines that cannot be used; the message says which line and why."""


@dataclass(frozen=True)
class Line:
    """A picture of one line, and what it says."""

    image: Image.Image
    text: str


def labelled(folder: Path) -> list[Line]:
    """The lines of a folder with labels.tsv (columns `file` and `text`, tab-separated). Raises LinesError."""
    path = folder / LABELS
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LinesError(f"{path} cannot be read: {error}; it has to hold the columns file and text") from error
    lines = []
    for number, row in enumerate(rows, start=2):
        file, text = row.get("file"), row.get("text")
        if not file or not text:
            raise LinesError(f"{path}:{number}: file or text is missing; the header has to name the columns file, text")
        try:
            with Image.open(folder / file) as image:
                lines.append(Line(image.convert("RGB"), text))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise LinesError(f"{path}:{number}: {file} is no image that can be read: {error}") from error
    if not lines:
        raise LinesError(f"{path}: it has no rows")
    return lines


def rendered(count: int, seed: int = 0) -> list[Line]:
    """Lines of common words in Pillow's own typeface, each of another size, slant, ink and place.

    Models of handwriting read them with mistakes. What they are for is to tell two runs of one model apart.
    """
    source = random.Random(seed)
    return [_render(_text(source), source) for _ in range(count)]


def evenly(lines: Sequence[Line], count: int) -> list[Line]:
    """At most so many lines, evenly taken from all."""
    if len(lines) <= count:
        return list(lines)
    return [lines[number * len(lines) // count] for number in range(count)]


def _text(source: random.Random) -> str:
    words = source.sample(_WORDS, source.randrange(2, 6))
    if source.random() < 0.5:
        words[0] = words[0].capitalize()
    if source.random() < 0.15:
        words.append(str(source.randrange(2, 2000)))
    return " ".join(words) + source.choice(("", "", ".", "?"))


def _render(text: str, source: random.Random) -> Line:
    font = ImageFont.load_default(source.randrange(30, 48))
    left, top, right, bottom = font.getbbox(text)
    margin = source.randrange(6, 20)
    size = (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin)
    ink = source.randrange(0, 90)
    image = Image.new("L", size, source.randrange(225, 256))
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill=ink)
    slant = source.uniform(-0.25, 0.35)
    shift = slant * size[1] / 2
    image = image.transform(
        size, Image.Transform.AFFINE, (1, slant, -shift, 0, 1, 0), Image.Resampling.BILINEAR, fillcolor=245
    )
    return Line(image.convert("RGB"), text)
