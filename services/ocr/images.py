"""Encoded bytes to the line that a model reads. Runs in the front process."""

from services.kit import images
from services.ocr.domain import Line


def decode(content: bytes, limits: images.Limits, field: str = images.FIELD) -> Line:
    """Decode one image as `services.kit.images.decode` does; raises the same Faults."""
    picture = images.decode(content, limits, field)
    return Line(picture.width, picture.height, picture.tobytes())
