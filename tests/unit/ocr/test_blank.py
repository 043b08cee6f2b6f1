"""What is taken for an empty line: paper of all kinds, and never writing."""

import io
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from services.ocr.domain import Line
from services.ocr.engine.blank import is_blank
from services.ocr.engine.main import OcrEngine
from tests.support.reading import GREEDY, Reader, beams, engine_of, lane_in, scribble

SAMPLES = sorted((Path(__file__).resolve().parents[3] / "models" / "handwriting-tiny" / "samples").glob("*.png"))
SIZES = [(400, 48), (900, 64), (1600, 200), (257, 96)]
Paper = Callable[[Image.Image, random.Random], Image.Image]


def line_of(image: Image.Image) -> Line:
    image = image.convert("RGB")
    return Line(image.width, image.height, image.tobytes())


def with_noise(image: Image.Image, deviation: float, seed: int = 0) -> Image.Image:
    pixels = np.asarray(image.convert("RGB"), np.float64)
    noise = np.random.default_rng(seed).normal(0, deviation, pixels.shape[:2])[..., None]
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def gradient(image: Image.Image, source: random.Random) -> Image.Image:
    slope = Image.linear_gradient("L").rotate(source.choice([0, 90])).resize(image.size)
    return Image.composite(image, Image.new("RGB", image.size, (90, 90, 80)), slope)


def shadow(image: Image.Image, source: random.Random) -> Image.Image:
    mask = Image.new("L", image.size, 255)
    left = source.uniform(0.2, 0.8) * image.width
    corners = [(left, 0), (image.width, 0), (image.width, image.height), (left + 30, image.height)]
    ImageDraw.Draw(mask).polygon(corners, fill=140)
    blurred = mask.filter(ImageFilter.GaussianBlur(image.height / 8))
    return Image.composite(image, Image.new("RGB", image.size, (60, 60, 70)), blurred)


def ruled(image: Image.Image, source: random.Random, *, grid: bool = False) -> Image.Image:
    big = image.resize((image.width * 3, image.height * 3))
    draw = ImageDraw.Draw(big)
    spacing, lean = big.height * source.choice([0.3, 0.5, 0.7]), source.uniform(-0.02, 0.02)
    ink, width = source.choice([(120, 140, 200), (200, 150, 150), (90, 90, 90)]), max(3, big.height // 60)
    first = source.uniform(0, spacing)
    for n in range(-4, int(big.height / spacing) + 5):
        y = first + n * spacing
        draw.line([(0, y), (big.width, y + lean * big.width)], fill=ink, width=width)
    for n in range(-1, int(big.width / spacing) + 2) if grid else ():
        x = first + n * spacing
        draw.line([(x, 0), (x - lean * big.height, big.height)], fill=ink, width=width)
    return big.resize(image.size, Image.Resampling.LANCZOS)


def speck(image: Image.Image, source: random.Random) -> Image.Image:
    x, y = source.randrange(image.width), source.randrange(image.height)
    side = image.height // 60
    image.paste((30, 30, 30), (x, y, x + max(1, side), y + max(1, side)))
    return image


def sheet_edge(image: Image.Image, source: random.Random) -> Image.Image:
    width = image.height * source.uniform(0.05, 0.3)
    left = source.random() < 0.5
    band = [(0, 0), (width, 0), (width * 1.1, image.height), (0, image.height)]
    corners = band if left else [(image.width - x, y) for x, y in band]
    ImageDraw.Draw(image).polygon(corners, fill=(40, 40, 40))
    return image


PAPERS: dict[str, Paper] = {
    "plain": lambda image, _: image,
    "gradient": gradient,
    "shadow": shadow,
    "ruled": ruled,
    "grid": lambda image, source: ruled(image, source, grid=True),
    "jpeg": lambda image, source: as_jpeg(with_noise(image, 2), source.randint(20, 90)),
    "scanner": lambda image, source: with_noise(image, source.uniform(1, 8)),
    "speck": speck,
    "edge of the sheet": sheet_edge,
    "ruled, scanned, as JPEG": lambda image, source: as_jpeg(with_noise(ruled(image, source), 2), 85),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_empty_paper_is_blank(paper: str) -> None:
    source = random.Random(paper)
    # In so few pixels, the lines of a grid are in doubt.
    small = [] if paper in ("grid", "ruled, scanned, as JPEG") else [(300, 32)]
    for size, colour in itertools.product(small + SIZES, ["white", "lightgrey", "wheat"]):
        image = PAPERS[paper](Image.new("RGB", size, colour), source)
        assert is_blank(line_of(image)), (size, colour)


@pytest.mark.parametrize("colour", ["black", "dimgrey", "darkblue"])
def test_dark_paper_may_be_empty_too(colour: str) -> None:
    assert is_blank(line_of(Image.new("RGB", (400, 64), colour)))


@pytest.mark.parametrize("size", SIZES)
def test_pure_noise_is_blank(size: tuple[int, int]) -> None:
    source = np.random.default_rng(1)
    assert is_blank(line_of(Image.fromarray(source.integers(0, 256, (size[1], size[0], 3), np.uint8))))
    assert is_blank(line_of(Image.fromarray(source.integers(0, 256, (size[1], size[0]), np.uint8))))
    assert is_blank(line_of(with_noise(Image.new("L", size, 128), 40)))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (1, 300), (300, 1), (5, 2000)])
def test_images_of_any_shape_are_judged(size: tuple[int, int]) -> None:
    assert is_blank(line_of(Image.new("RGB", size, "white")))


def in_pencil(image: Image.Image) -> Image.Image:
    return with_noise(image.convert("L").point(lambda level: 235 - (255 - level) * 28 // 255), 1)


WRITTEN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "inverted": ImageOps.invert,
    "light pencil": in_pencil,
    "light pencil, inverted": lambda image: ImageOps.invert(in_pencil(image)),
    "noisy": lambda image: with_noise(image, 12),
    "bad JPEG": lambda image: as_jpeg(image, 12),
    "14 pixels high": lambda image: image.resize((image.width * 14 // image.height, 14), Image.Resampling.BOX),
    "large": lambda image: image.resize((image.width * 5, image.height * 5), Image.Resampling.BICUBIC),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(image.height / 40)),
    "yellow on white": lambda image: ImageOps.colorize(image.convert("L"), "yellow", "white"),
    "red on green as bright": lambda image: ImageOps.colorize(image.convert("L"), (226, 0, 0), (0, 115, 0)),
    "in shadow": lambda image: shadow(image, random.Random(1)),
    "on ruled paper": lambda image: Image.fromarray(
        np.minimum(np.asarray(image), np.asarray(ruled(Image.new("RGB", image.size, "white"), random.Random(2))))
    ),
    "last word alone": lambda image: image.crop((image.width * 3 // 4, 0, image.width, image.height)),
    "cut into": lambda image: ImageOps.crop(image, image.height // 4),
}


@pytest.mark.parametrize("change", WRITTEN)
def test_writing_is_never_blank(change: str) -> None:
    for path in SAMPLES:
        assert not is_blank(line_of(WRITTEN[change](Image.open(path).convert("RGB")))), path.name


@pytest.mark.parametrize(
    "mark",
    [
        [((140, 20), (140, 44))],  # l
        [((130, 40), (150, 20)), ((130, 20), (150, 40))],  # x
        [((136, 34), (148, 34))],  # -
        [((141, 44), (141, 46))],  # .
        [((141, 42), (139, 48))],  # ,
    ],
)
@pytest.mark.parametrize("ink", ["black", "slategrey", "lightgrey"])
def test_a_single_small_character_is_writing(mark: list[tuple[tuple[int, int], ...]], ink: str) -> None:
    image = Image.new("RGB", (280, 64), "white")
    for stroke in mark:
        ImageDraw.Draw(image).line(stroke, fill=ink, width=3)
    assert not is_blank(line_of(image))


def test_an_empty_line_is_answered_without_decoding(engine: OcrEngine) -> None:
    reader = Reader(engine)
    empty = Line(200, 40, b"\xf0" * (200 * 40 * 3))
    blanks = [reader.submit(f"blank {n}", empty, beams(4), partials=True) for n in range(3)]
    written = reader.submit("written", scribble(3), GREEDY)
    reader.finish()
    for blank in blanks:
        assert blank.accepted
        assert blank.partials == []
        assert blank.recognition is not None
        assert blank.recognition.blank
        assert [h.text for h in blank.recognition.hypotheses] == [""]
        assert blank.ids == [[]]
        assert blank.recognition.decoded_token_count == 0
        assert (blank.recognition.confidence, blank.recognition.confidence_calibrated) == (1.0, False)
        assert not blank.recognition.truncated
        assert not blank.recognition.repetition_suspected
    assert written.recognition is not None
    assert not written.recognition.blank
    assert written.ids[0]


def test_a_lane_can_be_told_to_read_empty_lines(engine: OcrEngine) -> None:
    lane = lane_in(engine)
    reading = type(lane)(lane.model, 32, 8, 10.0, detect_blank=False)
    reader = Reader(engine_of(reading))
    read = reader.submit("empty", Line(200, 40, b"\xff" * (200 * 40 * 3)), GREEDY)
    reader.finish()
    assert read.recognition is not None
    assert not read.recognition.blank
    assert read.ids[0]
