"""Render lines of text in handwriting fonts, with the place of every character, into shards of model-sized images.

A shard is three files: ``NAME.images.npy`` (uint8, lines × height × width), ``NAME.spans.npy`` (float16, lines ×
characters × 2: where a character begins and ends, as a share of the width) and ``NAME.json`` (the texts). The training
loop maps the images into memory, so it never waits for a font. With ``--lines`` the lines become a folder of images
with ``labels.tsv`` instead, which is what ``python -m services.ocr.finetune`` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fonts import CURSIVE, TRAINING, coverage
from .split import training_texts
from .text import MAX_LENGTH, TextSource

HEIGHT, WIDTH = 48, 432  # what the model sees
STORED_WIDTH = 576  # what shards keep: wider, so that distortions have detail to work on


class FontShelf:
    """Faces of the chosen families at the sizes asked for, and what each can draw."""

    def __init__(self, folder: Path, families: tuple[str, ...]) -> None:
        paths = {family: folder / f"{family}.ttf" for family in families}
        self.paths = {family: path for family, path in paths.items() if path.exists()}
        self.covers = {family: coverage(path) for family, path in self.paths.items()}
        self.families = sorted(self.paths)
        self.heights = {family: self._letter_height(family) for family in self.families}
        self._faces: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}

    def face(self, family: str, size: int) -> ImageFont.FreeTypeFont:
        """A face, loaded once for each size."""
        key = (family, size)
        if key not in self._faces:
            self._faces[key] = ImageFont.truetype(str(self.paths[family]), size, layout_engine=ImageFont.Layout.BASIC)
        return self._faces[key]

    def _letter_height(self, family: str) -> float:
        """Height of a lower-case letter without ascenders, as a share of the size of the face."""
        box = ImageFont.truetype(str(self.paths[family]), 100, layout_engine=ImageFont.Layout.BASIC).getbbox("x")
        return max(10.0, box[3] - box[1]) / 100

    def pick(self, text: str, rng: random.Random) -> str | None:
        """A random family that has every character of the text."""
        for _ in range(12):
            family = rng.choice(self.families)
            if all(character in self.covers[family] for character in text):
                return family
        return None


def draw_line(
    text: str, family: str, shelf: FontShelf, rng: random.Random, plain: bool = False
) -> tuple[Image.Image, list[tuple[float, float]]]:
    """Black text on white, cropped to its ink, and the horizontal span of every character in pixels.

    With ``plain`` nothing is varied. Otherwise print-like faces are often set letter by letter, each with its own
    height, size, and distance, because that is how hands differ from fonts.
    """
    size = 44 if plain else rng.choice((30, 36, 42, 48))
    face = shelf.face(family, size)
    stroke = 1 if not plain and rng.random() < 0.10 else 0
    width = int(face.getlength(text) * 1.9) + 6 * size
    image = Image.new("L", (width, 3 * size), 255)
    pen = ImageDraw.Draw(image)
    left, baseline = 2 * size, int(1.9 * size)
    spans: list[tuple[float, float]] = []
    loose = not plain and rng.random() < (0.06 if family in CURSIVE else 0.65)
    if not loose:
        pen.text((left, baseline), text, fill=0, font=face, anchor="ls", stroke_width=stroke)
        edges = [left + face.getlength(text[:count]) for count in range(len(text) + 1)]
        spans = list(zip(edges[:-1], edges[1:], strict=True))
    else:
        spread = rng.uniform(0.0, 0.05) * size
        wobble = rng.uniform(0.0, 0.06) * size
        tracking = rng.choice((0.0, rng.uniform(-0.04, 0.03), rng.uniform(0.0, 0.22))) * size
        gap = rng.uniform(-0.1, 0.35) * size
        swell = rng.choice((0, 0, 2, 4))
        guests = _guests(text, family, shelf, rng) if rng.random() < 0.4 else {}
        drift, x = 0.0, float(left)
        for character in text:
            drift = 0.8 * drift + rng.gauss(0, wobble * 0.6)
            own = shelf.face(family, size + 2 * rng.randint(-swell // 2, swell // 2)) if swell else face
            if character in guests:
                guest = guests[character]
                own = shelf.face(guest, max(12, 2 * round(own.size * shelf.heights[family] / shelf.heights[guest] / 2)))
            advance = own.getlength(character)
            y = baseline + drift
            pen.text((round(x), round(y)), character, fill=0, font=own, anchor="ls", stroke_width=stroke)
            spans.append((x, x + advance))
            x += advance + tracking + rng.gauss(0, spread) + (gap if character == " " else 0.0)
            if x > width - 2 * size:  # cannot happen at the spacings above; keep the drawing inside anyway
                break
    box = image.point(lambda value: 255 - value).getbbox()
    if box is None or len(spans) != len(text):
        return draw_line(text, family, shelf, rng, plain=True) if not plain else (image, spans)
    image = image.crop(box)
    return image, [(start - box[0], end - box[0]) for start, end in spans]


def _guests(text: str, family: str, shelf: FontShelf, rng: random.Random) -> dict[str, str]:
    """Another print-like family for about a third of a line's characters: no hand writes all letters as one font."""
    others = [other for other in rng.sample(shelf.families, 4) if other not in CURSIVE and other != family]
    chosen = [character for character in sorted(set(text)) if character != " " and rng.random() < 0.35]
    pairs = ((character, rng.choice(others)) for character in chosen if others)
    return {character: other for character, other in pairs if character in shelf.covers[other]}


def frame_line(
    image: Image.Image, spans: list[tuple[float, float]], rng: random.Random
) -> tuple[Image.Image, list[tuple[float, float]]]:
    """Margins as scans have them; short lines mostly stand in a frame at least four times as wide as high."""
    width, height = image.size
    if rng.random() < 0.25:  # a hand narrower or wider than the font
        width = max(8, int(width * rng.uniform(0.75, 1.3)))
        spans = [(start * width / image.width, end * width / image.width) for start, end in spans]
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pads = [rng.uniform(0.0, 0.12) * height for _ in range(4)]
    if rng.random() < 0.25:
        pads = [pad + rng.uniform(0.0, 0.8) * height for pad in pads]
    new_height = height + pads[0] + pads[1]
    new_width = width + pads[2] + pads[3]
    aspect = rng.choice((4.0, 4.0, rng.uniform(2.0, 7.0), 0.0))
    if new_width < aspect * new_height:
        spare = aspect * new_height - new_width
        share = rng.random()
        pads[2] += spare * share
        new_width += spare
    frame = Image.new("L", (max(8, round(new_width)), max(8, round(new_height))), 255)
    frame.paste(image, (round(pads[2]), round(pads[0])))
    return frame, [((start + pads[2]) / frame.width, (end + pads[2]) / frame.width) for start, end in spans]


def squash(image: Image.Image, width: int = WIDTH) -> np.ndarray:
    """An image at the model's height and the given width; by default just what the exported processor makes of it."""
    return np.asarray(image.convert("L").resize((width, HEIGHT), Image.Resampling.BILINEAR))


def write_shard(stem: Path, count: int, shelf: FontShelf, source: TextSource, rng: random.Random) -> None:
    """Render one shard; the text file comes last, so a shard that has one is complete."""
    images = np.empty((count, HEIGHT, STORED_WIDTH), dtype=np.uint8)
    places = np.zeros((count, MAX_LENGTH, 2), dtype=np.float16)
    texts: list[str] = []
    while len(texts) < count:
        text = source.draw()
        family = shelf.pick(text, rng)
        if family is None:
            continue
        image, spans = frame_line(*draw_line(text, family, shelf, rng), rng)
        images[len(texts)] = squash(image, STORED_WIDTH)
        places[len(texts), : len(text)] = spans
        texts.append(text)
    np.save(stem.with_suffix(".images.npy"), images)
    np.save(stem.with_suffix(".spans.npy"), places)
    partial = stem.with_suffix(".json.tmp")
    partial.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, stem.with_suffix(".json"))


def write_lines(folder: Path, count: int, shelf: FontShelf, source: TextSource, rng: random.Random) -> None:
    """Render a folder of images and ``labels.tsv``, the family as the writer; lines are about 64 pixels high."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rows = ["file\ttext\twriter"]
    while len(rows) <= count:
        text = source.draw()
        family = shelf.pick(text, rng)
        if family is None:
            continue
        image, _ = frame_line(*draw_line(text, family, shelf, rng), rng)
        name = f"img/{len(rows):06d}.png"
        width = max(8, min(16 * 64, round(image.width * 64 / image.height)))
        image.resize((width, 64), Image.Resampling.BILINEAR).save(folder / name, compress_level=1)
        rows.append(f"{name}\t{text}\t{family}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def drop_shard(stem: Path) -> None:
    """Remove a shard, its text file first (a trainer that has it open keeps its pages)."""
    for suffix in (".json", ".images.npy", ".spans.npy"):
        stem.with_suffix(suffix).unlink(missing_ok=True)


def shard_stems(folder: Path) -> list[Path]:
    """Complete shards, oldest first."""
    return sorted(path.with_suffix("") for path in folder.glob("shard-*.json"))


def main() -> None:
    """Render shards, then now and then a fresh one in place of the oldest."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, required=True, help="holds fonts/, text/ and shards/")
    parser.add_argument("--count", type=int, default=12000, help="lines in a shard")
    parser.add_argument("--keep", type=int, default=10, help="shards kept at a time")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between fresh shards once all are there")
    parser.add_argument("--total", type=int, default=10, help="shards rendered before this stops")
    parser.add_argument("--data", type=Path, default=None, help="real lines whose training texts are rendered too")
    parser.add_argument("--long", type=float, default=0.0, help="share of long lines")
    parser.add_argument("--lines", type=Path, default=None, help="write one folder of --count images and labels.tsv")
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.lines is not None:
        extra = training_texts(arguments.data) if arguments.data else None
        source = TextSource(arguments.work / "text", seed=arguments.seed, extra=extra, long=arguments.long)
        shelf = FontShelf(arguments.work / "fonts", TRAINING)
        write_lines(arguments.lines, arguments.count, shelf, source, random.Random(arguments.seed))
        return
    folder: Path = arguments.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    stems = shard_stems(folder)
    number = int(stems[-1].name.split("-")[1]) + 1 if stems else 0
    rng = random.Random(arguments.seed + number)
    extra = training_texts(arguments.data) if arguments.data else None
    source = TextSource(arguments.work / "text", seed=arguments.seed + number, extra=extra, long=arguments.long)
    shelf = FontShelf(arguments.work / "fonts", TRAINING)
    for turn in range(arguments.total):
        began = time.monotonic()
        write_shard(folder / f"shard-{number:05d}", arguments.count, shelf, source, rng)
        number += 1
        print(f"shard {number}: {arguments.count / (time.monotonic() - began):.0f} lines/s", flush=True)
        stems = shard_stems(folder)
        for old in stems[: -arguments.keep]:
            drop_shard(old)
        if len(stems) >= arguments.keep and turn + 1 < arguments.total:
            time.sleep(arguments.every)


if __name__ == "__main__":
    main()
