"""Decoding images in front processes: every mode to upright RGB on white, and precise faults for everything else."""

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from services.kit import images
from services.kit.faults import Fault, Kind
from services.kit.images import Limits

# pytest undoes the filter that the module sets; the test at the end looks at it in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMITS = Limits(max_bytes=5_000_000, max_pixels=1_000_000, min_side=4)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    assert picture.mode == "RGB"
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def fault_of(content: bytes, limits: Limits = LIMITS) -> Fault:
    with pytest.raises(Fault) as caught:
        images.decode(content, limits)
    assert [violation.field for violation in caught.value.data.fields] == ["image.content"]
    return caught.value


def two_tone(mode: str, left: Any, right: Any) -> Image.Image:
    """16x8, one value in the left half and another in the right one."""
    image = Image.new(mode, (16, 8), right)
    image.paste(left, (0, 0, 8, 8))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_every_accepted_format_gives_its_pixels(kind: str) -> None:
    picture = images.decode(encoded(two_tone("RGB", (250, 10, 20), (10, 20, 250)), kind), LIMITS)
    assert picture.size == (16, 8)
    for got, wanted in ((pixel(picture, 1, 1), (250, 10, 20)), (pixel(picture, 14, 6), (10, 20, 250))):
        assert all(abs(a - b) <= 40 for a, b in zip(got, wanted, strict=True)), (got, wanted)


@pytest.mark.parametrize(
    ("mode", "left", "right", "kind", "wanted"),
    [
        ("1", 0, 1, "PNG", ((0, 0, 0), (255, 255, 255))),
        ("L", 7, 200, "PNG", ((7, 7, 7), (200, 200, 200))),
        ("LA", (40, 255), (40, 0), "PNG", ((40, 40, 40), (255, 255, 255))),
        ("RGBA", (200, 0, 0, 255), (0, 0, 0, 128), "PNG", ((200, 0, 0), (127, 127, 127))),
        ("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), "TIFF", ((255, 0, 0), (0, 0, 0))),
        ("I;16", 0, 65535, "PNG", ((0, 0, 0), (255, 255, 255))),
        ("I;16", 32896, 257, "PNG", ((128, 128, 128), (1, 1, 1))),
        ("I", 0, 65535, "TIFF", ((0, 0, 0), (255, 255, 255))),
        ("I", 12, 200, "TIFF", ((12, 12, 12), (200, 200, 200))),
        ("I", -1000, 1_000_000, "TIFF", ((0, 0, 0), (255, 255, 255))),
        ("F", 0.0, 1.0, "TIFF", ((0, 0, 0), (255, 255, 255))),
        ("F", 30.0, 255.0, "TIFF", ((30, 30, 30), (255, 255, 255))),
        ("LAB", (255, 128, 128), (0, 128, 128), "TIFF", ((254, 255, 254), (1, 0, 1))),
    ],
)
def test_every_mode_becomes_rgb_on_white(
    mode: str, left: Any, right: Any, kind: str, wanted: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    picture = images.decode(encoded(two_tone(mode, left, right), kind), LIMITS)
    assert (pixel(picture, 1, 1), pixel(picture, 14, 6)) == wanted


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (16, 8), 1)
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.paste(0, (0, 0, 8, 8))
    picture = images.decode(encoded(image, transparency=1), LIMITS)
    assert (pixel(picture, 1, 1), pixel(picture, 14, 6)) == ((10, 20, 30), (255, 255, 255))


def test_grey_with_a_transparent_value_lies_on_white() -> None:
    picture = images.decode(encoded(two_tone("L", 9, 77), transparency=77), LIMITS)
    assert (pixel(picture, 1, 1), pixel(picture, 14, 6)) == ((9, 9, 9), (255, 255, 255))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (24, 8), "white")
    upright.paste("black", (0, 0, 8, 4))  # the top left corner tells every orientation apart
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(upright if stored is None else upright.transpose(stored), kind, exif=exif)
    picture = images.decode(content, LIMITS)
    assert picture.size == (24, 8)
    assert max(pixel(picture, 2, 1)) < 60
    assert min(min(pixel(picture, x, y)) for x, y in ((2, 6), (21, 1), (21, 6))) > 195


def test_a_broken_exif_block_does_not_matter() -> None:
    content = encoded(two_tone("RGB", "black", "white"), "PNG", exif=b"Exif\x00\x00garbage garbage")
    assert images.decode(content, LIMITS).width == 16


def opacity_of(content: bytes) -> Image.Image | None:
    return images.opacity(images.open_image(content), LIMITS)


@pytest.mark.parametrize(("mode", "left", "right"), [("RGBA", (1, 2, 3, 0), (1, 2, 3, 128)), ("LA", (9, 0), (9, 128))])
def test_opacity_is_the_alpha_channel(mode: str, left: Any, right: Any) -> None:
    alpha = opacity_of(encoded(two_tone(mode, left, right)))
    assert alpha is not None
    assert (alpha.mode, alpha.getpixel((1, 1)), alpha.getpixel((14, 6))) == ("L", 0, 128)


def test_opacity_of_a_palette_is_that_of_its_colours() -> None:
    image = Image.new("P", (16, 8), 1)
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.paste(0, (0, 0, 8, 8))
    alpha = opacity_of(encoded(image, transparency=1))
    assert alpha is not None
    assert (alpha.getpixel((1, 1)), alpha.getpixel((14, 6))) == (255, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16", "1"])
def test_a_wholly_opaque_picture_has_no_opacity(mode: str) -> None:
    assert opacity_of(encoded(Image.new(mode, (16, 8), "white" if mode != "I;16" else 9))) is None


def test_opacity_stands_as_upright_as_the_picture() -> None:
    picture = Image.new("RGBA", (24, 8), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = opacity_of(encoded(picture.transpose(Image.Transpose.ROTATE_90), exif=exif))
    assert alpha is not None
    assert alpha.size == (24, 8)
    assert (alpha.getpixel((0, 0)), alpha.getpixel((20, 6))) == (0, 255)


def test_opacity_of_a_damaged_picture_is_refused() -> None:
    whole = encoded(noise((100, 40)).convert("RGBA"))
    with pytest.raises(Fault) as caught:
        opacity_of(whole[: len(whole) // 2])
    assert caught.value.data.reason == "IMAGE_TRUNCATED"


def test_the_first_frame_of_a_tiff_is_taken() -> None:
    frames = [Image.new("L", (12, 6), 11), Image.new("L", (30, 30), 99)]
    picture = images.decode(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), LIMITS)
    assert (picture.size, pixel(picture, 0, 0)) == ((12, 6), (11, 11, 11))


def test_an_empty_image_is_refused() -> None:
    fault = fault_of(b"")
    assert (fault.data.kind, fault.data.reason) == (Kind.INVALID_ARGUMENT, "IMAGE_EMPTY")
    assert "PNG, JPEG, WebP, TIFF or BMP" in fault.data.message


def test_too_many_bytes_are_refused_with_the_limit() -> None:
    fault = fault_of(b"\x89PNG" + bytes(5_000_000))
    assert (fault.data.kind, fault.data.reason) == (Kind.TOO_LARGE, "IMAGE_TOO_LARGE")
    assert fault.data.metadata["limit_bytes"] == "5000000"


@pytest.mark.parametrize("content", [b"%PDF-1.7 ...", b"GIF89a" + bytes(50), b"hello", bytes(1000), b"\xff"])
def test_what_is_no_accepted_image_is_refused_with_what_would_be(content: bytes) -> None:
    fault = fault_of(content)
    assert (fault.data.kind, fault.data.reason) == (Kind.INVALID_ARGUMENT, "IMAGE_NOT_RECOGNISED")
    assert "PNG, JPEG, WebP, TIFF or BMP" in fault.data.message


def test_a_gif_is_refused_although_pillow_reads_it() -> None:
    assert fault_of(encoded(Image.new("P", (16, 16)), "GIF")).data.reason == "IMAGE_NOT_RECOGNISED"


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    whole = encoded(noise((100, 40)), kind)
    fault = fault_of(whole[: int(len(whole) * share)])
    assert fault.data.kind is Kind.INVALID_ARGUMENT
    assert fault.data.reason in ("IMAGE_TRUNCATED", "IMAGE_DAMAGED")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("length", [1, 4, 12, 20, 30])
def test_the_first_bytes_of_a_file_are_refused(kind: str, length: int) -> None:
    assert fault_of(encoded(noise((100, 40)), kind)[:length]).data.kind is Kind.INVALID_ARGUMENT


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, packed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    # The beginning of 30,000 x 30,000 grey pixels; all of them are a megabyte and take seconds to pack.
    bomb = png(30_000, 30_000, zlib.compress(bytes(30_001 * 1000)))
    monkeypatch.delattr(ImageFile.ImageFile, "load")  # no pixel may be decoded
    fault = fault_of(bomb, Limits(max_bytes=20_000_000, max_pixels=50_000_000, min_side=4))
    assert (fault.data.kind, fault.data.reason) == (Kind.TOO_LARGE, "IMAGE_TOO_MANY_PIXELS")
    assert "30000x30000" in fault.data.message
    assert fault.data.metadata["limit_pixels"] == "50000000"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP"])
def test_too_many_pixels_are_refused_in_every_format(kind: str) -> None:
    fault = fault_of(encoded(Image.new("L", (1100, 1000)), kind))
    assert (fault.data.kind, fault.data.reason) == (Kind.TOO_LARGE, "IMAGE_TOO_MANY_PIXELS")


@pytest.mark.parametrize("size", [(0, 64), (64, 0)])
def test_no_pixels_are_refused_with_the_size(size: tuple[int, int]) -> None:
    bitmap = bytearray(encoded(Image.new("RGB", (64, 64)), "BMP"))
    bitmap[18:26] = struct.pack("<ii", *size)
    for content in (png(*size, zlib.compress(b"")), bytes(bitmap)):
        fault = fault_of(content)
        assert (fault.data.kind, fault.data.reason) == (Kind.INVALID_ARGUMENT, "IMAGE_TOO_SMALL")
        assert f"{size[0]}x{size[1]}" in fault.data.message


def test_a_side_below_the_limit_is_refused_with_the_limit() -> None:
    fault = fault_of(encoded(Image.new("L", (100, 3))))
    assert (fault.data.reason, fault.data.metadata["min_side"]) == ("IMAGE_TOO_SMALL", "4")


def test_pixels_that_are_no_numbers_are_refused() -> None:
    content = encoded(two_tone("F", float("nan"), float("inf")), "TIFF")
    assert fault_of(content).data.reason == "IMAGE_DAMAGED"


@given(data=st.data())
def test_damage_anywhere_gives_an_image_or_a_fault_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP"]))
    content = bytearray(encoded(two_tone("RGB", (9, 9, 9), (200, 200, 200)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome: Image.Image | Fault
    try:
        outcome = images.decode(bytes(content), LIMITS)
    except Fault as fault:
        outcome = fault
    if isinstance(outcome, Image.Image):
        assert outcome.mode == "RGB"
        assert len(outcome.tobytes()) == outcome.width * outcome.height * 3 <= LIMITS.max_pixels * 3
    else:
        assert outcome.data.kind in (Kind.INVALID_ARGUMENT, Kind.TOO_LARGE)
        assert outcome.data.fields[0].field == "image.content"


def test_warnings_of_the_decoder_stay_out_of_the_log() -> None:
    content = encoded(noise((100, 40)), "TIFF")[:20]
    program = (
        "from services.kit import images\n"
        f"try: images.decode({content!r}, images.Limits(10**6, 10**6, 1))\n"
        "except images.Fault as fault: print(fault.data.reason)"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("IMAGE_DAMAGED\n", "")
