"""kill -9 of services, engines and gateways under load: no caller of a read notices.

`make soak` kills the real services, more often, and measures what it costs (docs/reliability.md).
"""

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest

from inkwell import channel as sdk
from services.gateway.endpoint import State
from tests.support import counting_service
from tests.support.backend import UNARY
from tests.support.counting_service import request
from tests.support.gateway import Gateway, gateway_process, pool, ready, running
from tests.support.load import Callers
from tests.support.service_process import ServiceProcess, started

KILLS = int(os.environ.get("INKWELL_KILLS", "4"))
SEED = int(os.environ.get("INKWELL_SEED", "1"))
CALLERS = 32
# Long enough that a caller fails only if something is wrong, not if the machine is busy.
PATIENCE_S = 60


def reads(channel: grpc.aio.Channel) -> Callers:
    """Callers that count to three, again and again, and check the answer."""
    recognize = channel.unary_unary(UNARY)

    async def call(_number: int) -> None:
        assert await recognize(request(count=3), timeout=PATIENCE_S) == b"3"

    return Callers(call)


@contextlib.asynccontextmanager
async def two_services() -> AsyncIterator[tuple[list[ServiceProcess], Gateway]]:
    services = [counting_service.process(slots="8") for _ in range(2)]
    async with started(*services), running(pool("ocr-cpu", *services)) as gateway:
        yield services, gateway


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_services_killed_at_random_cost_no_read_while_one_is_left() -> None:
    chance = random.Random(SEED)
    async with two_services() as (services, gateway):
        callers = reads(gateway.channel).start(CALLERS)
        for _ in range(KILLS):
            await callers.more(chance.randrange(CALLERS, 5 * CALLERS))
            victim = chance.choice(services)
            await victim.end(signal.SIGKILL)
            await callers.more(CALLERS)  # by the other alone
            await victim.start()
            await gateway.until_state(victim, State.READY)
        await callers.stop()
        assert not callers.failures, callers.failed()
        assert len(callers.seconds) >= KILLS * 2 * CALLERS
        await gateway.idle()
        assert [endpoint.in_flight for endpoint in gateway.fleet.pools[0].endpoints] == [0, 0]


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_engines_killed_at_random_cost_no_read_while_one_is_left() -> None:
    chance = random.Random(SEED)
    async with two_services() as (services, gateway):
        callers = reads(gateway.channel).start(CALLERS)
        for _ in range(KILLS):
            await callers.more(chance.randrange(CALLERS, 5 * CALLERS))
            victim = chance.choice(services)
            (engine,) = psutil.Process(victim.pid).children()
            engine.kill()
            await gateway.until_state(victim, State.NOT_READY)
            await gateway.until_state(victim, State.READY)
        await callers.stop()
        assert not callers.failures, callers.failed()


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_gateways_killed_at_random_cost_no_read_of_the_sdk_while_one_is_left(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    service = counting_service.process(slots="8")
    config = tmp_path / "gateway.yaml"
    config.write_text(json.dumps({"pools": [pool("ocr-cpu", service)]}))
    gateways = [gateway_process(config) for _ in range(2)]
    async with (
        started(service, *gateways),
        sdk.open_aio_channel("ipv4:" + ",".join(gateway.address for gateway in gateways), None) as channel,
    ):
        await asyncio.gather(*(ready(gateway) for gateway in gateways))
        callers = reads(channel).start(CALLERS)
        for _ in range(KILLS):
            await callers.more(chance.randrange(CALLERS, 5 * CALLERS))
            victim = chance.choice(gateways)
            await victim.end(signal.SIGKILL)
            await callers.more(CALLERS)
            await victim.start()
            await ready(victim)
        await callers.stop()
        assert not callers.failures, callers.failed()
