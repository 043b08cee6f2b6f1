"""Reading a `grpc.aio` stream while another task writes to it.

When the server ends a stream while a write is under way, the write fails, and grpc.aio tells its own status, INTERNAL,
"Internal error from Core", instead of the one that the server sent: it replaces that one, or stands until it comes.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import grpc.aio

Value = TypeVar("Value")

# The server's status is already on this side of the connection when a write fails for it.
_LOOKS = 50
_LOOK_EVERY_S = 0.01


async def messages(call: Any) -> AsyncGenerator[Any, None]:
    """The messages of `call`; raises grpc.aio.AioRpcError with the status that the server sent."""
    first: grpc.aio.AioRpcError | None = None

    def keep_first(_: Any) -> None:
        nonlocal first
        first = first or _status(call)

    call.add_done_callback(keep_first)
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as reported:
        if not _of_failed_write(reported):
            raise
        if first is not None and not _of_failed_write(first):
            raise first from None
        for _ in range(_LOOKS):
            await asyncio.sleep(_LOOK_EVERY_S)
            if not _of_failed_write(now := _status(call)):
                raise now from None
        raise


def _of_failed_write(error: grpc.aio.AioRpcError) -> bool:
    return bool(error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core")


def _status(call: Any) -> grpc.aio.AioRpcError:
    """The present status of a call that is done."""
    details, metadata = _ready(call.details()), _ready(call.trailing_metadata())
    return grpc.aio.AioRpcError(_ready(call.code()), grpc.aio.Metadata(), metadata, details=details)


def _ready(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """The result of a coroutine that has nothing left to wait for, as those of a call that is done."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: Value = stop.value
        return result
    coroutine.close()
    raise RuntimeError("the call was not done")
