"""The trace of a call as a collector gets it: through gateway, service, engine process and operations."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.kit.server import ServiceServer
from services.kit.tracing import Parent
from tests.support import counting_service
from tests.support.backend import SERVER_STREAM, UNARY, Backend
from tests.support.child_work import Todo
from tests.support.collector import Collector, Seen, collecting
from tests.support.counting_service import pool_at, request
from tests.support.gateway import Gateway, pool, running
from tests.support.operations import Caller, serving
from tests.support.operations import ServiceProcess as OperationsProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
RECORD = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
LEAVE_OUT = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)

RECOGNIZE = UNARY.removeprefix("/")
STREAM = SERVER_STREAM.removeprefix("/")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as listening:
        yield listening


@contextlib.asynccontextmanager
async def service(collector: Collector, **settings: Any) -> AsyncIterator[ServiceServer]:
    """One that counts; what it recorded has arrived when this is left."""
    server = counting_service.build(counting_service.Settings(trace_endpoint=collector.endpoint, **settings))
    await server.start()
    try:
        await server.wait_ready()
        yield server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def fleet(collector: Collector, *, count: int = 1, ratio: float = 0.0) -> AsyncIterator[Gateway]:
    """A gateway with so many counting services behind it."""
    async with contextlib.AsyncExitStack() as exits:
        servers = [await exits.enter_async_context(service(collector, trace_ratio=ratio)) for _ in range(count)]
        targets = [f"127.0.0.1:{server.port}" for server in servers]
        gateway = await exits.enter_async_context(
            running({**pool_at(servers[0]), "targets": targets}, trace_endpoint=collector.endpoint, trace_ratio=ratio)
        )
        yield gateway


def within(part: Seen, whole: Seen) -> bool:
    return part.trace == whole.trace and whole.began_ns <= part.began_ns <= part.ended_ns <= whole.ended_ns


async def test_a_call_is_one_tree_from_its_caller_to_the_steps_of_the_engine(collector: Collector) -> None:
    async with fleet(collector) as gateway:
        assert await gateway.channel.unary_unary(UNARY)(request(count=3), metadata=RECORD) == b"3"
    routed, served = collector.one(RECOGNIZE, "inkwell-gateway"), collector.one(RECOGNIZE, "inkwell-ocr")
    attempt, engine = collector.one("attempt"), collector.one("engine")
    count = collector.one("count")
    assert {span.trace for span in collector.spans} == {TRACE}
    assert (routed.parent, routed.kind) == (CALLER, "server")
    assert collector.parts(routed) == ["queue", "attempt"]
    assert (attempt.kind, attempt.attributes["inkwell.pool"]) == ("client", "ocr-cpu")
    assert (served.parent, served.kind) == (attempt.id, "server")
    assert collector.parts(served) == ["queue", "engine"]
    assert collector.parts(engine) == ["wait", "count"]
    # The engine is a process of its own, on the same clock.
    assert all(within(collector.one(name), engine) for name in ("wait", "count"))
    assert within(engine, served)
    assert within(served, attempt)
    assert within(attempt, routed)
    assert [values["inkwell.number"] for name, values in count.events if name == "step"] == [1, 2, 3]
    assert count.attributes["inkwell.steps"] == 3
    assert served.attributes["rpc.response.status_code"] == "OK"
    assert not any(span.error for span in collector.spans)


async def test_a_caller_that_does_not_record_is_followed_to_the_end(collector: Collector) -> None:
    async with contextlib.AsyncExitStack() as exits:
        backend = await Backend().start()
        exits.push_async_callback(backend.stop)
        recording = running(pool("ocr-cpu", backend), trace_endpoint=collector.endpoint, trace_ratio=1.0)
        gateway = await exits.enter_async_context(recording)
        await gateway.channel.unary_unary(UNARY)(b"a", metadata=LEAVE_OUT)
        assert backend.metadata["traceparent"] == LEAVE_OUT[0][1]
    assert collector.spans == []


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_without_a_caller_that_says_so_the_gateway_decides_for_all(collector: Collector, ratio: float) -> None:
    async with contextlib.AsyncExitStack() as exits:
        backend = await Backend().start()
        exits.push_async_callback(backend.stop)
        recording = running(pool("ocr-cpu", backend), trace_endpoint=collector.endpoint, trace_ratio=ratio)
        gateway = await exits.enter_async_context(recording)
        await gateway.channel.unary_unary(UNARY)(b"a", metadata=(("traceparent", "nonsense"),))
        told = Parent.read(backend.metadata["traceparent"])
        assert told is not None
        assert told.recorded is bool(ratio)
    assert {span.trace for span in collector.spans} == ({told.trace_id} if ratio else set())


async def test_each_attempt_is_a_span_of_its_own(collector: Collector) -> None:
    async with contextlib.AsyncExitStack() as exits:
        backend = await exits.enter_async_context(refusing_once())
        gateway = await exits.enter_async_context(running(pool("ocr-cpu", backend), trace_endpoint=collector.endpoint))
        assert await gateway.channel.unary_unary(UNARY)(b"a", metadata=RECORD) == b"a"
    first, second = collector.named("attempt")
    assert (first.error, first.attributes["rpc.response.status_code"]) == ("UNAVAILABLE", "UNAVAILABLE")
    assert (second.error, second.attributes["inkwell.attempt"]) == ("", 2)
    assert collector.one(RECOGNIZE).error == ""


@contextlib.asynccontextmanager
async def refusing_once() -> AsyncIterator[Backend]:
    async def behaviour(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for each in requests:
            if backend.call_count == 1:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            yield each

    backend = await Backend(behaviour).start()  # type: ignore[arg-type]
    try:
        yield backend
    finally:
        await backend.stop()


async def test_the_engines_end_ends_its_spans(collector: Collector) -> None:
    async with service(collector) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary(UNARY)(request(count=3, crash_at=2), metadata=RECORD)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert collector.one("engine").error == "ENGINE_LOST"
    assert collector.one(RECOGNIZE).error == "UNAVAILABLE"


async def test_a_refusal_that_is_the_callers_fault_is_no_error_of_the_server(collector: Collector) -> None:
    async with service(collector) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary(UNARY)(request(refuse=True), metadata=RECORD)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    served = collector.one(RECOGNIZE)
    assert (served.error, served.attributes["rpc.response.status_code"]) == ("", "INVALID_ARGUMENT")
    assert collector.one("engine").error == "INVALID_FIELD"
    assert collector.parts(collector.one("engine")) == ["wait"]


async def test_a_call_that_is_given_up_ends_with_the_phase_it_was_in(collector: Collector, tmp_path: Path) -> None:
    async with (
        service(collector, slots=1) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        asked = request(count=9, hold_at=2, release=str(tmp_path / "never"))
        call = channel.unary_stream(SERVER_STREAM)(asked, metadata=RECORD)
        assert await call.read() == b"1"
        call.cancel()
        # It gets its turn when the engine has let go of the other.
        await channel.unary_unary(UNARY)(request(count=1), metadata=LEAVE_OUT)
    assert collector.one(STREAM).attributes["rpc.response.status_code"] == "CANCELLED"
    assert collector.parts(collector.one("engine")) == ["wait", "count"]
    assert collector.one("count").attributes["inkwell.steps"] == 1


async def test_many_calls_at_once_keep_to_their_own_traces(collector: Collector) -> None:
    async with fleet(collector, count=2, ratio=1.0) as gateway:
        call = gateway.channel.unary_unary(UNARY)
        await asyncio.gather(*(call(request(count=2)) for _ in range(20)))
    traces = {span.trace for span in collector.spans}
    assert len(traces) == 20
    whole = ["attempt", "count", "engine", RECOGNIZE, RECOGNIZE, "queue", "queue", "wait"]
    for trace in traces:
        assert sorted(span.name for span in collector.spans if span.trace == trace) == whole


async def test_a_collector_that_is_gone_disturbs_nobody() -> None:
    with collecting() as gone:
        pass
    async with service(gone) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await channel.unary_unary(UNARY)(request(count=2), metadata=RECORD) == b"2"
    assert gone.spans == []


@pytest.mark.parametrize("recording", [True, False], ids=["traces on", "traces off"])
async def test_log_lines_have_the_callers_trace(collector: Collector, recording: bool) -> None:
    process = counting_service.process()
    environment = {**os.environ, "INKWELL_COUNTING_PORT": str(process.port)}
    if recording:
        environment["INKWELL_COUNTING_TRACE_ENDPOINT"] = collector.endpoint
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", process.module, stderr=asyncio.subprocess.PIPE, env=environment
    )
    assert started.stderr is not None
    try:
        async for line in started.stderr:
            if b'"engine ready"' in line:
                break
        async with grpc.aio.insecure_channel(process.address) as channel:
            await channel.unary_unary(UNARY)(request(count=1), metadata=RECORD)
        started.send_signal(signal.SIGTERM)
        lines = [json.loads(line) async for line in started.stderr]
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()
    (call,) = [line for line in lines if line["event"] == "call"]
    assert call["trace_id"] == TRACE
    assert len(collector.spans) == (5 if recording else 0)


async def test_an_operation_belongs_to_the_trace_of_the_call_that_asked_for_it(
    collector: Collector, tmp_path: Path
) -> None:
    async with serving(tmp_path / "operations.sqlite", trace_endpoint=collector.endpoint) as caller:
        operation = await caller.begin(Todo(steps=3), metadata=RECORD)
        await caller.events(operation.name)
    asked, work = collector.one("test.Work/Begin"), collector.one("operation work")
    counting = collector.one("counting")
    assert (work.trace, work.parent) == (TRACE, asked.id)
    assert work.attributes["inkwell.operation"] == operation.name
    assert collector.parts(work) == ["queue", "counting"]
    assert [values["inkwell.number"] for _, values in counting.events] == [1, 2, 3]
    assert not work.error


async def test_an_operation_that_is_run_again_stays_in_its_trace(collector: Collector, tmp_path: Path) -> None:
    process = OperationsProcess(tmp_path / "operations.sqlite", {"trace_endpoint": collector.endpoint})
    caller = Caller(process.port)
    try:
        await process.start()
        todo = Todo(steps=2, wait_for=str(tmp_path / "go"))
        operation = await caller.begin(todo, str(uuid.uuid4()), metadata=RECORD, wait_for_ready=True)
        await caller.until(operation.name, "started")
        await process.end()
        await process.start()
        await caller.until(operation.name, "started", 2)
        (tmp_path / "go").touch()
        await caller.events(operation.name)
        await process.end(signal.SIGTERM)
    finally:
        await process.end()
        await caller.channel.close()
    # Of the process that was killed nothing has been sent, or all that had ended.
    work = collector.named("operation work")[-1]
    assert (work.trace, work.attributes["inkwell.attempt"]) == (TRACE, 2)
