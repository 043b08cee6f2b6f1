"""Lines of rendered pages with known truth, through the real detector."""

import math
from functools import partial

import numpy as np
import pytest
from PIL import Image

from services.kit.faults import Fault, Kind
from services.ocr.domain import Layout, Page
from services.ocr.engine.layout import Detector, find_lines
from tests.support import pages
from tests.support.pages import PageSpec, RenderedPage

# Small enough to be quick, about as large as the network sees larger ones; some cases have their own size.
small = partial(PageSpec, width=1000, height=1414)
SEED = 7


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load(threads=1)


def as_page(image: Image.Image) -> Page:
    return Page(image.width, image.height, image.tobytes())


def found_of(rendered: RenderedPage, layout: Layout) -> dict[int, int]:
    return pages.match([line.polygon for line in rendered.lines], [line.polygon for line in layout.lines])


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(small(), id="plain"),
        pytest.param(small(paper="lines"), id="ruled"),
        pytest.param(small(paper="grid", rules=(120, 130, 150)), id="dark grid"),
        pytest.param(small(paper="margin", degrees=10), id="red margin, leaning right"),
        pytest.param(small(paper="lines", degrees=-10, desk=(90, 70, 50)), id="ruled, leaning left"),
        pytest.param(small(columns=2, lines=40), id="two columns"),
        pytest.param(small(columns=2, lines=41, heading=True, paper="lines", degrees=-6), id="heading"),
        pytest.param(small(spacing=1.2, paper="lines"), id="close lines"),
        pytest.param(small(indent=True, ragged=0.7, wobble=0.06), id="unsteady"),
        pytest.param(small(sheet=(40, 60, 50), ink=(230, 230, 230)), id="light on dark"),
        pytest.param(
            PageSpec(
                width=1500, height=2000, paper="margin", degrees=4, shadow=0.6, noise=8, jpeg=50, desk=(90, 70, 50)
            ),
            id="photo",
        ),
        pytest.param(PageSpec(width=620, height=877, paper="lines", jpeg=70), id="75 dpi"),
        pytest.param(small(turned=270, paper="lines", degrees=3), id="on its side"),
    ],
)
def test_lines_are_found_in_reading_order(detector: Detector, spec: PageSpec) -> None:
    rendered = pages.render(spec, SEED)
    layout = find_lines(as_page(rendered.image), detector)
    found = found_of(rendered, layout)
    assert len(found) >= 0.9 * len(rendered.lines)
    assert len(layout.lines) <= 1.1 * len(rendered.lines)
    order = [found[line] for line in sorted(found)]
    assert order == sorted(order)
    assert layout.rotation == (360 - spec.turned) % 360
    assert layout.skew == pytest.approx(spec.degrees, abs=1.0)
    for got in layout.lines:
        assert got.angle == pytest.approx((spec.degrees + spec.turned + 180) % 360 - 180, abs=3.0)
        assert 0.5 <= got.score <= 1
    # Columns are blocks of their own, numbered in reading order.
    numbers_in_order = [got.block for got in layout.lines]
    assert numbers_in_order == sorted(numbers_in_order)
    blocks: dict[int, set[int]] = {}
    for line, place in found.items():
        blocks.setdefault(rendered.lines[line].column, set()).add(layout.lines[place].block)
    assert all(len(numbers) == 1 for numbers in blocks.values())
    assert len({next(iter(numbers)) for numbers in blocks.values()}) == len(blocks)


def test_polygons_begin_where_the_text_does(detector: Detector) -> None:
    rendered = pages.render(small(turned=270), SEED)
    layout = find_lines(as_page(rendered.image), detector)
    for line, place in found_of(rendered, layout).items():
        height = math.dist(rendered.lines[line].polygon[0], rendered.lines[line].polygon[3])
        for wanted, got in zip(rendered.lines[line].polygon, layout.lines[place].polygon, strict=True):
            assert math.dist(wanted, got) < height


def test_a_known_rotation_is_taken(detector: Detector) -> None:
    rendered = pages.render(small(turned=90, lines=12), SEED)
    layout = find_lines(as_page(rendered.image), detector, rotation=270)
    assert layout.rotation == 270
    assert layout.lines[0].angle == pytest.approx(90, abs=3)
    found = found_of(rendered, layout)
    assert [found[line] for line in range(12)] == list(range(12))
    # Whether it stands on its head does not show: without being told, the other side is up.
    assert find_lines(as_page(rendered.image), detector).rotation == 90


def test_more_lines_than_the_limit_are_refused(detector: Detector) -> None:
    rendered = pages.render(small(), SEED)
    assert len(find_lines(as_page(rendered.image), detector, max_lines=25).lines) == 25
    with pytest.raises(Fault) as raised:
        find_lines(as_page(rendered.image), detector, max_lines=24)
    assert raised.value.data.kind is Kind.TOO_LARGE
    assert raised.value.data.reason == "TOO_MANY_LINES"
    assert "25 lines" in raised.value.data.message
    assert "24" in raised.value.data.message


def test_a_page_of_thousands_of_tiny_lines_is_refused(detector: Detector) -> None:
    tile = pages.render(PageSpec(width=1000, height=1000, lines=60, size=9, ragged=0.1), SEED).image
    image = Image.new("RGB", (7000, 7000))
    for x in range(0, 7000, 1000):
        for y in range(0, 7000, 1000):
            image.paste(tile, (x, y))
    with pytest.raises(Fault) as raised:
        find_lines(as_page(image), detector)
    assert raised.value.data.kind is Kind.TOO_LARGE
    assert raised.value.data.reason == "LINES_TOO_SMALL"
    assert "7000x7000" in raised.value.data.message


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (30, 3000), (800, 1131)])
@pytest.mark.parametrize("kind", ["white", "black", "noise"])
def test_a_page_without_writing_has_no_lines(detector: Detector, size: tuple[int, int], kind: str) -> None:
    width, height = size
    if kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, width * height * 3, dtype=np.uint8).tobytes()
    else:
        pixels = (b"\xff" if kind == "white" else b"\0") * (width * height * 3)
    assert find_lines(Page(width, height, pixels), detector) == Layout(0, 0.0, ())


def test_a_single_word_is_a_line(detector: Detector) -> None:
    rendered = pages.render(PageSpec(width=800, height=600, lines=1, size=60, ragged=0.9), SEED)
    layout = find_lines(as_page(rendered.image), detector)
    assert found_of(rendered, layout) == {0: 0}
    assert len(layout.lines) == 1
