"""A small real engine that works on a thread of its own, describes itself anew, and says how often it was stepped."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.kit import wire
from services.kit.engine_api import Accepted, Cancelled, Described, EngineEvent, Finished, Raw


class Learn(msgspec.Struct):
    """A job: wait on another thread until the file `release` exists, then know `word`."""

    word: str
    release: str


class Known(msgspec.Struct):
    words: tuple[str, ...]
    steps: int  # taken since the start


class BackgroundEngine:
    def __init__(self) -> None:
        self._words: list[str] = []
        self._learned: list[tuple[str, str]] = []
        self._jobs: set[str] = set()
        self._pending: list[EngineEvent] = []
        self._wake: Callable[[], None] = lambda: None
        self._steps = 0

    def on_wake(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def info(self) -> Known:
        return Known(tuple(self._words), self._steps)

    def submit(self, job: str, payload: Raw) -> None:
        learn = msgspec.msgpack.decode(payload, type=Learn)
        self._pending.append(Accepted(job))
        self._jobs.add(job)
        threading.Thread(target=self._learn, args=(job, learn), daemon=True).start()

    def _learn(self, job: str, learn: Learn) -> None:
        while not Path(learn.release).exists():
            time.sleep(0.005)
        self._learned.append((job, learn.word))
        self._wake()

    def cancel(self, job: str) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            self._pending.append(Cancelled(job))

    @property
    def busy(self) -> bool:
        return bool(self._pending or self._learned)

    def step(self) -> list[EngineEvent]:
        self._steps += 1
        events, self._pending = self._pending, []
        while self._learned:
            job, word = self._learned.pop()
            self._words.append(word)
            events.append(Described(wire.raw(self.info())))
            if job in self._jobs:
                self._jobs.remove(job)
                events.append(Finished(job, wire.raw(self.info())))
        return events


def create_engine(settings_json: str) -> BackgroundEngine:
    return BackgroundEngine()
