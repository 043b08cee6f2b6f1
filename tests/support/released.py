"""The contract of the last release (protos/released.binpb), for callers and services that know nothing newer."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from services.gateway.metadata import to_upstream

FILE = Path(__file__).resolve().parents[2] / "protos" / "released.binpb"
SERVICES = (
    "inkwell.ocr.v1.OcrService",
    "inkwell.diffusion.v1.DiffusionService",
    "inkwell.compiler.v1.CompilerService",
    "inkwell.gateway.v1.GatewayService",
    "inkwell.operations.v1.OperationsWatchService",
)


@cache
def pool() -> descriptor_pool.DescriptorPool:
    """Descriptors of the release, apart from those of today."""
    made = descriptor_pool.DescriptorPool()
    # An image of buf is a FileDescriptorSet with more in each file that nobody here looks at.
    for file in descriptor_pb2.FileDescriptorSet.FromString(FILE.read_bytes()).file:
        made.Add(file)
    return made


def message(name: str) -> type[Message]:
    """The class of a message, such as "inkwell.ocr.v1.RecognizeRequest"; raises KeyError if the release had none."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(name))


class Stub:
    """Calls a service as a program does whose stubs were generated from the released protos."""

    def __init__(self, channel: grpc.aio.Channel, service: str) -> None:
        for method in pool().FindServiceByName(service).methods:
            kind = f"{_arity(method.client_streaming)}_{_arity(method.server_streaming)}"
            call = getattr(channel, kind)(
                f"/{service}/{method.name}",
                request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the release had no method {name}")


class Past(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server of the last release: it stands before one of today and takes in, and lets out, only what that one knew.

    unknown: names of requests that said something it does not understand. missed: paths of newer methods, asked for in
    vain. Health is passed on as it is.
    """

    def __init__(self, present: grpc.aio.Channel) -> None:
        self._present = present
        self.unknown: set[str] = set()
        self.missed: set[str] = set()
        self._methods = {
            f"/{service}/{method.name}": method
            for service in SERVICES
            for method in pool().FindServiceByName(service).methods
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        path = handler_call_details.method
        if path.startswith("/grpc.health."):
            return self._passed_on(path, path.endswith("Watch"))
        method = self._methods.get(path)
        if method is None:
            self.missed.add(path)
            return None
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        call = self._behaviour(path, method.client_streaming, method.server_streaming)
        make = getattr(grpc, f"{_arity(method.client_streaming)}_{_arity(method.server_streaming)}_rpc_method_handler")
        return make(
            call,
            request_deserializer=lambda data: self._forgetful(request, data),
            response_serializer=lambda data: without_unknown(response.FromString(data)),
        )

    def _behaviour(self, path: str, many_requests: bool, many_responses: bool) -> Callable[..., Any]:
        kind = f"{_arity(many_requests)}_{_arity(many_responses)}"

        def begin(request: Any, context: grpc.aio.ServicerContext) -> Any:
            passed = to_upstream(context.invocation_metadata() or ())
            return getattr(self._present, kind)(path)(request, metadata=passed, timeout=context.time_remaining())

        async def end(call: Any, context: grpc.aio.ServicerContext, relay: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await relay()
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
            finally:
                call.cancel()

        async def to_one(request: Any, context: grpc.aio.ServicerContext) -> Any:
            call = begin(request, context)

            async def relay() -> Any:
                answer = await call
                await context.send_initial_metadata(tuple(await call.initial_metadata()))
                return answer

            return await end(call, context, relay)

        async def to_many(request: Any, context: grpc.aio.ServicerContext) -> None:
            call = begin(request, context)

            async def relay() -> None:
                message = await call.read()
                # Not before there is an answer: a refusal without a header can be retried.
                if message is not grpc.aio.EOF:
                    await context.send_initial_metadata(tuple(await call.initial_metadata()))
                while message is not grpc.aio.EOF:
                    await context.write(message)
                    message = await call.read()

            await end(call, context, relay)

        return to_many if many_responses else to_one

    def _passed_on(self, path: str, stream: bool) -> grpc.RpcMethodHandler:
        behaviour = self._behaviour(path, False, stream)
        make = grpc.unary_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
        return make(behaviour)

    def _forgetful(self, kind: type[Message], data: bytes) -> bytes:
        read = kind.FromString(data)
        known = without_unknown(read)
        if len(known) < len(data):
            self.unknown.add(kind.DESCRIPTOR.full_name)
        return known


def made_of(file: descriptor_pb2.FileDescriptorProto, name: str) -> type[Message]:
    """The class of a message in a file that is in no pool."""
    own = descriptor_pool.DescriptorPool()
    own.Add(file)
    return message_factory.GetMessageClass(own.FindMessageTypeByName(name))


def without_unknown(read: Message) -> bytes:
    """A message as one writes it that does not pass on what it does not know."""
    read.DiscardUnknownFields()
    return read.SerializeToString()


def _arity(many: bool) -> str:
    return "stream" if many else "unary"


@contextlib.asynccontextmanager
async def past_of(address: str) -> AsyncIterator[tuple[Past, str]]:
    """A server of the last release in front of the one at `address`, and where it listens."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as present:
        past = Past(present)
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((past,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield past, f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
