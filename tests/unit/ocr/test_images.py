"""Encoded bytes to a line; what the decoder itself takes and refuses is tests/unit/kit/test_images.py."""

import io

import pytest
from PIL import Image

from services.kit.faults import Fault, Kind
from services.kit.images import Limits
from services.ocr import images

LIMITS = Limits(max_bytes=5_000_000, max_pixels=1_000_000, min_side=4)


def test_a_line_is_its_size_and_its_rgb_bytes_row_by_row() -> None:
    picture = Image.new("L", (6, 4), 200)
    picture.putpixel((5, 1), 9)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    line = images.decode(buffer.getvalue(), LIMITS)
    assert (line.width, line.height) == (6, 4)
    assert line.pixels == bytes([200] * 3 * 11 + [9] * 3 + [200] * 3 * 12)


@pytest.mark.parametrize("field", ["image.content", "images[3].content"])
def test_what_is_no_image_is_refused_under_the_name_of_its_field(field: str) -> None:
    with pytest.raises(Fault) as caught:
        images.decode(b"hello", LIMITS, field)
    assert (caught.value.data.kind, caught.value.data.reason) == (Kind.INVALID_ARGUMENT, "IMAGE_NOT_RECOGNISED")
    assert [violation.field for violation in caught.value.data.fields] == [field]
