"""Mixed calls, cancels and bad inputs for long: the memory and the open files of every process stay where they were."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

import inkwell
from benchmarks._bars import Bar, at_most
from services import local
from tests.soak.kills import percentile

CALLERS = 6
PAUSE_S = 1.5  # a caller's between two calls, on average: memory and files are measured here, not speed
WARM_SHARE = 0.2  # of the run: models settle, caches fill, the allocator finds its size
LOOK_S = 1.0
SAID_EVERY = 300  # looks between two lines that say how it goes
IMAGES = [path.read_bytes() for path in sorted(local.SAMPLES.glob("*.png"))]
# What a caller may meet here: its own mistakes, and a queue that is full.
EXPECTED = (inkwell.InvalidRequest, inkwell.NotFound, inkwell.DeadlineExceeded, inkwell.Overloaded)


@dataclass
class Watched:
    """One process: resident bytes and open files at every look after the warm-up."""

    name: str
    process: psutil.Process
    resident: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self) -> None:
        self.resident.append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds())

    def said(self) -> str:
        """Its last look, for people."""
        return f"{self.name} {self.resident[-1] / (1 << 20):.1f} MiB {self.files[-1]} files"

    def growth(self) -> float:
        """Of the median of the last fifth over that of the first."""
        fifth = max(1, len(self.resident) // 5)
        return percentile([*map(float, self.resident[-fifth:])], 0.5) / percentile(
            [*map(float, self.resident[:fifth])], 0.5
        )

    def more_files(self) -> int:
        fifth = max(1, len(self.files) // 5)
        return sorted(self.files[-fifth:])[fifth // 2] - sorted(self.files[:fifth])[fifth // 2]


async def run(minutes: float) -> dict[str, Bar]:
    """For that many minutes, warm-up included."""
    end = time.monotonic() + minutes * 60
    warm = time.monotonic() + minutes * 60 * WARM_SHARE
    outcomes: Counter[str] = Counter()
    defects: list[BaseException] = []
    with local.running_on_free_ports() as services:
        processes = [
            Watched(name if number == 0 else f"{name} engine", process)
            for name, service in services.items()
            for number, process in enumerate(
                [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
            )
        ]
        async with inkwell.AsyncClient(services["gateway"].address, timeout_s=60) as client:

            async def caller(chance: random.Random) -> None:
                while time.monotonic() < end:
                    call = chance.choices(*zip(*CALLS, strict=True))[0]
                    name = call.__name__.removeprefix("_")
                    try:
                        await call(client, chance)
                        outcomes[name] += 1
                    except EXPECTED as error:
                        outcomes[f"{name}: {type(error).__name__}"] += 1
                    except Exception as error:  # noqa: BLE001 - counted, and shown at the end
                        defects.append(error)
                    await asyncio.sleep(chance.expovariate(1 / PAUSE_S))

            callers = [asyncio.create_task(caller(random.Random(number))) for number in range(CALLERS)]
            while time.monotonic() < end:
                await asyncio.sleep(LOOK_S)
                if time.monotonic() > warm:
                    for watched in processes:
                        watched.look()
                    if len(processes[0].files) % SAID_EVERY == 1:
                        print("  " + ", ".join(watched.said() for watched in processes), flush=True)
            await asyncio.gather(*callers)
            busy_s = sum(sum(watched.process.cpu_times()[:2]) for watched in processes)
    print(f"  {sum(outcomes.values())} calls; the processes worked for {busy_s:.0f} s of {minutes * 60:.0f}")
    for name, count in sorted(outcomes.items()):
        print(f"  {count:7} {name}")
    for defect in defects[:5]:
        print(f"  defect: {defect!r}")
    bars = {"calls that ended otherwise": at_most(len(defects), 0)}
    for watched in processes:
        first, last = watched.resident[0] >> 20, watched.resident[-1] >> 20
        print(f"  {watched.name}: {first} → {last} MiB, {watched.files[0]} → {watched.files[-1]} files")
        bars[f"{watched.name}: RSS at the end / after warm-up"] = at_most(watched.growth(), 1.03)
        bars[f"{watched.name}: more open files"] = at_most(watched.more_files(), 0)
    return bars


Call = Callable[[inkwell.AsyncClient, random.Random], Awaitable[Any]]


async def _read(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await client.read(chance.choice(IMAGES), beam_width=chance.choice((1, 1, 4)))


async def _read_and_leave(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await _leave(client.read_stream(chance.choice(IMAGES)), chance)


async def _paint(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await client.paint("grinning face", steps=chance.randint(1, 4), seed=chance.randrange(1000))


async def _paint_and_leave(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await _leave(client.paint_stream("red heart", steps=50), chance)


async def _leave(events: AsyncGenerator[Any, None], chance: random.Random) -> None:
    left = chance.randint(0, 4)
    async with contextlib.aclosing(events):
        async for _ in events:
            left -= 1
            if left < 0:
                return


async def _cancelled(client: inkwell.AsyncClient, chance: random.Random) -> None:
    task = asyncio.create_task(client.read(chance.choice(IMAGES)))
    await asyncio.sleep(chance.uniform(0, 0.05))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _hurried(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await client.read(chance.choice(IMAGES), timeout_s=chance.uniform(0.005, 0.05))


async def _broken_image(client: inkwell.AsyncClient, chance: random.Random) -> None:
    image = bytearray(chance.choice(IMAGES))
    for _ in range(chance.randint(1, 20)):
        image[chance.randrange(len(image))] ^= 1 << chance.randrange(8)
    await client.read(bytes(image))


async def _unknown_model(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await client.read(chance.choice(IMAGES), model=f"nobody-{chance.randrange(1000)}")


async def _wrong_field(client: inkwell.AsyncClient, chance: random.Random) -> None:
    await client.paint("x", steps=chance.choice((0, -1, 10_000)), width=chance.choice((63, 64)))


async def _listed(client: inkwell.AsyncClient, _chance: random.Random) -> None:
    await client.models()
    await client.fleet()


CALLS: list[tuple[Call, float]] = [
    (_read, 8),
    (_read_and_leave, 3),
    (_paint, 2),
    (_paint_and_leave, 1),
    (_cancelled, 3),
    (_hurried, 2),
    (_broken_image, 3),
    (_unknown_model, 2),
    (_wrong_field, 2),
    (_listed, 1),
]
