"""A small real engine for tests of the kit: a job counts to `count`, one number a step, and can misbehave on cue.

Counting can be held at a number until a file appears, so that tests act at a known moment without sleeping.
"""

import os
import sys
import time
from pathlib import Path

import msgspec

from services.kit import faults, phases, wire
from services.kit.engine_api import Accepted, Cancelled, Failed, Finished, JobEvent, Raw, Update, at_end


class Count(msgspec.Struct):
    """A job: count to `count`. `hold_at` waits at that number until the file `release` exists.

    step_ms: what one step takes for all jobs in it together, without the processor, as on a device of its own.
    """

    count: int = 3
    hold_at: int = 0
    release: str = ""
    step_ms: float = 0.0
    crash_at: int = 0
    stall_at: int = 0
    refuse: bool = False
    fail_at: int = 0
    garble_at: int = 0


class Number(msgspec.Struct):
    value: int
    pid: int


class Info(msgspec.Struct):
    name: str


class CountingEngine:
    def __init__(self) -> None:
        self._jobs: dict[str, tuple[Count, int]] = {}
        self._pending: list[JobEvent] = []

    def info(self) -> msgspec.Struct:
        return Info("counting")

    def submit(self, job: str, payload: Raw) -> None:
        count = msgspec.msgpack.decode(payload, type=Count)
        if count.refuse:
            raise faults.invalid_field("count", "the engine was told to refuse this")
        self._jobs[job] = (count, 0)
        self._pending.append(Accepted(job))

    def cancel(self, job: str) -> None:
        if self._jobs.pop(job, None) is not None:
            self._pending.append(Cancelled(job))

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._pending)

    def step(self) -> list[JobEvent]:
        events, self._pending = self._pending, []
        if takes_ms := max((count.step_ms for count, _ in self._jobs.values()), default=0.0):
            time.sleep(takes_ms / 1000)
        for job, (count, value) in list(self._jobs.items()):
            if value + 1 == count.hold_at and not Path(count.release).exists():
                time.sleep(0.002)  # busy, like a model that takes its time
                continue
            value += 1
            if value == count.crash_at:
                os._exit(9)
            if value == count.garble_at:
                os.write(int(sys.argv[2]), b"\x03\x00\x00\x00\xc1\xc1\xc1")  # a frame that is no event
            if value == count.stall_at:
                time.sleep(3600)
            if value == count.fail_at:
                del self._jobs[job]
                events.append(Failed(job, faults.internal("told to fail").data))
                continue
            self._jobs[job] = (count, value)
            phases.enter(job, "count")
            phases.step(job, number=value)
            number = wire.raw(Number(value, os.getpid()))
            events.append(Update(job, number))
            if value >= count.count:
                del self._jobs[job]
                events.append(Finished(job, number))
        return events


def create_engine(settings_json: str) -> CountingEngine:
    """An engine that leaves a file of its end where the variable COUNTING_END says."""
    if "COUNTING_END" in os.environ:
        at_end(Path(os.environ["COUNTING_END"]).touch)
    return CountingEngine()


def create_broken_engine(settings_json: str) -> CountingEngine:
    """An engine whose model is not there."""
    raise FileNotFoundError("model.safetensors")
