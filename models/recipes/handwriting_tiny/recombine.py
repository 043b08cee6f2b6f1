"""Write new lines of real hands: words cut out of one writer's lines, put beside each other in new orders.

A reader trained on few hands learns their words by heart and has seen long lines in fonts only. Recombined lines say
what nobody wrote, and are up to 60 characters long. Words are cut at the gaps of a line, when it has as many wide gaps
as its text has spaces; a line that has not is used whole.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .split import HELD_OUT_WRITERS
from .text import MAX_LENGTH
from .vocabulary import encodable, normalise

HEIGHT = 64
ADVANCE = 15.0  # pixels a character takes on average, so that pieces of differently scaled lines fit together
DARK = 170  # a pixel below it is ink


@dataclass
class Piece:
    """A word or a whole line of one writer, grey on white, cropped at its sides."""

    text: str
    image: Image.Image


def _runs(empty: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], empty.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def cut(image: Image.Image, text: str) -> list[Piece]:
    """The words of a line, or the line whole where its gaps do not tell them apart; nothing if it has no ink."""
    pixels = np.asarray(image.convert("L"))
    rows = len(pixels)
    # Rules of the form lie near the upper and lower edge and would bridge the gaps.
    ink = (pixels[round(0.16 * rows) : round(0.84 * rows)] < DARK).any(0)
    places = np.flatnonzero(ink)
    if len(places) < 8:
        return []
    first, last = int(places[0]), int(places[-1]) + 1
    whole = [Piece(text, image.crop((max(0, first - 2), 0, min(image.width, last + 2), rows)))]
    words = text.split(" ")
    gaps = sorted(_runs(~ink[first:last]), key=lambda gap: gap[0] - gap[1])
    wanted = len(words) - 1
    if not wanted or len(gaps) < wanted:
        return whole
    widths = [end - start for start, end in gaps]
    advance = (last - first) / len(text)
    beyond = widths[wanted] if len(widths) > wanted else 0
    if widths[wanted - 1] < max(0.6 * advance, 1.5 * beyond):
        return whole
    middles = sorted(first + (start + end) // 2 for start, end in gaps[:wanted])
    bounds = [max(0, first - 2), *middles, min(image.width, last + 2)]
    pieces = []
    for word, start, end in zip(words, bounds[:-1], bounds[1:], strict=True):
        part = image.crop((start, 0, end, rows))
        inside = np.flatnonzero((np.asarray(part)[round(0.16 * rows) : round(0.84 * rows)] < DARK).any(0))
        if len(inside) < 3:
            return whole
        pieces.append(Piece(word, part.crop((max(0, int(inside[0]) - 1), 0, int(inside[-1]) + 2, rows))))
    return pieces


def compose(pieces: list[Piece], rng: random.Random) -> Image.Image:
    """The pieces in a row on white, brought to one letter width, their ink's middles on one gently rising line."""
    scaled, middles = [], []
    for piece in pieces:
        factor = ADVANCE * len(piece.text) / piece.image.width * rng.uniform(0.93, 1.07)
        size = (max(4, round(piece.image.width * factor)), max(4, round(piece.image.height * factor)))
        image = piece.image.resize(size, Image.Resampling.BILINEAR)
        dark = 255.0 - np.asarray(image)
        weights = np.where(dark > 255 - DARK, dark, 0).sum(1)
        middles.append(float((weights * np.arange(len(weights))).sum() / max(1.0, weights.sum())))
        scaled.append(image)
    gaps = [round(ADVANCE * rng.uniform(0.7, 1.9)) for _ in scaled[1:]] + [0]
    above = max(middles)
    below = max(image.height - middle for image, middle in zip(scaled, middles, strict=True))
    width = sum(image.width for image in scaled) + sum(gaps)
    margin = round(rng.uniform(0.0, 0.3) * ADVANCE)
    line = np.full((round(above + below) + 4, width + 2 * margin), 255, dtype=np.uint8)
    left = margin
    for image, middle, gap in zip(scaled, middles, gaps, strict=True):
        top = max(0, min(line.shape[0] - image.height, round(above - middle + rng.gauss(0, 1.0))))
        area = line[top : top + image.height, left : left + image.width]
        np.minimum(area, np.asarray(image), out=area)
        left += image.width + gap
    inked = np.flatnonzero((line < DARK).any(1))
    if len(inked):  # crop to the ink and a margin, as a line finder would
        spare = [round(line.shape[0] * rng.uniform(0.02, 0.16)) for _ in range(2)]
        line = line[max(0, inked[0] - spare[0]) : inked[-1] + 1 + spare[1]]
    out = Image.fromarray(line)
    return out.resize((max(8, min(16 * HEIGHT, round(out.width * HEIGHT / out.height))), HEIGHT))


def read_pieces(folder: Path, drop: tuple[str, ...] = ()) -> dict[str, list[Piece]]:
    """All pieces of a ``labels.tsv`` folder by writer."""
    found: dict[str, list[Piece]] = {}
    for row in (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, text, writer = row.split("\t")[:3]
        text = normalise(text)
        if writer in drop or not encodable(text) or len(text) > MAX_LENGTH:
            continue
        with Image.open(folder / file) as image:
            found.setdefault(writer, []).extend(cut(image.convert("L"), text))
    return found


def main() -> None:
    """Write recombined lines of the training writers of DHSD."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="real lines: holds dhsd/ with labels.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets img/ and labels.tsv")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    writers = read_pieces(arguments.data / "dhsd", HELD_OUT_WRITERS)
    (arguments.out / "img").mkdir(parents=True, exist_ok=True)
    rows = ["file\ttext\twriter"]
    while len(rows) <= arguments.count:
        writer = rng.choice(sorted(writers))
        longest = rng.choice((14, 24, 34, 45, MAX_LENGTH))
        chosen: list[Piece] = []
        for piece in rng.sample(writers[writer], 12):
            if sum(len(other.text) + 1 for other in chosen) + len(piece.text) <= longest:
                chosen.append(piece)
        if not chosen:
            continue
        name = f"img/{len(rows):06d}.png"
        compose(chosen, rng).save(arguments.out / name, compress_level=1)
        rows.append(f"{name}\t{' '.join(piece.text for piece in chosen)}\t{writer}")
    (arguments.out / "labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
