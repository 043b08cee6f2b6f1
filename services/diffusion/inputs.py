"""The pictures of a request: encoded bytes to pixels. Runs in the front process, on Pillow alone.

Decoding takes up to a second for the largest pictures, so it belongs on a thread.
"""

import hashlib
import math
from typing import NamedTuple

from PIL import Image

from services.diffusion.domain import Pixels
from services.diffusion.settings import Settings
from services.kit import images
from services.kit.faults import Fault, invalid_field
from services.kit.images import Limits

# What is at least as light as this is repainted; diffusers' pipelines draw the line at the same half.
REPAINT_FROM = 128
# Formats that lose something: in a mask their black and white come back a little off.
_LOSSY = ("JPEG", "WEBP")
_LOSSY_NOISE = 8


class Input(NamedTuple):
    """A decoded picture, and the SHA-256 of its encoded bytes in hexadecimal."""

    pixels: Pixels
    sha256: str


def limits_of(settings: Settings) -> Limits:
    """What a picture of a request may be."""
    return Limits(settings.max_image_bytes, settings.max_image_pixels, min_side=1)


def decode_picture(content: bytes, limits: Limits, field: str) -> Input:
    """Decode an encoded picture to "RGB", upright by its EXIF orientation, transparency laid on white.

    Raises Fault (INVALID_ARGUMENT or TOO_LARGE), naming `field`, for anything that is not a whole image in `limits`.
    """
    return Input(_pixels(images.decode(content, limits, field)), _digest(content))


def decode_mask(content: bytes, limits: Limits, field: str) -> Input:
    """Decode an encoded mask to "L", 255 where to repaint; upright, and with the Faults of `decode_picture`.

    A mask with any transparency is its opacity: what was drawn on an empty layer is repainted, in whatever colour.
    That is how AUTOMATIC1111's web UI reads masks, too. Every other mask is its luminance; the faint noise
    that JPEG and WebP leave in black and in white is taken out, so that what was left black stays exactly as it was.
    """
    images.check_size(content, limits, field)
    opened = images.open_image(content, field)
    mask = images.opacity(opened, limits, field)
    if mask is None:
        mask = images.to_rgb(opened, limits, field).convert("L")
        if opened.format in _LOSSY:
            mask = mask.point([_without_noise(value) for value in range(256)])
    return Input(_pixels(mask), _digest(content))


def check_mask(mask: Pixels, image: Pixels, *, inverted: bool) -> None:
    """Raise Fault (INVALID_ARGUMENT) unless the mask is as large as the picture and leaves something to repaint."""
    if (mask.width, mask.height) != (image.width, image.height):
        raise _bad_mask(
            f"it is {mask.width}x{mask.height} pixels and the image {image.width}x{image.height}; both must be the"
            " same size",
            "MASK_SIZE_MISMATCH",
        )
    darkest, lightest = _image(mask).getextrema()
    assert isinstance(darkest, int)
    assert isinstance(lightest, int)
    if inverted and darkest > 255 - REPAINT_FROM:
        raise _bad_mask(
            f"it leaves nothing to repaint: it is inverted, and its darkest pixel is {darkest}; at least one must be"
            f" {255 - REPAINT_FROM} or less",
            "MASK_EMPTY",
        )
    if not inverted and lightest < REPAINT_FROM:
        raise _bad_mask(
            f"it leaves nothing to repaint: its lightest pixel is {lightest}; at least one must be {REPAINT_FROM} or"
            " more",
            "MASK_EMPTY",
        )


def default_size(size: tuple[int, int], multiple: int, max_side: int, max_pixels: int) -> tuple[int, int]:
    """The size to paint a picture of `size` (width, height) at when the caller names none, in pixels.

    Both sides are multiples of `multiple`, at most `max_side`, and `max_pixels` together; within that the picture's
    own size, or its shape scaled down, as nearly as may be.
    """
    width, height = size
    scale = min(1.0, max_side / max(size), math.sqrt(max_pixels / (width * height)))
    most = max(max_side // multiple, 1)
    columns, rows = (min(max(round(side * scale / multiple), 1), most) for side in size)
    while columns * rows * multiple * multiple > max_pixels and (columns, rows) != (1, 1):
        # Rounding up both sides went over; the one that is more above its due gives way.
        if rows == 1 or (columns > 1 and columns * height > rows * width):
            columns -= 1
        else:
            rows -= 1
    return columns * multiple, rows * multiple


def _without_noise(value: int) -> int:
    if value < _LOSSY_NOISE:
        return 0
    return 255 if value > 255 - _LOSSY_NOISE else value


def _bad_mask(description: str, reason: str) -> Fault:
    return invalid_field("inpaint.mask", description, reason=reason)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _pixels(image: Image.Image) -> Pixels:
    return Pixels(image.width, image.height, "L" if image.mode == "L" else "RGB", image.tobytes())


def _image(pixels: Pixels) -> Image.Image:
    return Image.frombytes(pixels.mode, (pixels.width, pixels.height), pixels.content)
