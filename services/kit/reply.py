"""A unary reply in one piece: header, message, trailers and status together.

grpc.aio sends a header of one's own ahead of the message and waits until it is on its way. That costs a small call a
good part of its time, and a server that is killed in between has answered by half, so that nobody may try again. This
speaks to the layer below, as grpc.aio does itself. That layer is private to grpcio: tests/unit/kit/test_reply.py holds
it to what is needed here, requirements/ to the version it was written for.
"""

import asyncio
import gc
from typing import Any

import grpc
from grpc._cython import cygrpc

_NO_FLAGS = 0
_OK: int = grpc.StatusCode.OK.value[0]


async def send(context: grpc.aio.ServicerContext, header: tuple[Any, ...], message: bytes) -> None:
    """End the call well, with this header, this message and the trailers that the context has.

    The handler has to raise `asyncio.CancelledError` then, by which grpc.aio takes it that nothing is left to send.
    Raises grpc.aio.InternalError if the caller is gone.
    """
    operations = (
        cygrpc.SendInitialMetadataOperation(header, _NO_FLAGS),
        cygrpc.SendMessageOperation(message, _NO_FLAGS),
        cygrpc.SendStatusFromServerOperation(context.trailing_metadata(), _OK, "", _NO_FLAGS),
    )
    await cygrpc.execute_batch(_call_of(context), operations, asyncio.get_running_loop())


def _call_of(context: grpc.aio.ServicerContext) -> Any:
    # The context has it, and shows it to nobody but the garbage collector.
    return next(held for held in gc.get_referents(context) if isinstance(held, cygrpc.RPCState))
