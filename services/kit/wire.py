"""Length-prefixed MessagePack frames between the front and the engine process."""

import asyncio
import socket
import struct

import msgspec

from services.kit.engine_api import Command, Event

_LENGTH = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def encode(message: Command | Event) -> bytes:
    """One frame: 4-byte little-endian length, then the message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def raw(payload: msgspec.Struct) -> msgspec.Raw:
    """A service's own struct as the payload of a command or event."""
    return msgspec.Raw(_encoder.encode(payload))


async def read_event(reader: asyncio.StreamReader) -> Event:
    """The next event; raises asyncio.IncompleteReadError when the engine process is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return _event_decoder.decode(await reader.readexactly(length))


def read_command(connection: socket.socket) -> Command | None:
    """The next command, waiting for it; None when the front is gone."""
    header = _read_exactly(connection, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    body = _read_exactly(connection, length)
    return None if body is None else _command_decoder.decode(body)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    filled = 0
    while filled < size:
        try:
            count = connection.recv_into(view[filled:])
        except OSError:
            return None
        if count == 0:
            return None
        filled += count
    return bytes(buffer)
