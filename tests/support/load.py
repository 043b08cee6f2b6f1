"""Callers that make one call after the other until they are told to stop."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Callers:
    """`call` is given the number of the call and raises if it failed; a caller goes on after that.

    seconds: how long each call took that did not fail, in the order of their ends.
    """

    call: Callable[[int], Awaitable[None]]
    done: int = 0
    failures: list[BaseException] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stopping: bool = False
    _begun: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, count: int) -> "Callers":
        """That many callers."""
        self._tasks = [asyncio.create_task(self._go_on()) for _ in range(count)]
        return self

    def failed(self) -> str:
        """The failures, for people."""
        return f"{len(self.failures)} failed: " + "; ".join(sorted({str(error)[:300] for error in self.failures}))

    async def more(self, count: int) -> None:
        """Return when `count` more calls have ended."""
        wanted = self.done + count
        while self.done < wanted:
            self._ended.clear()
            await self._ended.wait()

    async def stop(self) -> None:
        """Let each finish the call it is in."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _go_on(self) -> None:
        while not self._stopping:
            self._begun += 1
            began = time.monotonic()
            try:
                await self.call(self._begun)
                self.seconds.append(time.monotonic() - began)
            except Exception as error:  # noqa: BLE001 - counted, and shown by the test
                self.failures.append(error)
            self.done += 1
            self._ended.set()
