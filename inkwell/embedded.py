"""The parameters that every painted picture carries inside its file, so that it can be repeated from it.

They are JSON, one key a field of `GenerationParameters` that is set: the text chunk `inkwell` of a PNG, the EXIF field
ImageDescription of a JPEG or WebP.
"""

import dataclasses
import enum
import io
import json
import warnings
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from inkwell.files import load
from inkwell.types import GenerationParameters, ImageSource

_PNG_KEY = "inkwell"
_IMAGE_DESCRIPTION = 0x010E


def embedded_parameters(picture: ImageSource) -> GenerationParameters:
    """What a picture was painted with, read from its bytes or file.

    Raises OSError if the file cannot be read, and ValueError if it is no PNG, JPEG or WebP or carries no parameters.
    """
    text = _embedded_text(load(picture))
    try:
        values = json.loads(text)
        parameters: GenerationParameters = _parsed(GenerationParameters, values)
        return parameters
    except (TypeError, ValueError, RecursionError) as error:
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


def _parsed(kind: Any, value: Any) -> Any:
    """`value` of a JSON text as a `kind`: a dataclass, `X | None`, a tuple of one type, an enum or a scalar.

    Keys that this version does not know are left out. Raises TypeError or ValueError for what does not fit.
    """
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _parsed(arguments[0], value)
    if get_origin(kind) is tuple:
        return tuple(_parsed(arguments[0], each) for each in _typed(value, list))
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        known = get_type_hints(kind)
        given = _typed(value, dict)
        return kind(**{name: _parsed(hint, given[name]) for name, hint in known.items() if name in given})
    if issubclass(kind, enum.StrEnum):
        return kind(value)
    return _typed(value, kind)


def _typed(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
