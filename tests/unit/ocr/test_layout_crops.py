"""Lines cut out of their page."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from services.ocr.crops import crop_line
from services.ocr.domain import Line, Page
from tests.support import pages
from tests.support.pages import PageSpec, Polygon


def cut(image: Image.Image, polygon: Polygon) -> Line:
    return crop_line(Page(image.width, image.height, image.tobytes()), polygon, 0)


def dark(line: Line) -> np.ndarray:
    pixels = np.frombuffer(line.pixels, np.uint8).reshape(line.height, line.width, 3)
    return np.asarray(pixels.mean(axis=2) < 128)


@pytest.mark.parametrize("degrees", [-10.0, 0.0, 7.0])
@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_a_line_comes_upright_and_level_with_paper_around(degrees: float, turned: int) -> None:
    spec = PageSpec(width=700, height=500, lines=3, size=50, degrees=degrees, turned=turned)
    straight = pages.render(PageSpec(width=700, height=500, lines=3, size=50), 3)
    leaning = pages.render(spec, 3)
    for plain, line in zip(straight.lines, leaning.lines, strict=True):
        wanted, got = cut(straight.image, plain.polygon), cut(leaning.image, line.polygon)
        assert (got.width, got.height) == pytest.approx((wanted.width, wanted.height), abs=2)
        ink = dark(got)
        assert not ink[[0, -1]].any()
        assert not ink[:, [0, -1]].any()
        # The same ink in the same places, up to the softness of turning.
        size = (wanted.width // 8, wanted.height // 8)
        coarse = [np.asarray(Image.fromarray(dark(one)).resize(size)).astype(float) for one in (wanted, got)]
        assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.7


def test_beyond_the_page_there_is_white() -> None:
    image = Image.new("RGB", (100, 40), (10, 10, 10))
    line = cut(image, ((0, 0), (100, 0), (100, 40), (0, 40)))
    assert (line.width, line.height) == (108, 48)
    edges = dark(line)
    assert not edges[[0, -1]].any()
    assert edges[8:-8, 8:-8].all()


def test_a_line_without_extent_is_still_an_image() -> None:
    image = Image.new("RGB", (50, 50), "white")
    ImageDraw.Draw(image).point((20, 20), fill="black")
    line = cut(image, ((20, 20), (20, 20), (20, 20), (20, 20)))
    assert line.width >= 4
    assert line.height >= 4
    assert len(line.pixels) == line.width * line.height * 3
