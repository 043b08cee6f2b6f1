"""Pages of handwriting with known truth, rendered with Pillow: where each line's ink lies and what it says."""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

FONTS = Path(__file__).resolve().parents[1] / "data" / "fonts"

Point = tuple[float, float]
Polygon = tuple[Point, ...]
Paper = Literal["plain", "lines", "grid", "margin"]

_WORDS = """
a about after again all and answer apple at autumn back bag barn bell big bird blue boat book bread bridge by
candle carry chair child church city clear cloud coat cold come corner cup dark day dear deep dinner dog door down dream
early earth eight evening every eye fall family far field find fire fish five floor flower for fox friend from garden
gave girl give glass go gold good grass great green had hand happy he heart heavy her high hill him hold home horse
hour house how hundred I ice in island it jam journey joy July jump keep kept key kind king kitchen lake lamp last
late laugh leaf left letter light like list little long lost love low make man many map March meet milk mind minute
Monday money moon more morning mother mountain mouth much music my name near never new night nine no noise north not
now of often old on once one only open orange our out over own page paper park path pay pencil people picture piece
place plate play please pocket pond poor pot promise put question quick quiet rain read red rest rice ride right ring
river road roof room rose round run sad said salt same sand school sea second see seven she shop short shoulder silver
sing sister six sky sleep slow small snow so some song soon south spoon spring stand star station stay stone story
street strong sugar summer sun table tail take tall tea tell ten thank that the their then there thin thing think this
three through time to today together town tree true turn two under until up very village voice wait walk wall want
warm was watch water way we week well west wet what wheel when where white who why wide wife wild will wind window
winter wish with woman wood word work world write year yellow yes yet you young
"""
WORDS = _WORDS.split()


@dataclass(frozen=True)
class PageSpec:
    """How a page looks. Lengths are in pixels, shares are of the size named."""

    width: int = 1654  # A4 at 200 dpi
    height: int = 2339
    lines: int = 25  # over all columns; fewer when the page is full
    columns: int = 1
    heading: bool = False  # one line over all columns, counted in `lines`
    size: float = 0.0  # font size; 0: as large as the lines fit
    spacing: float = 1.5  # pitch of the lines over the size of the font
    paper: Paper = "plain"
    rules: tuple[int, int, int] = (150, 175, 215)  # their colour
    indent: bool = False  # every fifth line or so begins further right
    ragged: float = 0.4  # how much shorter than the column a line may be, share of the column
    wobble: float = 0.0  # how far words stray from the baseline, share of the size
    degrees: float = 0.0  # the writing leans clockwise by so much
    turned: int = 0  # the finished page is turned clockwise by 0, 90, 180 or 270
    shadow: float = 0.0  # how much darker the darkest corner is, share
    noise: float = 0.0  # standard deviation of the grey values
    jpeg: int = 0  # quality; 0: not compressed
    ink: tuple[int, int, int] = (30, 30, 60)
    sheet: tuple[int, int, int] = (252, 251, 248)
    desk: tuple[int, int, int] | None = None  # what shows beside the leaning sheet; None: the paper's own colour
    fonts: tuple[Path, ...] = ()  # one is picked for the page; empty: those of the repository


@dataclass(frozen=True)
class TrueLine:
    """One line: its text, the four corners of its ink, clockwise from the text's top left, and its column from 0."""

    text: str
    polygon: Polygon
    column: int


@dataclass
class RenderedPage:
    """A page and its lines in reading order."""

    image: Image.Image
    lines: list[TrueLine] = field(default_factory=list)


def font_files(folder: Path = FONTS) -> tuple[Path, ...]:
    """The fonts of a folder, sorted by name."""
    return tuple(sorted(path for path in folder.iterdir() if path.suffix in (".ttf", ".otf", ".woff2")))


def render(spec: PageSpec, seed: int) -> RenderedPage:
    """Draw the page; the same spec, fonts and seed give the same page."""
    rng = random.Random(seed)
    margin = 0.08 * spec.width
    top, bottom = 0.07 * spec.height, 0.05 * spec.height
    gutter = 0.06 * spec.width if spec.columns > 1 else 0.0
    column_width = (spec.width - 2 * margin - gutter * (spec.columns - 1)) / spec.columns
    body = spec.lines - spec.heading
    rows = math.ceil(body / spec.columns) + 2 * spec.heading
    pitch = spec.size * spec.spacing if spec.size else (spec.height - top - bottom) / rows
    size = min(pitch / spec.spacing, 0.075 * spec.width)
    pitch = size * spec.spacing
    face = ImageFont.truetype(str(rng.choice(spec.fonts or font_files())), round(size))
    ink = Image.new("L", (spec.width, spec.height), 0)
    boxes: list[tuple[str, tuple[int, int, int, int], int]] = []

    def write(x: float, width: float, baseline: float, column: int) -> None:
        text = sentence(rng, face, width)
        boxes.append((text, _draw(ink, text, (x, baseline), face, spec.wobble * size, rng), column))

    row = 0
    if spec.heading:
        write(margin, spec.width - 2 * margin, top + pitch, -1)
        row = 2
    left = body
    for column in range(spec.columns):
        count = math.ceil(left / (spec.columns - column))
        left -= count
        x0 = margin + column * (column_width + gutter)
        for number in range(count):
            baseline = top + (row + number + 0.8) * pitch
            if baseline + 0.5 * size > spec.height:
                break
            start = 0.12 * column_width if spec.indent and number % 5 == 0 else 0.0
            write(x0 + start, (column_width - start) * (1 - rng.random() * spec.ragged), baseline, column)

    sheet = Image.new("RGB", ink.size, spec.sheet)
    _rule(sheet, spec, margin, top, pitch)
    sheet = Image.composite(Image.new("RGB", ink.size, spec.ink), sheet, ink)
    lines = [TrueLine(text, _corners(box), column) for text, box, column in boxes]
    return _photograph(sheet, lines, spec, rng)


def sentence(rng: random.Random, face: ImageFont.FreeTypeFont, width: float) -> str:
    """Random words that fill the width in pixels, at least one word."""
    words = [rng.choice(WORDS).capitalize()]
    while face.getlength(" ".join([*words, word := rng.choice(WORDS)])) <= width:
        words.append(word + ("," if rng.random() < 0.1 else ""))
    return " ".join(words)


def _draw(
    ink: Image.Image,
    text: str,
    at: Point,
    face: ImageFont.FreeTypeFont,
    wobble: float,
    rng: random.Random,
) -> tuple[int, int, int, int]:
    """Write words one after another on a wandering baseline; answers the box of the ink."""
    layer = Image.new("L", ink.size, 0)
    pen = ImageDraw.Draw(layer)
    x, drift = at[0], 0.0
    for word in text.split(" ") if wobble else [text]:
        drift = 0.7 * drift + rng.gauss(0, 0.7 * wobble)
        pen.text((x, at[1] + drift), word, fill=255, font=face, anchor="ls")
        x += face.getlength(word + " ")
    box = layer.getbbox()
    assert box is not None
    ink.paste(ImageChops.lighter(ink.crop(box), layer.crop(box)), box)
    return box


def _corners(box: tuple[int, int, int, int]) -> Polygon:
    left, top, right, bottom = box
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _rule(sheet: Image.Image, spec: PageSpec, margin: float, top: float, pitch: float) -> None:
    pen = ImageDraw.Draw(sheet)
    thick = max(1, round(spec.width / 900))
    blue, red = spec.rules, (215, 90, 90)
    if spec.paper in ("lines", "margin"):
        y = top + 0.85 * pitch
        while y < spec.height:
            pen.line([(0, y), (spec.width, y)], fill=blue, width=thick)
            y += pitch
    if spec.paper == "grid":
        step = pitch / 2
        for number in range(math.ceil(max(sheet.size) / step)):
            pen.line([(0, number * step), (spec.width, number * step)], fill=blue, width=thick)
            pen.line([(number * step, 0), (number * step, spec.height)], fill=blue, width=thick)
    if spec.paper == "margin":
        pen.line([(0.9 * margin, 0), (0.9 * margin, spec.height)], fill=red, width=thick)


def _photograph(sheet: Image.Image, lines: list[TrueLine], spec: PageSpec, rng: random.Random) -> RenderedPage:
    """Lean and turn the sheet, then light, noise and compress it."""
    image = sheet
    if spec.degrees:
        image, lines = _lean(image, lines, spec)
    for _ in range(spec.turned // 90):
        height = image.height
        image = image.transpose(Image.Transpose.ROTATE_270)
        lines = [TrueLine(line.text, tuple((height - y, x) for x, y in line.polygon), line.column) for line in lines]
    if spec.shadow or spec.noise:
        image = _light(image, spec, rng)
    if spec.jpeg:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=spec.jpeg)
        image = Image.open(stream).convert("RGB")
    return RenderedPage(image, lines)


def _lean(image: Image.Image, lines: list[TrueLine], spec: PageSpec) -> tuple[Image.Image, list[TrueLine]]:
    """Turn clockwise about the centre on a canvas that holds the whole sheet."""
    turn = math.radians(spec.degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    width = math.ceil(abs(image.width * cos) + abs(image.height * sin))
    height = math.ceil(abs(image.width * sin) + abs(image.height * cos))
    old, new = (image.width / 2, image.height / 2), (width / 2, height / 2)

    def forth(point: Point) -> Point:
        x, y = point[0] - old[0], point[1] - old[1]
        return (cos * x - sin * y + new[0], sin * x + cos * y + new[1])

    # Pillow wants the way back: from a pixel of the result to one of the source.
    back = (cos, sin, old[0] - cos * new[0] - sin * new[1], -sin, cos, old[1] + sin * new[0] - cos * new[1])
    turned = image.transform(
        (width, height),
        Image.Transform.AFFINE,
        back,
        resample=Image.Resampling.BICUBIC,
        fillcolor=spec.desk or spec.sheet,
    )
    return turned, [TrueLine(line.text, tuple(forth(p) for p in line.polygon), line.column) for line in lines]


def _light(image: Image.Image, spec: PageSpec, rng: random.Random) -> Image.Image:
    """Uneven light, darkest in one corner and under one soft-edged shadow; sensor noise."""
    pixels: np.ndarray = np.asarray(image, dtype=np.float32)
    if spec.shadow:
        small = Image.new("L", (64, 64), 255)
        pen = ImageDraw.Draw(small)
        edge = rng.randint(16, 48)
        pen.polygon([(0, 0), (edge, 0), (rng.randint(8, 40), 64), (0, 64)], fill=round(255 * (1 - spec.shadow / 2)))
        soft = np.asarray(small.filter(ImageFilter.GaussianBlur(4)).resize(image.size, Image.Resampling.BICUBIC))
        across = np.linspace(0, 1, image.width, dtype=np.float32)[None, :]
        down = np.linspace(0, 1, image.height, dtype=np.float32)[:, None]
        falling = 1 - spec.shadow / 2 * (across + down) / 2
        pixels = pixels * (soft.astype(np.float32) / 255 * falling)[:, :, None]
    if spec.noise:
        generator = np.random.default_rng(rng.randrange(2**32))
        pixels = pixels + generator.normal(0, spec.noise, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def area(polygon: Sequence[Point]) -> float:
    """Area of a polygon (shoelace formula), never negative."""
    total = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(polygon, (*polygon[1:], polygon[0]), strict=True))
    return abs(total) / 2


def overlap(one: Sequence[Point], other: Sequence[Point]) -> float:
    """Intersection over union of two convex polygons that run clockwise as seen on the page (y downwards)."""
    cut = list(one)
    for (ax, ay), (bx, by) in zip(other, (*other[1:], other[0]), strict=True):
        # Sutherland-Hodgman: keep what lies to the right of each edge.
        kept: list[Point] = []
        sides = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in cut]
        for (p, side), (q, next_side) in zip(
            zip(cut, sides, strict=True), zip(cut[1:] + cut[:1], sides[1:] + sides[:1], strict=True), strict=True
        ):
            if side >= 0:
                kept.append(p)
            if (side > 0 > next_side) or (side < 0 < next_side):
                share = side / (side - next_side)
                kept.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
        cut = kept
        if not cut:
            return 0.0
    shared = area(cut)
    return shared / (area(one) + area(other) - shared)


def match(truth: Sequence[Polygon], found: Sequence[Polygon], least: float = 0.5) -> dict[int, int]:
    """True line to found line, one to one, the best overlaps of at least `least` first."""
    pairs = sorted(
        (
            (overlap(wanted, got), i, j)
            for i, wanted in enumerate(truth)
            for j, got in enumerate(found)
            if _may_touch(wanted, got)
        ),
        reverse=True,
    )
    matched: dict[int, int] = {}
    taken: set[int] = set()
    for score, i, j in pairs:
        if score >= least and i not in matched and j not in taken:
            matched[i] = j
            taken.add(j)
    return matched


def _may_touch(one: Polygon, other: Polygon) -> bool:
    return all(
        min(p[axis] for p in one) < max(p[axis] for p in other)
        and min(p[axis] for p in other) < max(p[axis] for p in one)
        for axis in (0, 1)
    )
