"""What the front process and a document's render process say to each other.

Length-prefixed MessagePack frames over the render process's standard input and output; each request has one reply.
"""

import struct
from typing import BinaryIO

import msgspec

from services.kit.faults import FaultData

Point = tuple[float, float]

HEADER = struct.Struct("<I")


class Limits(msgspec.Struct, frozen=True):
    """What a page may be, and what the process may take."""

    max_page_pixels: int  # width x height
    min_page_side: int  # pixels
    memory_bytes: int  # address space of the render process
    step_s: float  # processor time of one request


# --- front to render process ---


class Open(msgspec.Struct, frozen=True, tag=True):
    """Always the first; the file stays in the render process's memory."""

    content: bytes
    limits: Limits


class Render(msgspec.Struct, frozen=True, tag=True):
    """Draw or decode a page."""

    page: int  # from 1
    dpi: int  # of PDF pages; images have their own pixels


class TextLine(msgspec.Struct, frozen=True):
    """A line of text to lie invisibly over a page."""

    text: str
    polygon: tuple[Point, ...]  # four corners in pixels of the rendered page, clockwise from the text's top left


class TextPage(msgspec.Struct, frozen=True):
    """A page and its text."""

    page: int  # from 1, in the file
    width: int  # pixels of the page that the polygons were found on
    height: int
    lines: tuple[TextLine, ...]


class WritePdf(msgspec.Struct, frozen=True, tag=True):
    """Write the searchable PDF."""

    pages: tuple[TextPage, ...]
    whole: bool  # every page of the file was read in its order: keep a PDF's outline, forms and all the rest of it


Request = Open | Render | WritePdf


# --- render process to front ---


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The file can be read."""

    page_count: int  # at least 1


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """A page's pixels: 8-bit RGB, row by row from the top, 3 bytes a pixel."""

    width: int
    height: int
    dpi: float  # 0 when unknown
    pixels: bytes


class Written(msgspec.Struct, frozen=True, tag=True):
    """The searchable PDF."""

    content: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """What was asked for cannot be had; the process goes on."""

    fault: FaultData


Reply = Opened | Rendered | Written | Refused

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One frame: 4-byte little-endian length, then the message."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode_reply(body: bytes) -> Reply:
    """A frame's body as a reply; raises msgspec.DecodeError for anything else."""
    return _reply_decoder.decode(body)


def read_request(stream: BinaryIO) -> Request | None:
    """The next request, waiting for it; None when the front closed the pipe."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    return _request_decoder.decode(body) if len(body) == length else None
