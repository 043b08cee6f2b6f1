"""A service with operations, in this process or in one of its own; their work is `tests.support.child_work`."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.longrunning import operations_pb2
from google.protobuf import wrappers_pb2
from pydantic_settings import SettingsConfigDict

from inkwell.longrunning import OperationsStub
from inkwell.operations.v1 import operations_pb2 as watch_pb2
from inkwell.operations.v1 import operations_pb2_grpc as watch_pb2_grpc
from services.kit.child import Limits, run_child
from services.kit.identity import current_caller
from services.kit.metrics import Metrics
from services.kit.operations import Kind, Operations, OperationsSettings, Progress, Running, Say, Started, register
from services.kit.operations.servicer import to_message
from services.kit.server import ServiceServer, run
from services.local import free_ports
from tests.support.child_work import Answer, Step, Todo

SERVICE = "test"
BEGIN = "/test.Work/Begin"
Text = wrappers_pb2.StringValue
Number = wrappers_pb2.Int64Value


class Settings(OperationsSettings):
    model_config = SettingsConfigDict(env_prefix="INKWELL_TEST_", extra="forbid", frozen=True)


class Begin(msgspec.Struct):
    todo: Todo
    request_id: str = ""


async def work(todo: Todo, say: Say, running: Running) -> Answer:
    await say(Started(hardware="cpu", runtime="none", model=running.id))

    async def tell(step: Step) -> None:
        await say(Progress(step.number, todo.steps, stage="counting", note=json.dumps([step.folder, *step.pids])))

    return await run_child(
        "tests.support.child_work",
        todo,
        progress=Step,
        response=Answer,
        on_progress=tell,
        limits=Limits(1 << 30, 600, "raise it"),
    )


WORK: Kind[Todo, Answer] = Kind(
    "work", Todo, Answer, work, lambda todo: Number(value=todo.steps), lambda answer: Number(value=answer.steps)
)


def build(settings: Settings) -> ServiceServer:
    metrics = Metrics(SERVICE)
    operations = Operations(SERVICE, settings, [WORK], metrics=metrics)

    async def begin(request: Any, _: grpc.aio.ServicerContext) -> operations_pb2.Operation:
        asked = msgspec.json.decode(request.value, type=Begin)
        begun = await operations.submit("work", asked.todo, request_id=asked.request_id, owner=current_caller.get())
        return to_message(operations, begun)

    def add(server: grpc.aio.Server) -> list[str]:
        handler = grpc.unary_unary_rpc_method_handler(
            begin,
            request_deserializer=Text.FromString,
            response_serializer=operations_pb2.Operation.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Work", {"Begin": handler}),))
        return register(server, operations)

    @contextlib.asynccontextmanager
    async def lifespan(health: Any) -> AsyncIterator[None]:
        async with operations:
            yield

    return ServiceServer(
        SERVICE, settings, metrics=metrics, host=None, register=add, lifespan=lifespan, on_drain=operations.drain
    )


class Caller:
    """Calls such a service."""

    def __init__(self, port: int) -> None:
        # Not retried by gRPC: tests are to see what there is to see.
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 100)]
        self.port = port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.operations = OperationsStub(self.channel)
        self._watch = watch_pb2_grpc.OperationsWatchServiceStub(self.channel)

    async def begin(self, todo: Todo, request_id: str = "", **options: Any) -> operations_pb2.Operation:
        call = self.channel.unary_unary(
            BEGIN,
            request_serializer=Text.SerializeToString,
            response_deserializer=operations_pb2.Operation.FromString,
        )
        return await call(Text(value=msgspec.json.encode(Begin(todo, request_id)).decode()), **options)

    async def get(self, name: str) -> operations_pb2.Operation:
        return await self.operations.GetOperation(operations_pb2.GetOperationRequest(name=name))

    def watch(self, name: str, after: int = 0, **options: Any) -> Any:
        return self._watch.Watch(watch_pb2.WatchRequest(name=name, after_sequence=after), **options)

    async def events(self, name: str, after: int = 0) -> list[watch_pb2.WatchResponse]:
        """All of them, until it is done."""
        return [response async for response in self.watch(name, after)]

    async def until(self, name: str, event: str, count: int = 1) -> Any:
        """The event of that kind, the `count`th."""
        call = self.watch(name)
        async for response in call:
            count -= response.WhichOneof("event") == event
            if count == 0:
                call.cancel()
                return response
        raise AssertionError(f"{name} ended without {event}")


@contextlib.asynccontextmanager
async def serving(file: Path, **settings: Any) -> AsyncIterator[Caller]:
    """The service in this process, drained at the end as on SIGTERM."""
    server = build(Settings(operations_database=str(file), drain_grace_s=10, **settings))
    await server.start()
    caller = Caller(server.port)
    try:
        yield caller
    finally:
        await server.stop()
        await caller.channel.close()


@dataclass
class ServiceProcess:
    """The service in a process of its own, which can be killed and started anew at the same port."""

    file: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: asyncio.subprocess.Process | None = None

    def __post_init__(self) -> None:
        (self.port,) = free_ports(1)

    async def start(self) -> None:
        """Returns once it listens; raises AssertionError with its output when it does not."""
        chosen = {"port": str(self.port), "operations_database": str(self.file), **self.settings}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.operations",
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **{f"INKWELL_TEST_{name.upper()}": value for name, value in chosen.items()}},
        )
        assert self.process.stderr is not None
        said = b""
        async for line in self.process.stderr:
            said += line
            if b'"listening"' in line:
                self._rest = asyncio.create_task(self.process.stderr.read())  # lest the pipe fill up
                return
        raise AssertionError(said.decode())

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal; answers the exit code."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.process.wait()


if __name__ == "__main__":
    run(build(Settings()))
