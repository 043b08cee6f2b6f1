"""Bytes and messages that are almost right, for hypothesis to search."""

import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from hypothesis import strategies as st

_INTEGERS = {
    Field.TYPE_INT32: 32,
    Field.TYPE_SINT32: 32,
    Field.TYPE_SFIXED32: 32,
    Field.TYPE_INT64: 64,
    Field.TYPE_SINT64: 64,
    Field.TYPE_SFIXED64: 64,
}
_NATURALS = {Field.TYPE_UINT32: 32, Field.TYPE_FIXED32: 32, Field.TYPE_UINT64: 64, Field.TYPE_FIXED64: 64}
_OPERATIONS = ("flip", "insert", "remove", "repeat", "truncate", "number")


@st.composite
def mutated(draw: st.DrawFn, original: bytes, most: int = 6) -> bytes:
    """The bytes with one to `most` faults: flipped bits, pieces put in, taken out or repeated, an end, numbers."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, most))):
        operation = draw(st.sampled_from(_OPERATIONS))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        match operation:
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=length))
            case "remove":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 64))
            case "truncate":
                del data[at:]
            case "number":
                value = draw(st.sampled_from((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)))
                data[at : at + 4] = struct.pack(draw(st.sampled_from((">I", "<I"))), value)
    return bytes(data)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], like: Message | None = None, depth: int = 3) -> Message:
    """A message of that type with fields at will; those it does not change are as in `like`."""
    message = kind()
    if like is not None:
        message.CopyFrom(like)
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return message
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f.number)):
        _fill(draw, message, field, depth)
    return message


def _fill(draw: st.DrawFn, message: Message, field: Field, depth: int) -> None:
    if field.type == Field.TYPE_MESSAGE:
        assert field.message_type is not None
        if depth == 0 or field.message_type.GetOptions().map_entry:
            return
        inner = type(getattr(message, field.name)) if not field.is_repeated else None
        if inner is not None:
            getattr(message, field.name).CopyFrom(
                draw(messages(inner, like=getattr(message, field.name), depth=depth - 1))
            )
            return
        for _ in range(draw(st.integers(0, 3))):
            added = getattr(message, field.name).add()
            added.CopyFrom(draw(messages(type(added), depth=depth - 1)))
        return
    if field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).extend(draw(st.lists(_scalar(field), max_size=5)))
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _scalar(field: Field) -> st.SearchStrategy[Any]:
    if field.type in _INTEGERS:
        most = 1 << (_INTEGERS[field.type] - 1)
        return st.one_of(st.integers(-2, 100), st.integers(-most, most - 1))
    if field.type in _NATURALS:
        return st.one_of(st.integers(0, 100), st.integers(0, (1 << _NATURALS[field.type]) - 1))
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return st.one_of(st.sampled_from((0.0, -1.0, 1.0, 1e30, float("inf"), float("nan"))), st.floats(width=32))
    if field.type == Field.TYPE_BOOL:
        return st.booleans()
    if field.type == Field.TYPE_ENUM:
        assert field.enum_type is not None
        return st.one_of(st.sampled_from([value.number for value in field.enum_type.values]), st.integers(-3, 1 << 20))
    if field.type == Field.TYPE_BYTES:
        return st.binary(max_size=200)
    # Words that mean something somewhere: paths, formats, JSON, SQL, and what a terminal or a log obeys.
    telling = st.sampled_from(
        ("../../etc/passwd", "/", "C:\\", "\x00", "%s%n", "{}", "a" * 5000, "' OR 1=1", "\r\nx: y", "\x1b[2J", "‮", "🙂")
    )
    return st.one_of(telling, st.text(max_size=40).map(_encodable))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
