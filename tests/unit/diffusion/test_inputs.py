"""Pictures of a request: decoded with their limits and fields, masks read as their painters meant them."""

import hashlib
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from services.diffusion import inputs
from services.diffusion.domain import Pixels
from services.diffusion.settings import ModelSettings, Settings
from services.kit.faults import Fault, Kind

SETTINGS = Settings(models={"m": ModelSettings(source="m")}, max_image_bytes=100_000, max_image_pixels=10_000)
LIMITS = inputs.limits_of(SETTINGS)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    """8x4, one value in the left half and another in the right one."""
    image = Image.new(mode, (8, 4), right)
    image.paste(left, (0, 0, 4, 4))
    return image


def mask_values(content: bytes) -> tuple[int, int]:
    """What the decoded mask says on the left and on the right."""
    pixels = inputs.decode_mask(content, LIMITS, "inpaint.mask.content").pixels
    assert (pixels.mode, pixels.width, pixels.height, len(pixels.content)) == ("L", 8, 4, 32)
    return pixels.content[0], pixels.content[7]


def test_a_picture_is_its_rgb_bytes_and_the_digest_of_its_file() -> None:
    content = encoded(halves("RGB", (1, 2, 3), (4, 5, 6)))
    pixels, digest = inputs.decode_picture(content, LIMITS, "image.content")
    assert pixels == Pixels(8, 4, "RGB", (bytes([1, 2, 3]) * 4 + bytes([4, 5, 6]) * 4) * 4)
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("field", ["image.content", "controls[2].image.content", "image_prompts[0].image.content"])
@pytest.mark.parametrize("decode", [inputs.decode_picture, inputs.decode_mask])
@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"", Kind.INVALID_ARGUMENT, "IMAGE_EMPTY"),
        (b"hello", Kind.INVALID_ARGUMENT, "IMAGE_NOT_RECOGNISED"),
        (bytes(100_001), Kind.TOO_LARGE, "IMAGE_TOO_LARGE"),
        (encoded(Image.new("L", (101, 100))), Kind.TOO_LARGE, "IMAGE_TOO_MANY_PIXELS"),
        (encoded(Image.effect_noise((90, 90), 80))[:3000], Kind.INVALID_ARGUMENT, "IMAGE_TRUNCATED"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_decoded_is_refused_under_its_field(
    field: str, decode: Any, content: bytes, kind: Kind, reason: str
) -> None:
    with pytest.raises(Fault) as caught:
        decode(content, LIMITS, field)
    assert (caught.value.data.kind, caught.value.data.reason) == (kind, reason)
    assert [violation.field for violation in caught.value.data.fields] == [field]


@pytest.mark.parametrize(
    ("mode", "left", "right", "wanted"),
    [
        ("L", 0, 255, (0, 255)),
        ("L", 3, 250, (3, 250)),
        ("1", 0, 1, (0, 255)),
        ("RGB", (0, 0, 0), (255, 255, 255), (0, 255)),
        ("RGB", (0, 255, 0), (0, 0, 255), (150, 29)),
        ("I;16", 0, 65535, (0, 255)),
        ("RGBA", (0, 0, 0, 255), (255, 255, 255, 255), (0, 255)),
    ],
)
def test_an_opaque_mask_is_its_luminance(mode: str, left: Any, right: Any, wanted: tuple[int, int]) -> None:
    assert mask_values(encoded(halves(mode, left, right))) == wanted


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0)])
def test_a_mask_drawn_on_an_empty_layer_is_what_was_drawn_in_any_colour(colour: tuple[int, int, int]) -> None:
    assert mask_values(encoded(halves("RGBA", (255, 255, 255, 0), (*colour, 255)))) == (0, 255)
    assert mask_values(encoded(halves("RGBA", (0, 0, 0, 0), (*colour, 100)))) == (0, 100)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_what_a_lossy_format_makes_of_black_and_white_is_black_and_white(kind: str) -> None:
    mask = Image.new("L", (80, 80), 0)
    mask.paste(255, (33, 21, 71, 50))
    content = encoded(mask.convert("RGB"), kind, quality=90)
    assert Image.open(io.BytesIO(content)).convert("L").tobytes() != mask.tobytes()  # the format did add noise
    pixels = inputs.decode_mask(content, LIMITS, "inpaint.mask.content").pixels
    far = Image.frombytes("L", (80, 80), pixels.content)
    far.paste(0, (30, 18, 74, 53))
    assert far.getbbox() is None
    assert Image.frombytes("L", (80, 80), pixels.content).getpixel((50, 35)) == 255


def grey(width: int, height: int, value: int) -> Pixels:
    return Pixels(width, height, "L", bytes([value]) * (width * height))


def refusal(mask: Pixels, image: Pixels, *, inverted: bool = False) -> Fault:
    with pytest.raises(Fault) as caught:
        inputs.check_mask(mask, image, inverted=inverted)
    assert caught.value.data.kind is Kind.INVALID_ARGUMENT
    assert [violation.field for violation in caught.value.data.fields] == ["inpaint.mask"]
    return caught.value


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    fault = refusal(grey(8, 4, 255), Pixels(4, 8, "RGB", bytes(96)))
    assert fault.data.reason == "MASK_SIZE_MISMATCH"
    assert "8x4" in fault.data.message
    assert "4x8" in fault.data.message


@pytest.mark.parametrize(("value", "inverted"), [(0, False), (127, False), (255, True), (128, True)])
def test_a_mask_that_leaves_nothing_to_repaint_is_refused(value: int, inverted: bool) -> None:
    fault = refusal(grey(8, 4, value), Pixels(8, 4, "RGB", bytes(96)), inverted=inverted)
    assert fault.data.reason == "MASK_EMPTY"
    assert f"is {value};" in fault.data.message


@pytest.mark.parametrize(("value", "inverted"), [(128, False), (255, False), (127, True), (0, True)])
def test_one_pixel_to_repaint_is_enough(value: int, inverted: bool) -> None:
    mask = bytearray(bytes([255 if inverted else 0]) * 32)
    mask[13] = value
    inputs.check_mask(Pixels(8, 4, "L", bytes(mask)), Pixels(8, 4, "RGB", bytes(96)), inverted=inverted)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((512, 512), (512, 512)),
        ((515, 508), (512, 512)),
        ((3, 1000), (8, 1000)),
        ((4000, 3000), (1024, 768)),
        ((3000, 4000), (768, 1024)),
        ((100_000, 10), (1024, 8)),
    ],
)
def test_a_picture_is_painted_at_its_own_size_as_nearly_as_may_be(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert inputs.default_size(size, 8, 1024, 1024 * 1024) == wanted


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    multiple=st.sampled_from([8, 16, 64]),
    max_side=st.integers(64, 4096),
    max_pixels=st.integers(64 * 64, 4096 * 4096),
)
def test_the_default_size_is_always_one_that_is_accepted(
    width: int, height: int, multiple: int, max_side: int, max_pixels: int
) -> None:
    across, down = inputs.default_size((width, height), multiple, max_side, max_pixels)
    assert across % multiple == down % multiple == 0
    assert multiple <= min(across, down)
    assert max(across, down) <= max_side
    assert across * down <= max_pixels
    if min(across, down) > 8 * multiple:  # far from the smallest sides, the shape is kept
        assert across / down == pytest.approx(width / height, rel=0.25)
