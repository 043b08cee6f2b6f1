"""Leases: who runs an artifact right now.

A lease is a note in the store that its holder renews and that counts for a set time after the last renewal: a holder
that died without a word keeps an artifact no longer than that, whichever machine it was on.
"""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import msgspec

from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.place import LEASES, Note, Place

log = logging.getLogger(__name__)

# Six renewals may fail in a row, as when an S3 restarts, before a lease counts as its holder's death.
_RENEWALS = 6


# Of this process.
_everywhere: "WeakSet[Leases]" = WeakSet()


def end_all() -> None:
    """Ends all leases of this process, which is about to end; on any thread. Never raises."""
    for leases in list(_everywhere):
        for name in leases.own():
            leases.end(name)


class Lease(msgspec.Struct, frozen=True):
    """The content of a lease."""

    artifact_id: str
    holder: str  # for people: "OCR service on ocr-cpu-3"
    since: float  # by the place's clock
    publishing: bool = False  # the artifact is only coming into being


def _read(name: str, note: Note) -> Lease:
    try:
        return msgspec.json.decode(note.content, type=Lease)
    except msgspec.DecodeError:
        # Damaged, or of a newer version: what it is for stands in its name, and it keeps that like any other.
        return Lease(name.partition("-")[0], "somebody unknown", note.changed_at)


class Leases:
    """The leases of a place, and the renewing of this process's own."""

    def __init__(self, place: Place, seconds: float) -> None:
        self._place = place
        self._seconds = seconds
        self._own: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._renewer: threading.Thread | None = None
        _everywhere.add(self)

    def live(self) -> list[Lease]:
        """The leases that count."""
        oldest = self._place.now() - self._seconds
        return [_read(name, note) for name, note in self._place.notes(LEASES).items() if note.changed_at >= oldest]

    def write(self, artifact_id: str, holder: str, *, publishing: bool = False) -> str:
        """A new lease, renewed by a thread until `end`; answers with its name. Call it with the place locked."""
        name = f"{artifact_id}-{secrets.token_hex(8)}"
        content = msgspec.json.encode(Lease(artifact_id, holder, self._place.now(), publishing))
        self._place.write_note(LEASES, name, content)
        with self._changed:
            self._own[name] = content
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._keep_renewing, name="artifact leases", daemon=True)
                self._renewer.start()
        return name

    def own(self) -> list[str]:
        """The names of this process's leases."""
        with self._changed:
            return list(self._own)

    def end(self, name: str) -> None:
        """Ends a lease of this process. Never raises: one that cannot be removed now ends by its age."""
        with self._changed:
            self._own.pop(name, None)
            self._changed.notify_all()
        try:
            self._place.remove_note(LEASES, name)
        except StoreError as error:
            log.warning("a lease in %s is left to end by its age: %s", self._place.where, error)

    @contextmanager
    def publishing(self, artifact_id: str) -> Iterator[None]:
        """A lease for as long as an artifact is being published."""
        with self._place.locked():
            name = self.write(artifact_id, "a publish under way", publishing=True)
        try:
            yield
        finally:
            self.end(name)

    def renew(self) -> None:
        """Renews all of this process's leases. Never raises."""
        with self._changed:
            own = dict(self._own)
        for name, content in own.items():
            try:
                self._place.renew_note(LEASES, name, content)
            except StoreError as error:
                log.warning("a lease in %s could not be renewed: %s", self._place.where, error)
                continue
            with self._changed:
                ended = name not in self._own
            if ended:  # while it was renewed
                self.end(name)

    def remove_stale(self) -> None:
        """Removes leases that no longer count. Call it with the place locked."""
        oldest = self._place.now() - self._seconds
        for name, note in self._place.notes(LEASES).items():
            if note.changed_at < oldest:
                self._place.remove_note(LEASES, name)

    def _keep_renewing(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._own, timeout=self._seconds / _RENEWALS)
                if not self._own:
                    self._renewer = None
                    return
            try:
                self.renew()
            except Exception:  # noqa: BLE001 - without this thread every lease would end
                log.exception("renewing leases in %s failed", self._place.where)
