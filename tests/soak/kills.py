"""kill -9 of services under callers: no call fails, and what the slowest callers wait stays within twice what it was.

Two services whose engines take their time without the processor, as on devices of their own: on a machine of few cores
the start of the next process would otherwise be what is measured.
"""

import asyncio
import json
import random
import signal
import tempfile
import time
from pathlib import Path

import grpc

from benchmarks._bars import Bar, at_least, at_most
from tests.support import counting_service
from tests.support.backend import UNARY
from tests.support.counting_service import request
from tests.support.gateway import gateway_process, pool, ready
from tests.support.load import Callers
from tests.support.service_process import started

KILLS = 20
CALLERS = 32
CALLS = 5_000
# Ten steps of 10 ms: 100 ms a call. One service alone has room for all callers, as a fleet that may lose one must.
ASKED = request(count=10, step_ms=10)
SLOTS = str(CALLERS)


async def run(minutes: float) -> dict[str, Bar]:
    """Kills spread over that many minutes, at random moments."""
    chance = random.Random(1)
    services = [counting_service.process(slots=SLOTS) for _ in range(2)]
    with tempfile.TemporaryDirectory(prefix="inkwell-soak-") as folder:
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps({"pools": [pool("ocr-cpu", *services)]}))
        gateway = gateway_process(config)
        async with started(*services, gateway), grpc.aio.insecure_channel(gateway.address) as channel:
            await asyncio.gather(*map(ready, [*services, gateway]))
            recognize = channel.unary_unary(UNARY)

            async def call(_number: int) -> None:
                assert await recognize(ASKED, timeout=60) == b"10"

            callers = Callers(call).start(CALLERS)
            await callers.more(20 * CALLERS)  # warm
            callers.seconds.clear()
            await callers.more(1000)
            before = percentile(callers.seconds, 0.99)
            callers.seconds.clear()
            first = callers.done
            end = time.monotonic() + minutes * 60
            for kill in range(KILLS):
                left_s = max(0.0, end - time.monotonic()) / (KILLS - kill)
                await asyncio.sleep(left_s * chance.uniform(0.3, 1.0))
                victim = chance.choice(services)
                await victim.end(signal.SIGKILL)
                await victim.start()
                await ready(victim)
            await callers.more(max(1, CALLS - (callers.done - first)))
            await callers.stop()
            during = percentile(callers.seconds, 0.99)
    for failure in callers.failures[:5]:
        print(f"  failed: {failure!r}")
    print(f"  p99 {before * 1000:.0f} ms before, {during * 1000:.0f} ms during; {callers.done - first} calls")
    return {
        "failed calls": at_most(len(callers.failures), 0),
        "calls": at_least(callers.done - first, CALLS),
        "p99 during / before": at_most(during / before, 2.0),
    }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least that share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
