"""Every process is restarted by SIGTERM, one after the other, under load: no call fails, no operation is lost."""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from inkwell import channel as sdk
from tests.faults.test_operations_killed import Watched, Watchers, assert_one_result, submit
from tests.support import counting_service
from tests.support.backend import BIDI, SERVER_STREAM, UNARY
from tests.support.child_work import Todo
from tests.support.counting_service import request
from tests.support.gateway import all_ready, gateway_process, pool, ready
from tests.support.load import Callers
from tests.support.operations import Caller, Number
from tests.support.operations import ServiceProcess as OperationsProcess
from tests.support.service_process import started

CALLERS = 8
PATIENCE_S = 60


def mixed(channel: grpc.aio.Channel) -> Callers:
    """Unary calls, streams of answers and streams both ways in turn, each checked to its last message."""

    async def unary() -> None:
        assert await channel.unary_unary(UNARY)(request(count=3), timeout=PATIENCE_S) == b"3"

    async def stream() -> None:
        call = channel.unary_stream(SERVER_STREAM)(request(count=3), timeout=PATIENCE_S)
        assert [message async for message in call] == [b"1", b"2", b"3"]

    async def both() -> None:
        async def asked() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield request(count=2)

        call = channel.stream_stream(BIDI)(asked(), timeout=PATIENCE_S)
        assert [message async for message in call] == [b"1", b"2"] * 3

    kinds: list[Callable[[], Awaitable[None]]] = [unary, stream, both]

    async def call(number: int) -> None:
        await kinds[number % 3]()

    return Callers(call)


@pytest.mark.timeout(180)
async def test_a_rolling_restart_of_everything_fails_no_call_and_loses_no_operation(tmp_path: Path) -> None:
    services = [counting_service.process(slots="8") for _ in range(2)]
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"pools": [pool("ocr-cpu", *services)]}))
    gateways = [gateway_process(config) for _ in range(2)]
    working = OperationsProcess(tmp_path / "operations.sqlite", {"drain_grace_s": "0"})
    await working.start()
    caller = Caller(working.port)
    operations = [Watched(str(uuid.uuid4()), Todo(steps=3, result=str(tmp_path / f"result-{n}"))) for n in range(4)]
    watchers = Watchers(caller)
    for operation in operations:
        await submit(caller, operation)
        watchers.add(operation)
    async with (
        started(*services, *gateways),
        sdk.open_aio_channel("ipv4:" + ",".join(gateway.address for gateway in gateways), None) as channel,
    ):
        await asyncio.gather(*map(ready, gateways))
        callers = mixed(channel).start(CALLERS)
        assert await working.end(signal.SIGTERM) == 0
        await working.start()
        for process in [*services, *gateways]:
            await callers.more(3 * CALLERS)
            assert await process.end(signal.SIGTERM) == 0
            await callers.more(3 * CALLERS)
            await process.start()
            await ready(process)
            # As a rollout does that gives a new pod some seconds: the gateways have it back, too.
            await asyncio.gather(*(all_ready(gateway) for gateway in gateways))
        await callers.more(3 * CALLERS)
        await callers.stop()
    assert not callers.failures, callers.failed()
    await asyncio.gather(*watchers.tasks)
    for operation in operations:
        ended = Number()
        assert operation.told[-1].done.response.Unpack(ended), operation.told[-1]
        assert_one_result(operation)
    assert await working.end(signal.SIGTERM) == 0
    await caller.channel.close()
