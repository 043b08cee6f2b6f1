"""The contract between a service's front process and its engine process.

The front (`services.kit.engine_host`) sends commands, the engine process (`services.kit.engine_worker`) answers with
events, both as length-prefixed MessagePack frames over a socket pair. What a job asks for and what it yields belongs
to the service: payloads travel as `msgspec.Raw`, encoded from the structs in the service's own `domain.py`.

No gRPC and no ML library here.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from services.kit.faults import FaultData
from services.kit.phases import Phase

Raw = msgspec.Raw


# --- commands: front to engine ---


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Start a job. Control jobs aside, the front never has more in the engine than it was told there are slots."""

    job: str
    payload: Raw
    traced: bool = False  # somebody wants to know what it goes through


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a job before its next step; the engine answers Cancelled (or Finished, if it was faster)."""

    job: str


Command = Submit | Cancel


# --- events: engine to front ---


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Models are loaded and warm. `info` is the service's own description of them."""

    info: Raw


class Described(msgspec.Struct, tag=True, frozen=True):
    """The engine is no longer what Ready said: a model came or went. `info` replaces the earlier description."""

    info: Raw


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """Compute on the job began."""

    job: str


class Update(msgspec.Struct, tag=True, frozen=True):
    """Something to stream while the job runs: progress, partial text, a preview."""

    job: str
    payload: Raw


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The job's result. Nothing more comes of it, and its slot is free."""

    job: str
    payload: Raw


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The job ended without a result; its neighbours go on, and its slot is free."""

    job: str
    fault: FaultData


class Cancelled(msgspec.Struct, tag=True, frozen=True):
    """The job stopped because the front asked; its slot is free."""

    job: str


class Traced(msgspec.Struct, tag=True, frozen=True):
    """What a traced job went through; the worker sends it right before the job's last event."""

    job: str
    phases: tuple[Phase, ...]


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent every second by a thread of its own, so that a stuck step shows."""

    # How long the step under way has been running, 0 when none is.
    step_seconds: float


JobEvent = Accepted | Update | Finished | Failed | Cancelled
EngineEvent = JobEvent | Described
Event = Ready | Heartbeat | Traced | EngineEvent


# Seconds that an engine process has for its endings.
END_S = 5.0
_endings: list[Callable[[], None]] = []


def at_end(ending: Callable[[], None]) -> None:
    """Have `ending` called once when the engine process is asked to end, or its service is gone.

    For what outlives a process, such as a lease. It is called on another thread while a step may be running, may not
    raise, and has END_S seconds, after which the process ends all the same. One that is killed calls nothing.
    """
    if ending not in _endings:
        _endings.append(ending)


def call_endings() -> None:
    """What the engine process does last."""
    while _endings:
        _endings.pop()()


class Engine(Protocol):
    """What a service implements. All methods are called on one thread, so an engine needs no locks."""

    def info(self) -> msgspec.Struct:
        """Describe the loaded models; encoded into Ready."""

    def submit(self, job: str, payload: Raw) -> None:
        """Take a job in; compute belongs in `step`. May raise Fault, which fails that job alone."""

    def cancel(self, job: str) -> None:
        """Drop a job, so that the next `step` no longer computes it and reports Cancelled. Unknown jobs are ignored."""

    @property
    def busy(self) -> bool:
        """True while `step` has something to do."""

    def step(self) -> Sequence[EngineEvent]:
        """Do one bounded piece of work (a decoding step, a denoising step) and say what came of it.

        Commands are handled between steps, so a step's length is what cancellation waits for. An exception out of
        `step` is a defect that ends the process; what concerns one job only is reported as Failed.
        """


@runtime_checkable
class BackgroundEngine(Engine, Protocol):
    """An engine that also works on threads of its own, such as one that loads a model while it serves with others."""

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Told once, before the first command. `wake` may be called on any thread when `busy` may have become true."""
