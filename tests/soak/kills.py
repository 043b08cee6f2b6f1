"""kill -9 of services under callers: no call fails, and what the slowest callers wait stays within twice what it was.

Once with services whose engines take their time without the processor, as on devices of their own: on a machine of few
cores the start of the next process would otherwise be what is measured. And once with the OCR service and its model,
where it is: what the slowest wait is said there, and has no bar.
"""

import asyncio
import contextlib
import json
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks._bars import Bar, at_least, at_most
from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2
from services import local
from tests.support import counting_service
from tests.support.backend import UNARY
from tests.support.counting_service import request
from tests.support.gateway import all_ready, gateway_process, pool, ready
from tests.support.load import Callers
from tests.support.service_process import ServiceProcess, started

KILLS = 20
CALLERS = 32
CALLS = 5_000
WARM_CALLS = 20 * CALLERS
# Ten steps of 10 ms: 100 ms a call. One service alone has room for all callers, as a fleet that may lose one must.
ASKED = request(count=10, step_ms=10)
SLOTS = str(CALLERS)
# Longer than a service takes to load its model while another reads for all callers on the same cores.
PATIENCE_S = 120
IMAGES = [path.read_bytes() for path in sorted(local.SAMPLES.glob("*.png"))]


@dataclass(frozen=True)
class Measured:
    """calls: of the time of the kills; the p99 in seconds."""

    calls: int
    failures: list[BaseException]
    before_s: float
    during_s: float

    def say(self) -> None:
        for failure in self.failures[:5]:
            print(f"  failed: {failure!r}")
        print(f"  p99 {self.before_s * 1000:.0f} ms before, {self.during_s * 1000:.0f} ms during; {self.calls} calls")


async def run(minutes: float) -> dict[str, Bar]:
    """Kills spread over that many minutes, at random moments."""
    services = [counting_service.process(slots=SLOTS) for _ in range(2)]
    async with behind_gateway(services) as (channel, gateway):
        recognize = channel.unary_unary(UNARY)

        async def call(_number: int) -> None:
            assert await recognize(ASKED, timeout=PATIENCE_S) == b"10"

        measured = await kill(services, gateway, call, minutes)
    measured.say()
    return {
        "failed calls": at_most(len(measured.failures), 0),
        "calls": at_least(measured.calls, CALLS),
        "p99 during / before": at_most(measured.during_s / measured.before_s, 2.0),
    }


async def run_ocr(minutes: float) -> dict[str, Bar]:
    """The same of the OCR service; every answer is compared with what the line was read as before the first kill."""
    services = [ServiceProcess("services.ocr", "INKWELL_OCR_", {}) for _ in range(2)]
    requests = [ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=image)).SerializeToString() for image in IMAGES]
    async with behind_gateway(services) as (channel, gateway):
        recognize = channel.unary_unary(UNARY, response_deserializer=ocr_pb2.RecognizeResponse.FromString)
        texts = [(await recognize(asked, timeout=PATIENCE_S)).recognition.hypotheses[0].text for asked in requests]

        async def call(number: int) -> None:
            line = number % len(requests)
            assert (await recognize(requests[line], timeout=PATIENCE_S)).recognition.hypotheses[0].text == texts[line]

        measured = await kill(services, gateway, call, minutes)
    measured.say()
    return {"failed calls": at_most(len(measured.failures), 0), "calls": at_least(measured.calls, CALLS)}


@contextlib.asynccontextmanager
async def behind_gateway(services: list[ServiceProcess]) -> AsyncIterator[tuple[grpc.aio.Channel, ServiceProcess]]:
    """A plain channel to a gateway whose one pool they are, once all are ready."""
    with tempfile.TemporaryDirectory(prefix="inkwell-soak-") as folder:
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps({"pools": [pool("ocr-cpu", *services)]}))
        gateway = gateway_process(config)
        async with started(*services, gateway), grpc.aio.insecure_channel(gateway.address) as channel:
            await asyncio.gather(*map(ready, [*services, gateway]))
            await all_ready(gateway)
            yield channel, gateway


async def kill(
    services: list[ServiceProcess], gateway: ServiceProcess, call: Callable[[int], Awaitable[None]], minutes: float
) -> Measured:
    """KILLS of them at random moments of that many minutes or longer, each when the one before is back."""
    chance = random.Random(1)
    callers = Callers(call).start(CALLERS)
    await callers.more(WARM_CALLS)
    callers.seconds.clear()
    await callers.more(1000)
    before_s = percentile(callers.seconds, 0.99)
    callers.seconds.clear()
    first = callers.done
    end = time.monotonic() + minutes * 60
    for number in range(KILLS):
        left_s = max(0.0, end - time.monotonic()) / (KILLS - number)
        await asyncio.sleep(left_s * chance.uniform(0.3, 1.0))
        victim = chance.choice(services)
        await victim.end(signal.SIGKILL)
        await victim.start()
        await ready(victim)
        await all_ready(gateway)
    await callers.more(max(1, CALLS - (callers.done - first)))
    await callers.stop()
    return Measured(callers.done - first, callers.failures, before_s, percentile(callers.seconds, 0.99))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least that share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
