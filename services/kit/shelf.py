"""Which calls with an id are under way or were answered of late: bounded in count, bytes and age.

Pure bookkeeping without a clock of its own, threads or asyncio, so that its rules can be tested as properties.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.kit import faults

Call = TypeVar("Call")


@dataclass(eq=False)
class Entry(Generic[Call]):
    """One call under the name of its caller and its id."""

    key: tuple[str, str]
    digest: bytes  # of what was asked
    call: Call
    bytes_held: int = 0
    ended_at: float | None = None  # None while it is under way
    kept: bool = True  # whether it still stands on the shelf


class Shelf(Generic[Call]):
    """Calls by their id.

    count_limit: calls that stand here, those under way included. bytes_limit: bytes of their answers. keep_s: seconds
    for which one stands here after its end. What is over a limit leaves: those that ended first, then the one that is
    put up or has grown. A call that left runs on, and is not found any more.
    """

    def __init__(self, *, count_limit: int, bytes_limit: int, keep_s: float, clock: Callable[[], float]) -> None:
        self._count_limit = count_limit
        self._bytes_limit = bytes_limit
        self._keep_s = keep_s
        self._clock = clock
        self._entries: dict[tuple[str, str], Entry[Call]] = {}
        self._ended: dict[Entry[Call], None] = {}  # in the order of their end
        self.bytes_held = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, caller: str, request_id: str, digest: bytes, *, field: str) -> Entry[Call] | None:
        """The call to which that caller gave this id; None if there is none.

        Raises Fault (INVALID_ARGUMENT, REQUEST_ID_REUSED) naming `field` if something else was asked under it.
        """
        self._expire()
        entry = self._entries.get((caller, request_id))
        if entry is not None and entry.digest != digest:
            raise faults.invalid_field(
                field,
                f"{request_id} was used for another request; use a new UUID, or send the same request again",
                reason="REQUEST_ID_REUSED",
            )
        return entry

    def put(self, caller: str, request_id: str, digest: bytes, call: Call) -> Entry[Call]:
        """Put up a call that begins, under an id that `find` did not find."""
        entry = Entry((caller, request_id), digest, call)
        self._entries[entry.key] = entry
        self._make_room(entry)
        return entry

    def grow(self, entry: Entry[Call], byte_count: int) -> None:
        """Its answer takes so many bytes more."""
        if entry.kept:
            entry.bytes_held += byte_count
            self.bytes_held += byte_count
            self._make_room(entry)

    def end(self, entry: Entry[Call]) -> None:
        """It was answered; from now on it ages."""
        if entry.kept:
            entry.ended_at = self._clock()
            self._ended[entry] = None
            self._expire()

    def remove(self, entry: Entry[Call]) -> None:
        """Forget it; nothing if it left before."""
        if entry.kept:
            entry.kept = False
            self.bytes_held -= entry.bytes_held
            self._ended.pop(entry, None)
            del self._entries[entry.key]

    def _expire(self) -> None:
        now = self._clock()
        while (first := next(iter(self._ended), None)) is not None:
            if first.ended_at is None or now - first.ended_at < self._keep_s:
                return
            self.remove(first)

    def _make_room(self, newest: Entry[Call]) -> None:
        while len(self._entries) > self._count_limit or self.bytes_held > self._bytes_limit:
            # Callers that wait for an answer come before those that have theirs.
            self.remove(next(iter(self._ended), newest))
