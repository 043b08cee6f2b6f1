"""What converting messages of several kinds takes."""

import ctypes
import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from inkwell import types
from inkwell.common.v1 import common_pb2
from inkwell.errors import InternalError, invalid

Name = TypeVar("Name", bound=enum.StrEnum)


def no_result() -> InternalError:
    """The error of a stream that ended well but without the event that must be its last."""
    return InternalError("the server ended the stream without a result", reason="NO_RESULT")


def in_sequence(last: int, response: Any) -> int:
    """The response's `sequence`, which must follow `last`; raises InternalError where part of a stream is missing."""
    number: int = response.sequence
    if number != last + 1:
        raise InternalError(
            f"the server's stream went from message {last} to message {number}", reason="SEQUENCE_BROKEN"
        )
    return number


def served_by(metadata: Iterable[tuple[str, str | bytes]] | None) -> types.ServedBy:
    """What the reply's metadata tell about who serves the call."""
    told = {key: value for key, value in metadata or () if isinstance(value, str)}
    return types.ServedBy(
        hardware=told.get("inkwell-hardware", ""),
        pool=told.get("inkwell-pool", ""),
        endpoint=told.get("inkwell-endpoint", ""),
        runtime=told.get("inkwell-runtime", ""),
        model=unquote(told.get("inkwell-model", "")),
        model_version=told.get("inkwell-model-version", ""),
    )


def also_told(served: types.ServedBy, event: object) -> types.ServedBy:
    """The same with what a Started event adds."""
    if isinstance(event, types.Started):
        return dataclasses.replace(served, hardware=event.hardware, runtime=event.runtime)
    return served


def started(number: int, message: common_pb2.Started) -> types.Started:
    """The event with its sequence number."""
    return types.Started(number, message.hardware, message.runtime, message.model)


def timing(message: common_pb2.Timing) -> types.Timing:
    """Milliseconds."""
    return types.Timing(message.queue_ms, message.engine_ms)


def same_named(message: Message, kind: type[Any]) -> dict[str, Any]:
    """The message's values for those fields of dataclass `kind` that are called the same; repeated ones as tuples."""
    values = {}
    for field in dataclasses.fields(kind):
        known = message.DESCRIPTOR.fields_by_name.get(field.name)
        if known is not None:
            value = getattr(message, field.name)
            values[field.name] = tuple(value) if known.is_repeated else value
    return values


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same 32-bit float: 0.8 for what travelled as 0.800000011920929."""
    single = ctypes.c_float(value).value
    rounded = (float(f"{single:.{digits}g}") for digits in range(1, 10))
    return next((short for short in rounded if ctypes.c_float(short).value == single), single)


def assign(message: Message, name: str, value: object, *, path: str = "") -> None:
    """Set a scalar field unless `value` is None or empty; the error names it if the value does not fit its type."""
    if value is None or value == "":
        return
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise invalid(path or name, f"{type_name(message, name)} expected; {error}") from None


def type_name(message: Message, name: str) -> str:
    """What a scalar field holds, in words."""
    return _TYPE_NAMES.get(message.DESCRIPTOR.fields_by_name[name].type, "another type")


_TYPE_NAMES = {
    FieldDescriptor.TYPE_INT32: "a 32-bit whole number",
    FieldDescriptor.TYPE_INT64: "a 64-bit whole number",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_STRING: "valid Unicode text",
}


def by_number(values: Any, prefix: str, kind: type[Name]) -> dict[int, Name]:
    """The members of `kind` by the number of the protobuf enum value that is called `prefix` and their name."""
    return {values.Value(prefix + name): member for name, member in kind.__members__.items() if name != "UNKNOWN"}


def by_name(numbers: Mapping[int, Name]) -> dict[str, int]:
    """The other way round: numbers by the members' values."""
    return {str(member): number for number, member in numbers.items()}


def choice(field: str, value: object, numbers: Mapping[str, int]) -> int:
    """The enum number of a name, 0 (unset) for None; the error lists the names. "-" and "_" are the same."""
    if value is None or value == "":
        return 0
    plain = {name.replace("-", "_"): number for name, number in numbers.items()}
    number = plain.get(value.replace("-", "_")) if isinstance(value, str) else None
    if number is None:
        raise invalid(field, f"{value!r} is none of {', '.join(numbers)}")
    return number


def several(field: str, values: object) -> tuple[Any, ...]:
    """One text or an iterable of them as a tuple; raises InvalidRequest for anything else."""
    if isinstance(values, str):
        return (values,)
    if not isinstance(values, Iterable):
        raise invalid(field, f"a text or several expected, not {values!r}")
    return tuple(values)
