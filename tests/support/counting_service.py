"""A service whose engine counts, on the paths of the OCR service: `python -m tests.support.counting_service`.

All of the kit is real: the server, the boundary, the admission, the engine process. A request is the JSON of a
`tests.support.counting_engine.Count`, and an answer the number that it has counted to.
"""

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import msgspec
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.kit import faults
from services.kit.call import priority_of, time_left
from services.kit.engine_api import Update
from services.kit.engine_host import EngineHost
from services.kit.metrics import Metrics
from services.kit.server import ServiceServer, run
from services.kit.settings import ServiceSettings
from tests.support.backend import BIDI, SERVER_STREAM, UNARY
from tests.support.counting_engine import Count, Number
from tests.support.service_process import ServiceProcess

SERVICE = "inkwell.ocr.v1.OcrService"


class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="INKWELL_COUNTING_", extra="forbid", frozen=True)

    slots: int = Field(2, ge=1, description="calls the engine works on at a time")


def request(**count: Any) -> bytes:
    """A request message; see Count."""
    return msgspec.json.encode(Count(**count))


async def _count(host: EngineHost, asked: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
    async with host.admit(priority=priority_of(context), time_left_s=time_left(context)) as job:
        try:
            job.start(msgspec.json.decode(asked, type=Count))
        except msgspec.DecodeError as error:
            raise faults.invalid_field("message", str(error)) from None
        async for event in job:
            if isinstance(event, Update):
                yield b"%d" % msgspec.msgpack.decode(event.payload, type=Number).value


def build(settings: Settings) -> ServiceServer:
    metrics = Metrics("ocr")
    host = EngineHost("tests.support.counting_engine:create_engine", settings, slots=settings.slots, metrics=metrics)
    count = functools.partial(_count, host)

    async def one(asked: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return [number async for number in count(asked, context)][-1]

    async def many(asked: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(count(asked, context)) as numbers:
            async for number in numbers:
                yield number

    async def each(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for asked in requests:
            async with contextlib.aclosing(many(asked, context)) as numbers:
                async for number in numbers:
                    yield number

    handlers = {
        UNARY: grpc.unary_unary_rpc_method_handler(one),
        SERVER_STREAM: grpc.unary_stream_rpc_method_handler(many),
        BIDI: grpc.stream_stream_rpc_method_handler(each),
    }

    def register(server: grpc.aio.Server) -> list[str]:
        methods = {path.rpartition("/")[2]: handler for path, handler in handlers.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        return [SERVICE]

    return ServiceServer("ocr", settings, metrics=metrics, host=host, register=register)


def pool_at(server: ServiceServer) -> dict[str, Any]:
    """A gateway's pool of the one that runs in this process."""
    return {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [f"127.0.0.1:{server.port}"]}


def process(**settings: str) -> ServiceProcess:
    """One of its own, not started yet."""
    return ServiceProcess("tests.support.counting_service", "INKWELL_COUNTING_", settings)


if __name__ == "__main__":
    run(build(Settings()))
