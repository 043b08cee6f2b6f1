"""Calls that are sent more than once: joined while under way, answered from what was kept, and never done twice."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.kit import faults
from services.kit.call import label_call, send_header
from services.kit.metrics import Metrics
from services.kit.repeats import REQUEST_ID_KEY, Repeats
from services.kit.server import ServiceServer
from services.kit.settings import RepeatSettings
from tests.support.fault_proxy import fault_proxy

Text = wrappers_pb2.StringValue

ANY_LENGTH = [("grpc.max_receive_message_length", -1)]
# By the last word of what is asked, how much longer the three messages are.
PADDING = {"large": (1000, 1000, 1000), "huge": (0, 0, 16 << 20)}


@dataclass
class Work:
    """What the handlers do with a word, and how often they did it."""

    begun: list[str] = field(default_factory=list)
    left: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    fail: bool = False

    async def each(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """HOLD, then the number of times it ran, three times; between the first and the second it may be held."""
        self.begun.append(request.value)
        count = len(self.begun)
        try:
            if self.fail:
                raise faults.unavailable("ENGINE_LOST", "the engine is lost", retry_after_ms=1)
            label_call(model="pen", hardware="cpu", runtime="torch", version=f"run {count}")
            await send_header(context)
            for number in range(3):
                if number == 1 and request.value.startswith("hold"):
                    self.entered.set()
                    await self.release.wait()
                padding = PADDING.get(request.value.split()[-1], (0, 0, 0))[number]
                yield Text(value=f"{request.value} {count}.{number}" + "x" * padding)
        finally:
            self.left += 1
            self.ended.set()

    async def one(self, request: Any, context: Any) -> Any:
        return [message async for message in self.each(request, context)][-1]


@dataclass
class Running:
    server: ServiceServer
    channel: grpc.aio.Channel
    work: Work

    def stream(self, word: str, request_id: str | None, method: str = "Many") -> Any:
        call = self.channel.unary_stream(
            f"/test.Work/{method}", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
        )
        return call(Text(value=word), metadata=() if request_id is None else ((REQUEST_ID_KEY, request_id),))

    async def many(self, word: str, request_id: str | None) -> list[str]:
        return [message.value async for message in self.stream(word, request_id)]

    async def one(self, word: str, request_id: str | None) -> str:
        call = self.channel.unary_unary(
            "/test.Work/One", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
        )
        metadata = () if request_id is None else ((REQUEST_ID_KEY, request_id),)
        return str((await call(Text(value=word), metadata=metadata)).value)

    def counted(self, outcome: str) -> float:
        return self.server.metrics.registry.get_sample_value("inkwell_repeated_total", {"outcome": outcome}) or 0.0

    def ended(self, code: str) -> float:
        """Attempts at Many that ended so, by their metric."""
        labels = {"service": "test", "method": "/test.Work/Many", "code": code, "model": "pen", "hardware": "cpu"}
        return self.server.metrics.registry.get_sample_value("inkwell_requests_total", labels) or 0.0


async def start(**settings: Any) -> Running:
    work, metrics = Work(), Metrics("test")
    chosen = RepeatSettings(**settings)

    def register(server: grpc.aio.Server) -> list[str]:
        coding = {"request_deserializer": Text.FromString, "response_serializer": Text.SerializeToString}
        methods = {
            "One": grpc.unary_unary_rpc_method_handler(work.one, **coding),
            "Many": grpc.unary_stream_rpc_method_handler(work.each, **coding),
            "Other": grpc.unary_stream_rpc_method_handler(work.each, **coding),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Work", methods),))
        return ["test.Work"]

    repeats = Repeats(("/test.Work/One", "/test.Work/Many"), chosen, metrics)
    server = ServiceServer("test", chosen, metrics=metrics, host=None, register=register, interceptors=[repeats])
    await server.start()
    return Running(server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=ANY_LENGTH), work)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    running = await start()
    yield running
    await running.channel.close()
    await running.server.stop(0)


def new_id() -> str:
    return str(uuid.uuid4())


async def rest(call: Any) -> list[str]:
    """The messages after those that were read."""
    found: list[str] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        found.append(message.value)
    return found


async def reason(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    status = rpc_status.from_call(failed.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)


async def test_an_answered_call_is_answered_again_without_being_done(running: Running) -> None:
    request_id = new_id()
    first = running.stream("word", request_id)
    told = [message.value async for message in first]
    again = running.stream("word", request_id.upper())
    assert [message.value async for message in again] == told == ["word 1.0", "word 1.1", "word 1.2"]
    # Who served it is said again, too.
    header = dict(await again.initial_metadata())
    assert header["inkwell-model-version"] == "run 1"
    assert header == dict(await first.initial_metadata())
    assert running.work.begun == ["word"]
    assert running.counted("answered") == 1
    assert running.ended("OK") == 2


async def test_unary_calls_too(running: Running) -> None:
    request_id = new_id()
    assert [await running.one("word", request_id) for _ in range(3)] == ["word 1.2"] * 3
    assert await running.one("word", new_id()) == "word 2.2"
    assert [await running.one("word", None) for _ in range(2)] == ["word 3.2", "word 4.2"]


async def test_attempts_at_once_are_one_call(running: Running) -> None:
    request_id = new_id()
    attempts = [asyncio.create_task(running.many("hold", request_id)) for _ in range(5)]
    await running.work.entered.wait()
    late = running.stream("hold", request_id)
    assert (await late.read()).value == "hold 1.0"  # from the first message on
    running.work.release.set()
    assert await asyncio.gather(*attempts) == [["hold 1.0", "hold 1.1", "hold 1.2"]] * 5
    assert await rest(late) == ["hold 1.1", "hold 1.2"]
    assert (running.work.begun, running.work.left) == (["hold"], 1)
    assert running.counted("joined") == 5


async def test_the_call_goes_on_while_one_attempt_is_left(running: Running) -> None:
    request_id = new_id()
    first = running.stream("hold", request_id)
    assert await first.read() is not grpc.aio.EOF
    second = running.stream("hold", request_id)
    assert await second.read() is not grpc.aio.EOF
    first.cancel()
    while running.ended("CANCELLED") == 0:  # noqa: ASYNC110 - a counter tells that the server knows
        await asyncio.sleep(0.01)
    running.work.release.set()
    assert await rest(second) == ["hold 1.1", "hold 1.2"]
    assert running.work.begun == ["hold"]
    assert running.ended("OK") == 1


async def test_a_call_that_nobody_waits_for_ends_and_its_repetition_begins_anew(running: Running) -> None:
    request_id = new_id()
    first = running.stream("hold", request_id)
    assert await first.read() is not grpc.aio.EOF
    first.cancel()
    await running.work.ended.wait()
    await running.server._boundary.wait_idle()
    assert running.work.left == 1
    running.work.release.set()
    assert await running.many("hold", request_id) == ["hold 2.0", "hold 2.1", "hold 2.2"]


async def test_failures_reach_every_attempt_and_are_not_kept(running: Running) -> None:
    request_id = new_id()
    running.work.fail = True
    assert await reason(running.one("word", request_id)) == "ENGINE_LOST"
    running.work.fail = False
    assert await running.one("word", request_id) == "word 2.2"


async def test_an_id_belongs_to_one_request(running: Running) -> None:
    request_id = new_id()
    await running.one("word", request_id)
    assert await reason(running.one("another", request_id)) == "REQUEST_ID_REUSED"
    assert await reason(running.many("word", request_id)) == "REQUEST_ID_REUSED"  # of another method
    assert running.work.begun == ["word"]
    assert running.counted("refused") == 2


@pytest.mark.parametrize("wrong", ["", "7", "x" * 36])
async def test_an_id_has_to_be_a_uuid(running: Running, wrong: str) -> None:
    assert await reason(running.one("word", wrong)) == "INVALID_FIELD"
    assert running.work.begun == []


async def test_a_call_has_one_id(running: Running) -> None:
    call = running.channel.unary_unary("/test.Work/One", request_serializer=Text.SerializeToString)
    metadata = ((REQUEST_ID_KEY, new_id()), (REQUEST_ID_KEY, new_id()))
    assert await reason(call(Text(value="word"), metadata=metadata)) == "INVALID_FIELD"


async def test_other_methods_take_no_notice(running: Running) -> None:
    request_id = new_id()
    for count in (1, 2):
        answered = [message.value async for message in running.stream("word", request_id, "Other")]
        assert answered[0] == f"word {count}.0"


async def test_a_stream_that_broke_in_its_last_message_is_not_done_again(running: Running) -> None:
    request_id = new_id()
    async with (
        fault_proxy(f"127.0.0.1:{running.server.port}") as proxy,
        grpc.aio.insecure_channel(proxy.address, options=ANY_LENGTH) as channel,
    ):
        broken = Running(running.server, channel, running.work).stream("hold huge", request_id)
        assert (await broken.read()).value == "hold huge 1.0"
        proxy.cut_in(100_000)
        running.work.release.set()
        assert (await broken.read()).value == "hold huge 1.1"
        with pytest.raises(grpc.aio.AioRpcError):
            await broken.read()
    await running.server._boundary.wait_idle()
    assert [message[:13] for message in await running.many("hold huge", request_id)] == [
        "hold huge 1.0", "hold huge 1.1", "hold huge 1.2",
    ]  # fmt: skip
    assert running.work.begun == ["hold huge"]
    assert running.ended("CANCELLED") == 1


async def test_what_is_too_large_to_keep_is_answered_all_the_same() -> None:
    running = await start(repeat_bytes_limit=1500)
    try:
        request_id = new_id()
        for count in (1, 2):
            told = await running.many("large", request_id)
            assert [message.rstrip("x") for message in told] == [f"large {count}.{number}" for number in range(3)]
        assert await running.many("word", request_id) == ["word 3.0", "word 3.1", "word 3.2"]
    finally:
        await running.channel.close()
        await running.server.stop(0)


async def test_a_long_request_is_the_same_request(running: Running) -> None:
    request_id, word = new_id(), "a" * (3 << 20)
    assert await running.one(word, request_id) == await running.one(word, request_id)
    assert await reason(running.one(word + "b", request_id)) == "REQUEST_ID_REUSED"
    assert len(running.work.begun) == 1


async def test_draining_ends_what_is_shared() -> None:
    running = await start()
    held = [running.stream("hold", request_id) for request_id in [new_id()] * 2]
    for each in held:
        assert await each.read() is not grpc.aio.EOF
    await running.server.stop(0)
    assert running.work.left == 1
    for each in held:
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await each.read()
    await running.channel.close()
