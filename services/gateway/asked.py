"""What the gateway reads of a request before it is sent on: the model, and the operation that it is about or begins.

A request is bytes here. Of these, only the few top-level fields that routing needs are looked at; the rest is skipped
over, so a picture costs as much as a word.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor

from inkwell.compiler.v1 import compiler_pb2
from services.gateway.methods import METHODS, Method, addressed

# A message of nothing but the smallest fields would hold all calls up for half a second a MiB.
_FIELDS_MOST = 10_000
_LONGEST_NAME = 256  # bytes; longer ones are no model's, and the service says so
_UUID = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")
_OPERATION = "google.longrunning.Operation"
_TENSORRT = compiler_pb2.TARGET_TENSORRT


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call is about."""

    method: Method
    model: str = ""  # that the request names; "" if it names none
    operation: str = ""  # name of the operation that it is about, or would begin
    begins: bool = False  # the call begins an operation
    tensorrt: bool = False  # it builds for TensorRT, which takes a CUDA device


@dataclass(frozen=True, slots=True)
class _Fields:
    """Numbers of the fields to look at, 0 for those that the request does not have."""

    model: int = 0
    request_id: int = 0
    target: int = 0
    begins: bool = False


def _fields(method: Method) -> _Fields:
    full, _, name = method.path[1:].rpartition("/")
    described = descriptor_pool.Default().FindMethodByName(f"{full}.{name}")
    fields = described.input_type.fields_by_name

    def number(field: str) -> int:
        found = fields.get(field)
        return found.number if found is not None and found.type == FieldDescriptor.TYPE_STRING else 0

    begins = described.output_type.full_name == _OPERATION
    target = fields.get("target") if begins else None
    return _Fields(
        model=number("name" if name in ("LoadModel", "UnloadModel") else "model"),
        request_id=number("request_id") if begins else 0,
        target=target.number if target is not None else 0,
        begins=begins,
    )


_FIELDS = {path: _fields(method) for path, method in METHODS.items() if method.service}
_NOTHING = _Fields()


def names_model(method: Method) -> bool:
    """Whether requests of this method can name a model."""
    return _FIELDS.get(method.path, _NOTHING).model > 0


def read(method: Method, request: bytes) -> Asked:
    """What this request is about; raises Fault for an operation's name that says no service.

    Of a request that cannot be read, what stands before the fault counts: the service will refuse it.
    """
    if method.operation_name is not None:
        to = addressed(method, request)
        name = method.operation_name(request)
        return Asked(to, operation=name if name.count("/") == 2 else "")  # two parts: a list of a service's operations
    fields = _FIELDS.get(method.path, _NOTHING)
    if fields is _NOTHING or not (fields.model or fields.begins):
        return Asked(method)
    found = scan(request, (fields.model, fields.request_id, fields.target))
    request_id = _text(found.get(fields.request_id)) if fields.request_id else ""
    return Asked(
        method,
        model=_text(found.get(fields.model)),
        operation=f"operations/{method.service}/{request_id.lower()}" if _UUID.fullmatch(request_id) else "",
        begins=fields.begins,
        tensorrt=fields.target > 0 and found.get(fields.target) == _TENSORRT,
    )


async def read_first(method: Method, requests: AsyncIterator[bytes]) -> tuple[Asked, AsyncIterator[bytes]]:
    """What a stream's first request is about, and the whole stream; waits for that request."""
    first = await anext(requests, None)
    if first is None:
        return Asked(method), requests

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for request in requests:
            yield request

    return read(method, first), whole()


def begun(response: bytes) -> str:
    """Name of the operation in a response that is one."""
    return _text(scan(response, (1,)).get(1))


def scan(data: bytes, wanted: tuple[int, ...]) -> dict[int, Any]:
    """Top-level fields of a protobuf message: bytes of strings and messages, ints of varints; of several, the last.

    Stops quietly where the data is no protobuf message, and after _FIELDS_MOST fields.
    """
    found: dict[int, Any] = {}
    at, end = 0, len(data)
    left = _FIELDS_MOST
    try:
        while at < end and left > 0:
            left -= 1
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            if number == 0:
                break
            if kind == 0:
                value, at = _varint(data, at)
                if number in wanted:
                    found[number] = value
            elif kind == 2:
                length, at = _varint(data, at)
                if at + length > end:
                    break
                if number in wanted:
                    found[number] = data[at : at + length]
                at += length
            elif kind == 1:
                at += 8
            elif kind == 5:
                at += 4
            else:
                break
    except IndexError:
        pass
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends; raises IndexError where there is none."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while shift < 70:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise IndexError("a varint of more than ten bytes")


def _text(value: Any) -> str:
    if not isinstance(value, bytes) or len(value) > _LONGEST_NAME:
        return ""
    return value.decode("utf-8", "replace")
