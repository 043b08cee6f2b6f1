"""Ten times the capacity is offered: what is done stays at the capacity, and the rest is refused at once.

The service has slots whose work takes a known time without the processor, so its capacity is known too, and is small
enough for this machine to offer ten times as much.
"""

import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from benchmarks._bars import Bar, at_least, at_most
from tests.soak.kills import percentile
from tests.support import counting_service
from tests.support.backend import UNARY
from tests.support.counting_service import request
from tests.support.gateway import gateway_process, pool, ready
from tests.support.load import Callers
from tests.support.service_process import started

SLOTS = 4
ASKED = request(count=5, step_ms=20)
TIMES = 10
CAPACITY_S = 20.0  # how long the capacity is measured
DEADLINE_S = 10.0
REFUSED_WITHIN_S = 0.010
SETTLE_S = 15.0


async def run(minutes: float) -> dict[str, Bar]:
    """The capacity with as many callers as slots, then ten times as many calls a second as that for so long."""
    service = counting_service.process(slots=str(SLOTS))
    with tempfile.TemporaryDirectory(prefix="inkwell-soak-") as folder:
        config = Path(folder) / "gateway.yaml"
        config.write_text(json.dumps({"pools": [pool("ocr-cpu", service)]}))
        gateway = gateway_process(config)
        options = [("grpc.enable_retries", 0)]
        async with (
            started(service, gateway),
            grpc.aio.insecure_channel(gateway.address, options=options) as channel,
        ):
            await asyncio.gather(ready(service), ready(gateway))
            recognize = channel.unary_unary(UNARY)

            async def call(_number: int) -> None:
                await recognize(ASKED, timeout=DEADLINE_S)

            # Twice as many callers as slots keep every slot busy.
            callers = Callers(call).start(2 * SLOTS)
            await callers.more(4 * SLOTS)
            callers.seconds.clear()
            began = time.monotonic()
            await asyncio.sleep(CAPACITY_S)
            capacity = len(callers.seconds) / (time.monotonic() - began)
            at_capacity = percentile(callers.seconds, 0.99)
            await callers.stop()
            print(f"  capacity {capacity:.1f} calls/s, p99 {at_capacity * 1000:.0f} ms", flush=True)

            offered = await _offer(recognize, TIMES * capacity, minutes * 60)
    admitted = percentile(offered.admitted, 0.99)
    refused = percentile(offered.refused, 0.99) if offered.refused else 0.0
    goodput = len(offered.admitted) / (minutes * 60)
    print(f"  offered {offered.calls}; ended as {dict(offered.codes)}; untyped {offered.untyped}")
    settled = percentile(offered.settled, 0.99) if offered.settled else 0.0
    print(f"  p99 admitted of calls that came {SETTLE_S:g} s after the beginning or later: {settled * 1000:.0f} ms")
    print(f"  goodput {goodput:.1f}/s; p99 admitted {admitted * 1000:.0f} ms, refused {refused * 1000:.1f} ms")
    return {
        "goodput / capacity": at_least(goodput / capacity, 0.95),
        "p99 of admitted / at capacity": at_most(admitted / at_capacity, 2.0),
        "untyped refusals": at_most(offered.untyped, 0),
        "p99 of refusals, ms": at_most(refused * 1000, REFUSED_WITHIN_S * 1000),
    }


class _Offered:
    def __init__(self) -> None:
        self.calls = 0
        self.admitted: list[float] = []
        self.settled: list[float] = []  # those of them that came when the gateway had had time to learn
        self.refused: list[float] = []
        self.codes: Counter[str] = Counter()
        self.untyped = 0


async def _offer(recognize: grpc.aio.UnaryUnaryMultiCallable, rate: float, seconds: float) -> _Offered:
    """Calls at an even pace, whether or not those before have ended; nobody retries."""
    offered = _Offered()
    tasks: set[asyncio.Task[None]] = set()
    start = time.monotonic()

    async def call() -> None:
        began = time.monotonic()
        try:
            await recognize(ASKED, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            offered.refused.append(time.monotonic() - began)
            offered.codes[error.code().name] += 1
            offered.untyped += not _typed(error)
        else:
            offered.admitted.append(time.monotonic() - began)
            if began - start >= SETTLE_S:
                offered.settled.append(time.monotonic() - began)
            offered.codes["OK"] += 1

    while (elapsed := time.monotonic() - start) < seconds:
        while offered.calls < elapsed * rate:
            offered.calls += 1
            task = asyncio.create_task(call())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*tasks)
    return offered


def _typed(error: grpc.aio.AioRpcError) -> bool:
    """RESOURCE_EXHAUSTED or UNAVAILABLE with a reason and when to come again."""
    if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        return False
    status = rpc_status.from_call(error)
    if status is None:
        return False
    wanted = {error_details_pb2.ErrorInfo.DESCRIPTOR.full_name, error_details_pb2.RetryInfo.DESCRIPTOR.full_name}
    return wanted <= {detail.TypeName() for detail in status.details}
