"""Following what an endpoint says of itself: hardware, runtimes, models."""

import asyncio
import random
from collections.abc import Callable

import grpc
import structlog

from inkwell.endpoint.v1 import endpoint_pb2
from services.gateway.selectors import Report

log = structlog.get_logger(__name__)

_WATCH = "/inkwell.endpoint.v1.EndpointService/WatchReport"
_AGAIN_FIRST_S = 0.1
_AGAIN_MOST_S = 2.0
# An older service has no reports; one that is updated in place at the same address will have.
_OLDER_AGAIN_S = 30.0


async def follow(channel: grpc.aio.Channel, heard: Callable[[Report | None], None]) -> None:
    """Call `heard` with each report of the server behind the channel, with None if it has none to give; never ends."""
    watch = channel.unary_stream(
        _WATCH,
        request_serializer=endpoint_pb2.WatchReportRequest.SerializeToString,
        response_deserializer=endpoint_pb2.WatchReportResponse.FromString,
    )
    delay = _AGAIN_FIRST_S
    while True:
        try:
            async for answer in watch(endpoint_pb2.WatchReportRequest(), wait_for_ready=True):
                delay = _AGAIN_FIRST_S
                heard(answer.report)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                heard(None)
                delay = _OLDER_AGAIN_S
        await asyncio.sleep(delay * random.uniform(0.8, 1.2))
        delay = min(delay * 2, _AGAIN_MOST_S)
