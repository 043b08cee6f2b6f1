"""What one pod does of a kind of call: calls a second when it is busy, and how long a call takes alone.

Real services on this machine, called through the gateway with the embedded models: what `docs/scaling.md` calculates
with. The figures are medians of rounds; callers share the processor with what they call.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import inkwell
from benchmarks._bars import Bar, at_least
from services import local

ROUNDS = 5
ALONE = 20  # calls of a round, one after the other
CALLERS = 16


async def _alone_s(call: Callable[[], Awaitable[object]], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        await call()
    return (time.perf_counter() - began) / count


async def _calls_s(call: Callable[[], Awaitable[object]], count: int) -> float:
    began = time.perf_counter()
    left = iter(range(count))

    async def caller() -> None:
        for _ in left:
            await call()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return count / (time.perf_counter() - began)


async def _measure(address: str) -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    samples = sorted(local.SAMPLES.glob("*.png"))
    async with inkwell.AsyncClient(address) as client:
        turn = 0

        async def read() -> object:
            nonlocal turn
            turn += 1
            return await client.read(samples[turn % len(samples)])

        async def paint() -> object:
            return await client.paint("grinning face", seed=7)

        for name, call, busy in (("read a line", read, 400), ("paint an emoji", paint, 32)):
            await _calls_s(call, CALLERS)
            rounds = [(await _alone_s(call, ALONE), await _calls_s(call, busy)) for _ in range(ROUNDS)]
            alone = statistics.median(a for a, _ in rounds)
            rate = statistics.median(r for _, r in rounds)
            print(f"  {name:<15} {rate:7.1f} calls/s with {CALLERS} callers, {alone * 1000:7.1f} ms alone")
            # Many together have to be worth more than one after the other.
            bars[f"{name}: busy against one after the other"] = at_least(rate * alone, 1.0)
    return bars


def run() -> dict[str, Bar]:
    """Prints calls a second and milliseconds; answers how much more a busy pod does than one caller gets out of it."""
    with local.running_on_free_ports() as services:
        return asyncio.run(_measure(services["gateway"].address))
