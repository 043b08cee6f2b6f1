"""The parameters that every painted picture carries inside its file, so that it can be repeated from it.

They are JSON, one key a field of `GenerationParameters`: the text chunk `inkwell` of a PNG, the EXIF field
ImageDescription of a JPEG or WebP.
"""

import io
import json
import warnings
from typing import Any

from inkwell.files import load
from inkwell.types import GenerationParameters, ImageSource

_PNG_KEY = "inkwell"
_IMAGE_DESCRIPTION = 0x010E
_FIELD_TYPES: dict[str, type] = {
    "model": str,
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "step_count": int,
    "guidance_scale": float,
    "scheduler": str,
    "seed": int,
}


def embedded_parameters(picture: ImageSource) -> GenerationParameters:
    """What a picture was painted with, read from its bytes or file.

    Raises OSError if the file cannot be read, and ValueError if it is no PNG, JPEG or WebP or carries no parameters.
    """
    text = _embedded_text(load(picture))
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("not an object")
        return GenerationParameters(**{name: _typed(values[name], kind) for name, kind in _FIELD_TYPES.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the picture's parameters make no sense: {error!r}") from None


def _embedded_text(content: bytes) -> str:
    from PIL import Image  # here, so that programs that do not need it never load it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
            if image.format == "PNG":
                image.load()  # text chunks may stand behind the pixels
                text = getattr(image, "text", {}).get(_PNG_KEY)
            else:
                text = image.getexif().get(_IMAGE_DESCRIPTION)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"not a PNG, JPEG or WebP picture that can be read: {error}") from None
    if not isinstance(text, str) or not text:
        raise ValueError("the picture carries no parameters of Inkwell")
    return text


def _typed(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
