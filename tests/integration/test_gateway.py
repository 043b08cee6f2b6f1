"""What callers see through the gateway: every arity, metadata, statuses, deadlines, cancellation, limits."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.gateway import feed, methods
from services.gateway.methods import Method
from tests.support.backend import BIDI, CLIENT_STREAM, SERVER_STREAM, UNARY, Backend, echo
from tests.support.gateway import Gateway, pool, running


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    started = await Backend().start()
    yield started
    await started.stop()


@pytest.fixture
async def gateway(backend: Backend) -> AsyncIterator[Gateway]:
    async with running(pool("ocr-cpu", backend)) as started:
        yield started


async def outcome(call: Any) -> grpc.aio.AioRpcError:
    """The error that a unary or response-stream call ends with."""

    async def ended() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ended()
    return raised.value


def detail(error: grpc.aio.AioRpcError, message: Any) -> Any:
    """The one google.rpc detail of that type."""
    status = rpc_status.from_call(_Ended(error))
    assert status is not None
    found = [d for d in status.details if d.Is(message.DESCRIPTOR)]
    assert len(found) == 1
    found[0].Unpack(message)
    return message


class _Ended:
    # What grpc_status reads of a call.
    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.trailing_metadata = lambda: tuple(error.trailing_metadata())
        self.code = error.code
        self.details = error.details


async def test_unary(gateway: Gateway) -> None:
    assert await gateway.channel.unary_unary(UNARY)(b"a line") == b"a line"


async def test_empty_messages_stay_messages(gateway: Gateway) -> None:
    assert await gateway.channel.unary_unary(UNARY)(b"") == b""
    assert [m async for m in gateway.channel.unary_stream(SERVER_STREAM)(b"")] == [b""]


async def test_server_stream(backend: Backend, gateway: Gateway) -> None:
    async def count(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        for i in range(int(await anext(aiter(requests)))):
            yield b"%d" % i

    backend.behaviour = count
    assert [m async for m in gateway.channel.unary_stream(SERVER_STREAM)(b"5")] == [b"0", b"1", b"2", b"3", b"4"]
    assert [m async for m in gateway.channel.unary_stream(SERVER_STREAM)(b"0")] == []


async def test_bidi_is_passed_on_message_by_message(gateway: Gateway) -> None:
    call = gateway.channel.stream_stream(BIDI)()
    for i in range(20):
        await call.write(b"%d" % i)
        assert await call.read() == b"%d" % i
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_an_answer_may_end_before_the_requests(backend: Backend, gateway: Gateway) -> None:
    async def first_only(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        yield await anext(aiter(requests))

    backend.behaviour = first_only
    call = gateway.channel.stream_stream(BIDI)()
    await call.write(b"one")
    assert await call.read() == b"one"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_client_stream(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Method(CLIENT_STREAM, "Collect", "ocr", request_streaming=True, response_streaming=False)
    monkeypatch.setitem(methods.METHODS, CLIENT_STREAM, known)

    async def join(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        yield b"".join([request async for request in requests])

    backend.behaviour = join
    async with running(pool("ocr-cpu", backend)) as gateway:
        call = gateway.channel.stream_unary(CLIENT_STREAM)()
        for part in (b"a", b"b", b"c"):
            await call.write(part)
        await call.done_writing()
        assert await call == b"abc"
        assert dict(await call.initial_metadata())["inkwell-pool"] == "ocr-cpu"


async def test_a_method_newer_than_the_gateway_is_passed_on(backend: Backend, gateway: Gateway) -> None:
    call = gateway.channel.stream_unary(CLIENT_STREAM)()
    await call.write(b"x")
    await call.done_writing()
    assert await call == b"x"
    error = await outcome(gateway.channel.unary_unary("/inkwell.ocr.v1.OcrService/Nowhere")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_generated_stubs_work_through_the_gateway(backend: Backend, gateway: Gateway) -> None:
    async def name_models(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        yield ocr_pb2.StreamRecognizeResponse(sequence=1).SerializeToString()

    backend.behaviour = name_models
    stub = ocr_pb2_grpc.OcrServiceStub(gateway.channel)
    assert [r.sequence async for r in stub.StreamRecognize(ocr_pb2.StreamRecognizeRequest())] == [1]


async def test_metadata_crosses_both_ways(backend: Backend, gateway: Gateway) -> None:
    async def talkative(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await context.send_initial_metadata((("x-first", "1"), ("x-raw-bin", b"\x00\xff")))
        context.set_trailing_metadata((("x-last", "2"), ("x-tail-bin", b"\xfe")))
        yield await anext(aiter(requests))

    backend.behaviour = talkative
    sent = (("x-ask", "yes"), ("x-ask", "no"), ("x-data-bin", b"\x00\x01\xff"), ("inkwell-priority", "high"))
    for streamed in (False, True):
        call: Any
        if streamed:
            call = gateway.channel.unary_stream(SERVER_STREAM)(b"a", metadata=sent)
            assert [m async for m in call] == [b"a"]
        else:
            call = gateway.channel.unary_unary(UNARY)(b"a", metadata=sent)
            assert await call == b"a"
        header = dict(await call.initial_metadata())
        trailer = dict(await call.trailing_metadata())
        assert (header["x-first"], header["x-raw-bin"]) == ("1", b"\x00\xff")
        assert (trailer["x-last"], trailer["x-tail-bin"]) == ("2", b"\xfe")
        assert backend.metadata["x-data-bin"] == b"\x00\x01\xff"
        assert backend.metadata["inkwell-priority"] == "high"
        assert "inkwell-pool" not in trailer
        assert header["inkwell-pool"] == "ocr-cpu"
        assert header["inkwell-endpoint"] == backend.address
        assert header["inkwell-hardware"] == "cpu"


async def test_the_request_id_of_the_gateways_log_reaches_the_service(backend: Backend, gateway: Gateway) -> None:
    await gateway.channel.unary_unary(UNARY)(b"a", metadata=(("x-request-id", "mine-1"),))
    assert backend.metadata["x-request-id"] == "mine-1"
    await gateway.channel.unary_unary(UNARY)(b"a")
    assert len(backend.metadata["x-request-id"]) == 32


@pytest.mark.parametrize("answered", [False, True])
async def test_an_error_crosses_whole(backend: Backend, gateway: Gateway, answered: bool) -> None:
    async def refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        if answered:
            yield b"something first"
        await context.abort(
            grpc.StatusCode.NOT_FOUND, "no such model: ü", (("grpc-status-details-bin", b"\x08\x05"), ("x-why", "gone"))
        )
        yield b""

    backend.behaviour = refuse
    error = await outcome(gateway.channel.unary_stream(SERVER_STREAM)(b"a"))
    trailer = dict(error.trailing_metadata())
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such model: ü")
    assert (trailer["grpc-status-details-bin"], trailer["x-why"]) == (b"\x08\x05", "gone")
    # Who said it stands in the header, or with the trailers when there was none.
    assert {**dict(error.initial_metadata()), **trailer}["inkwell-endpoint"] == backend.address
    assert backend.call_count == 1


async def test_why_an_endpoint_stopped_a_stream_is_told_while_the_caller_still_writes(
    backend: Backend, gateway: Gateway
) -> None:
    async def enough(requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes, None]:
        await anext(aiter(requests))
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "that is enough")
        yield b""

    backend.behaviour = enough
    for _ in range(20):
        call = gateway.channel.stream_stream(BIDI)()
        writing = asyncio.create_task(_write_on(call))
        error = await outcome(call_reads(call))
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "that is enough")


async def call_reads(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _write_on(call: Any) -> None:
    while True:
        # The gateway's own way to write, because grpc.aio's would spoil the status in this very client.
        await feed._write(call, b"x" * 100_000)


async def test_the_deadline_is_passed_on_earlier_by_the_margin(backend: Backend) -> None:
    async with running(pool("ocr-cpu", backend), deadline_margin_ms=10_000) as gateway:
        await gateway.channel.unary_unary(UNARY)(b"a", timeout=60)
        assert backend.time_left is not None
        assert 30 < backend.time_left < 51  # gRPC itself rounds what it sends to three digits
        await gateway.channel.unary_unary(UNARY)(b"a")
        assert backend.time_left is None or backend.time_left > 10**8  # grpc's way to say there is none


async def test_a_deadline_that_passes_ends_the_call_at_the_endpoint(backend: Backend, gateway: Gateway) -> None:
    backend.behaviour = forever
    recognize = gateway.channel.unary_unary(UNARY)
    call = await backend.reached(lambda deadline_s: recognize(b"a", timeout=deadline_s), 0.5)
    assert (await outcome(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await backend.cancelled.wait()


async def test_a_deadline_within_the_margin_is_refused_at_the_door(backend: Backend) -> None:
    async with running(pool("ocr-cpu", backend), deadline_margin_ms=10_000) as gateway:
        error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=9))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert detail(error, error_details_pb2.ErrorInfo()).reason == "DEADLINE_TOO_SHORT"
    assert backend.call_count == 0


def counted(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.server.metrics.registry.get_sample_value(name, {"pool": "ocr-cpu", **labels}) or 0


async def forever(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


async def first_then_forever(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
    yield b"first"
    await asyncio.Event().wait()


@pytest.mark.parametrize("behaviour", [forever, first_then_forever])
@pytest.mark.parametrize("kind", ["unary", "server stream", "bidi"])
async def test_cancelling_reaches_the_endpoint(backend: Backend, gateway: Gateway, kind: str, behaviour: Any) -> None:
    backend.behaviour = behaviour
    call: Any
    if kind == "unary":
        backend.behaviour = forever
        call = gateway.channel.unary_unary(UNARY)(b"a")
    elif kind == "server stream":
        call = gateway.channel.unary_stream(SERVER_STREAM)(b"a")
    else:
        call = gateway.channel.stream_stream(BIDI)()
        await call.write(b"a")
    await backend.entered.wait()
    if backend.behaviour is first_then_forever:
        assert await call.read() == b"first"
    assert gateway.endpoint(backend).in_flight == 1
    call.cancel()
    await backend.cancelled.wait()
    await gateway.idle()
    backend.behaviour = echo
    assert await gateway.channel.unary_unary(UNARY)(b"next") == b"next"
    await gateway.idle()
    assert gateway.endpoint(backend).in_flight == 0


async def test_a_caller_that_reads_slowly_slows_the_endpoint(backend: Backend, gateway: Gateway) -> None:
    produced = 0

    async def flood(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        nonlocal produced
        for _ in range(1000):
            yield b"x" * 100_000
            produced += 1

    backend.behaviour = flood
    call = gateway.channel.unary_stream(SERVER_STREAM)(b"a")
    await call.read()
    before = -1
    while produced != before:  # until nothing moves any more
        before = produced
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.2)
    assert produced < 300
    call.cancel()
    await backend.cancelled.wait()
    await gateway.idle()
    assert counted(gateway, "inkwell_gateway_requests_total", method=SERVER_STREAM[1:], code="CANCELLED") == 1


@pytest.mark.parametrize("kind", ["unary", "bidi"])
async def test_a_message_over_the_limit_is_refused_with_both_sizes(backend: Backend, kind: str) -> None:
    async with running(pool("ocr-cpu", backend), max_message_bytes=2000) as gateway:
        if kind == "unary":
            call: Any = gateway.channel.unary_unary(UNARY)(b"x" * 2001)
        else:
            call = gateway.channel.stream_stream(BIDI)(iter([b"x", b"x" * 2001]))
        error = await outcome(call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail(error, error_details_pb2.ErrorInfo()).metadata["limit_bytes"] == "2000"
        assert "2001 bytes are more than the limit of 2000" in (error.details() or "")
        assert await gateway.channel.unary_unary(UNARY)(b"x" * 2000) == b"x" * 2000


async def test_large_answers_are_not_limited(backend: Backend, gateway: Gateway) -> None:
    async def large(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        yield b"x" * 8_000_000

    backend.behaviour = large
    assert len(await gateway.channel.unary_unary(UNARY)(b"a")) == 8_000_000


@pytest.mark.parametrize("path", ["/inkwell.ocr.v2.OcrService/Recognize", "/foo.Bar/Baz", "/x"])
async def test_a_service_that_is_not_routed_is_refused_with_what_is(gateway: Gateway, path: str) -> None:
    error = await outcome(gateway.channel.unary_unary(path)(b"a"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "it routes: inkwell.ocr.v1.OcrService, inkwell.diffusion.v1.DiffusionService" in (error.details() or "")
    assert detail(error, error_details_pb2.ErrorInfo()).reason == "SERVICE_NOT_ROUTED"
