"""The parameters inside a picture's file, so that it can be repeated from the file itself.

Two forms, always both: the text that AUTOMATIC1111's web UI writes and most tools read, and JSON with every field of
`Parameters`. In a PNG they are the text chunks `parameters` and `inkwell`; in JPEG and WebP the EXIF fields
UserComment (with its UNICODE prefix) and ImageDescription. Nothing here depends on the time: the same parameters give
the same bytes.
"""

import io
import json
from typing import TYPE_CHECKING

import msgspec

from services.diffusion.domain import Parameters
from services.diffusion.scheduler_table import TABLE

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_TEXT_KEY = "parameters"
PNG_JSON_KEY = "inkwell"
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_IMAGE_DESCRIPTION = 0x010E
_UNICODE_PREFIX = b"UNICODE\0"
# An EXIF block fits one JPEG segment of 64 KiB; the rest is for its directories.
EXIF_BYTES_MOST = 65_000


def infotext(parameters: Parameters) -> str:
    """The A1111-style text: prompt, negative prompt, and one line of settings, under the names its readers know."""
    settings = {
        "Steps": str(parameters.step_count),
        "Sampler": _sampler_name(parameters.scheduler),
        "CFG scale": f"{parameters.guidance_scale:.9g}",
        "Seed": str(parameters.seed),
        "Size": f"{parameters.width}x{parameters.height}",
        "Model": parameters.model,
    }
    if parameters.strength is not None:
        settings["Denoising strength"] = f"{parameters.strength:.9g}"
    if parameters.clip_skip:
        settings["Clip skip"] = str(parameters.clip_skip + 1)  # its 1 is our 0: nothing skipped
    if (variation := parameters.variation) is not None:
        settings["Variation seed"] = str(variation.seed)
        settings["Variation seed strength"] = f"{variation.strength:.9g}"
    if (hires := parameters.hires) is not None:
        settings["Hires resize"] = f"{hires.width}x{hires.height}"
        settings["Hires steps"] = str(hires.step_count)
        settings["Hires upscaler"] = hires.upscaler
        settings["Denoising strength"] = f"{hires.strength:.9g}"
    if (refiner := parameters.refiner) is not None:
        settings["Refiner"] = refiner.model
        settings["Refiner switch at"] = f"{refiner.switch_at:.9g}"
    # Where its readers look for LoRAs.
    tags = "".join(f" <lora:{lora.name}:{lora.weight:.9g}>" for lora in parameters.loras)
    lines = [(parameters.prompt + tags).strip() if tags else parameters.prompt]
    if parameters.negative_prompt:
        lines.append(f"Negative prompt: {parameters.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items()))
    return "\n".join(lines)


def to_json(parameters: Parameters) -> str:
    """Every parameter under its protobuf field name, as ASCII JSON: EXIF text is 7-bit."""
    return json.dumps(msgspec.to_builtins(parameters), ensure_ascii=True)


def from_json(text: str) -> Parameters:
    """The inverse of `to_json`; raises ValueError if it is something else."""
    try:
        return msgspec.json.decode(text.encode(), type=Parameters)
    except msgspec.DecodeError as error:
        raise ValueError(f"not the parameters of a picture: {error}") from error


def exif_size(parameters: Parameters) -> int:
    """Bytes that the two texts take in an EXIF block; above EXIF_BYTES_MOST they do not fit a JPEG."""
    return len(_user_comment(parameters)) + len(to_json(parameters))


def encode(image: "Image", parameters: Parameters, media_type: str, quality: int) -> bytes:
    """The picture as a file with its parameters embedded.

    image: 8-bit RGB. media_type: image/png, image/jpeg or image/webp. quality: 1 to 100, ignored for PNG.
    Raises ValueError for another media type.
    """
    buffer = io.BytesIO()
    if media_type == "image/png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text(PNG_TEXT_KEY, infotext(parameters))  # becomes iTXt by itself where Latin-1 does not do
        info.add_itxt(PNG_JSON_KEY, to_json(parameters))
        image.save(buffer, "PNG", pnginfo=info)
    elif media_type == "image/jpeg":
        # 4:4:4: small pictures with flat colours suffer most from halved chroma.
        image.save(buffer, "JPEG", quality=quality, subsampling=0, exif=_exif(parameters))
    elif media_type == "image/webp":
        image.save(buffer, "WEBP", quality=quality, method=4, exif=_exif(parameters))
    else:
        raise ValueError(f"{media_type} cannot be written")
    return buffer.getvalue()


def read(content: bytes) -> tuple[Parameters, str]:
    """The parameters of a file that `encode` made, and its A1111-style text.

    Raises ValueError for what is not a picture or carries no parameters of ours.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        if image.format == "PNG":
            image.load()  # text chunks may stand behind the pixels
            chunks = getattr(image, "text", {})
            embedded, text = chunks.get(PNG_JSON_KEY), chunks.get(PNG_TEXT_KEY, "")
        else:
            exif = image.getexif()
            embedded = exif.get(_IMAGE_DESCRIPTION)
            comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
            text = comment.removeprefix(_UNICODE_PREFIX).decode("utf-16-be", "replace") if comment else ""
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError("not a PNG, JPEG or WebP picture") from error
    if not embedded:
        raise ValueError("the picture carries no parameters of Inkwell")
    return from_json(embedded), text


def _sampler_name(scheduler: str) -> str:
    """What A1111 calls it; our own name for others, which its parsers take as an unknown sampler."""
    entry = TABLE.get(scheduler)
    return entry.aliases[0] if entry else scheduler


def _quoted(value: str) -> str:
    # A1111's own rule: a value that would break the comma-separated line is written as a JSON string.
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value


def _user_comment(parameters: Parameters) -> bytes:
    return _UNICODE_PREFIX + infotext(parameters).encode("utf-16-be")


def _exif(parameters: Parameters) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = to_json(parameters)
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _user_comment(parameters)
    return exif.tobytes()
