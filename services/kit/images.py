"""Encoded bytes to pixels. Runs in front processes on Pillow alone.

Only five formats are ever handed to a decoder. Limits are checked on the header, before any pixel is decoded.
"""

import io
import math
import struct
import warnings
from dataclasses import dataclass

from PIL import Image, ImageFile, UnidentifiedImageError

from services.kit.faults import Fault, invalid_field, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
ACCEPTED = "PNG, JPEG, WebP, TIFF or BMP"
# The request field that faults name unless the caller says another.
FIELD = "image.content"

# The limits below are stricter and name the field; Pillow's own would only add warnings and errors of its own.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns about odd metadata in files of strangers; none of it is for our log.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Limits:
    """What an image may be: encoded bytes, pixels (width x height), smallest side in pixels."""

    max_bytes: int
    max_pixels: int
    min_side: int


def check_size(content: bytes, limits: Limits, field: str = FIELD) -> None:
    """Raise Fault for an empty image or one with too many encoded bytes; looks at the length only."""
    if not content:
        raise invalid_field(field, f"it is empty; send the bytes of one {ACCEPTED} file", reason="IMAGE_EMPTY")
    if len(content) > limits.max_bytes:
        raise too_large(
            field,
            "IMAGE_TOO_LARGE",
            f"{len(content)} bytes are more than the limit of {limits.max_bytes}",
            size_bytes=len(content),
            limit_bytes=limits.max_bytes,
        )


def decode(content: bytes, limits: Limits, field: str = FIELD) -> Image.Image:
    """Decode one image into 8-bit RGB, upright by its EXIF orientation, transparency laid on white.

    Of a file with several frames the first is taken. 16-bit and floating-point grey is scaled to 8 bits. Raises Fault
    (INVALID_ARGUMENT or TOO_LARGE), naming `field`, for anything that is not a whole image within `limits`.
    """
    check_size(content, limits, field)
    return to_rgb(open_image(content, field), limits, field)


def to_rgb(image: ImageFile.ImageFile, limits: Limits, field: str = FIELD) -> Image.Image:
    """Decode the present frame of an opened image as `decode` does; raises the same Faults."""
    _load(image, limits, field)
    try:
        return _to_rgb(_upright(image), field)
    except (ValueError, KeyError):
        raise _unreadable_mode(image, field) from None


def opacity(image: ImageFile.ImageFile, limits: Limits, field: str = FIELD) -> Image.Image | None:
    """How opaque each pixel of an opened image is, "L" and upright; None where all of it is. Faults as `decode`."""
    _load(image, limits, field)
    # Wide grey has no alpha; it can only name one value as transparent, which nobody draws with.
    if not image.has_transparency_data or image.mode == "F" or image.mode.startswith("I"):
        return None
    try:
        alpha = _upright(image).convert("RGBA").getchannel("A")
    except (ValueError, KeyError):
        raise _unreadable_mode(image, field) from None
    return None if alpha.getextrema()[0] == 255 else alpha


def _load(image: ImageFile.ImageFile, limits: Limits, field: str) -> None:
    _check_dimensions(image.size, limits, field)
    kind = image.format or "image"
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they meet in a damaged file
        raise damaged(kind, error, field) from None


def _unreadable_mode(image: Image.Image, field: str) -> Fault:
    return invalid_field(
        field,
        f"colour mode {image.mode} is not readable; save the image as 8-bit grey or RGB",
        reason="IMAGE_MODE_UNSUPPORTED",
    )


def open_image(content: bytes, field: str = FIELD) -> ImageFile.ImageFile:
    """Read the header of one of the accepted formats; raises Fault (INVALID_ARGUMENT) for anything else."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        kind = signature(content)
        if kind is None:
            raise invalid_field(
                field, f"it is not an image that can be read; accepted: {ACCEPTED}", reason="IMAGE_NOT_RECOGNISED"
            ) from None
        size = _declared_size(kind, content)
        if size is not None and 0 in size:
            raise invalid_field(
                field,
                f"the {kind} is {size[0]}x{size[1]} pixels; both sides must be above 0",
                reason="IMAGE_TOO_SMALL",
            ) from None
        raise damaged(kind, None, field) from None
    except Exception as error:  # noqa: BLE001 - a header can be broken in any way
        raise damaged(signature(content) or "image", error, field) from None


def _check_dimensions(size: tuple[int, int], limits: Limits, field: str) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise too_large(
            field,
            "IMAGE_TOO_MANY_PIXELS",
            f"{width}x{height} pixels are {width * height}, more than the limit of {limits.max_pixels};"
            " scale the image down",
            width=width,
            height=height,
            limit_pixels=limits.max_pixels,
        )
    if min(width, height) < limits.min_side:
        raise invalid_field(
            field,
            f"{width}x{height} pixels are too few; each side must be at least {limits.min_side}",
            reason="IMAGE_TOO_SMALL",
            width=width,
            height=height,
            min_side=limits.min_side,
        )


def damaged(kind: str, error: Exception | None, field: str = FIELD) -> Fault:
    """The fault of a file that looked like a `kind` and could not be decoded; `error` tells whether it was cut off."""
    cut = error is not None and ("truncated" in str(error).lower() or isinstance(error, EOFError))
    what = "ends too early" if cut else "is damaged and cannot be decoded"
    return invalid_field(
        field,
        f"the {kind} {what}; send the whole file",
        reason="IMAGE_TRUNCATED" if cut else "IMAGE_DAMAGED",
    )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where the image does not say."""
    try:
        stated = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - a broken EXIF block does not make the pixels unreadable
        return 1
    return stated if stated in _UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    turned = orientation(image)
    return image if turned == 1 else image.transpose(_UPRIGHT[turned])


def _to_rgb(image: Image.Image, field: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_8_bit(image, field).convert("RGB")
    if image.has_transparency_data:
        # Premultiplied and palette modes only convert to RGBA, and from there lie on white like any other.
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image, field: str) -> Image.Image:
    """Scale wide grey to 0–255: 16-bit by its range, other types by the smallest usual range that holds the values."""
    sixteen_bit = image.mode.startswith("I;16")
    wide = image if image.mode in ("I", "F") else image.convert("I")
    low, high = (float(extreme) for extreme in wide.getextrema())  # type: ignore[arg-type]  # one band, two numbers
    if not (math.isfinite(low) and math.isfinite(high)):
        raise invalid_field(field, "it has pixels that are not finite numbers", reason="IMAGE_DAMAGED")
    if sixteen_bit:
        scale, offset = 255 / 65535, 0.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        scale, offset = 255.0, 0.0
    elif low >= 0 and high <= 255:
        scale, offset = 1.0, 0.0
    elif low >= 0 and high <= 65535:
        scale, offset = 255 / 65535, 0.0
    else:
        scale = 255 / (high - low) if high > low else 0.0
        offset = -low * scale
    # Through F, because an integer image would round the scale's steps towards zero.
    return wide.convert("F").point(lambda value: value * scale + offset + 0.5).convert("L")


def signature(content: bytes) -> str | None:
    """The accepted image format that the first bytes look like."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    if content[:4] in (b"II*\x00", b"MM\x00*"):
        return "TIFF"
    if content.startswith(b"BM"):
        return "BMP"
    return None


def _declared_size(kind: str, content: bytes) -> tuple[int, int] | None:
    """Width and height by the header of a PNG or BMP that Pillow does not take for one, such as 0x64."""
    try:
        if kind == "PNG":
            return struct.unpack_from(">II", content, 16)
        if kind == "BMP":
            return struct.unpack_from("<ii", content, 18)
    except struct.error:
        pass
    return None
