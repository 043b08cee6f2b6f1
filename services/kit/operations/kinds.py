"""The vocabulary of operations: kinds of work, what they say as they go on, and how they end."""

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
from google.protobuf.message import Message

from services.kit.faults import FaultData

Request = TypeVar("Request", bound=msgspec.Struct)
Response = TypeVar("Response", bound=msgspec.Struct)


# --- events: written down once, in order, and told to every watcher ---


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """It waits; `position` operations stand before it. Said by Operations itself."""

    position: int


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Work on it begins, or begins again after a process was lost. Said by the work, which knows what runs it."""

    hardware: str = ""
    runtime: str = ""
    model: str = ""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """`step` of `step_count` (both from 1) is done; the end is estimated to come in `eta_ms` (0: unknown)."""

    step: int
    step_count: int
    eta_ms: int = 0
    stage: str = ""
    note: str = ""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """It ended; always the last event. How it ended stands in the operation's outcome."""


Event: TypeAlias = Queued | Started | Progress | Done


# --- outcomes ---


class Succeeded(msgspec.Struct, frozen=True, tag="succeeded"):
    """`response`: the kind's response struct as JSON."""

    response: msgspec.Raw


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why there is no response."""

    fault: FaultData


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """Somebody cancelled it."""


Outcome: TypeAlias = Succeeded | Failed | Cancelled


class State(enum.StrEnum):
    """Where an operation stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True)
class Operation:
    """An operation as it stands at one moment. Times are seconds since 1970.

    name: "operations/<service>/<uuid>". sequence: number of its last event, 0 before the first.
    """

    name: str
    id: str
    kind: str
    owner: str
    request: msgspec.Struct
    state: State
    created_at: float
    ended_at: float | None
    sequence: int
    outcome: Outcome | None

    @property
    def done(self) -> bool:
        """Whether it has ended, however it did."""
        return self.outcome is not None


Say: TypeAlias = Callable[[Started | Progress], Awaitable[None]]
"""Writes an event down; once awaited, it survives the process."""


@dataclass(frozen=True)
class Running:
    """What work is told of the operation that it is. attempt: 1 for the first run, counted up after a lost process."""

    name: str
    id: str
    attempt: int


Work: TypeAlias = Callable[[Request, Say, Running], Awaitable[Response]]
"""Does it: `async def work(request, say, running) -> response`.

It is cancelled (asyncio.CancelledError) when the operation is cancelled, when the service drains, and when another
process has taken the operation over; it must then end at once what it began, child processes and files included. It
fails by raising Fault; any other exception is a defect. After a process was lost it is called anew with the same
request. Should it have reached its end just before, but before that was written down, it is called once more: what it
leaves behind must be found by the next run, as a store that is addressed by content finds it.
"""


@dataclass(frozen=True)
class Kind(Generic[Request, Response]):
    """One kind of work that a service offers as operations.

    name: such as "compile"; it is written down, so it never changes. request, response: structs that go to JSON and
    back. metadata_message, response_message: the protobuf messages that google.longrunning.Operation carries.
    """

    name: str
    request: type[Request]
    response: type[Response]
    work: Work[Request, Response]
    metadata_message: Callable[[Request], Message]
    response_message: Callable[[Response], Message]


AnyKind: TypeAlias = Kind[Any, Any]
