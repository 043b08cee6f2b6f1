"""What `inkwell use` chose for each model: notes in the store, so that all services that share it hear of them."""

import logging
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

import msgspec

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.place import USED, Place

log = logging.getLogger(__name__)

# In place of an artifact's id: the model is run from its checkpoint.
TORCH = "torch"


class _Choice(msgspec.Struct, frozen=True):
    """A note."""

    model: str
    artifact_id: str


@dataclass(frozen=True)
class Uses:
    """The notes in a place. Every method raises StoreError."""

    place: Place

    def write(self, model: str, artifact_id: str) -> None:
        """Choose an artifact, or TORCH. Call it with the place locked."""
        self.place.write_note(USED, _note_name(model), msgspec.json.encode(_Choice(model, artifact_id)))

    def read(self, model: str) -> str | None:
        """What was chosen last; None for nothing."""
        note = self.place.note(USED, _note_name(model))
        if note is None:
            return None
        try:
            return msgspec.json.decode(note, type=_Choice).artifact_id
        except msgspec.DecodeError as error:
            raise StoreError(
                Reason.DAMAGED,
                f"model {model}: what `inkwell use` chose cannot be read from {self.place.where} ({error}); choose"
                " again",
            ) from error

    def forget(self, model: str) -> bool:
        """Whether there was something to forget. Call it with the place locked."""
        there = self.place.note(USED, _note_name(model)) is not None
        self.place.remove_note(USED, _note_name(model))
        return there

    def artifacts(self) -> dict[str, list[str]]:
        """The chosen artifacts with the models that they were chosen for."""
        found: dict[str, list[str]] = {}
        for note in self.place.notes(USED).values():
            try:
                choice = msgspec.json.decode(note.content, type=_Choice)
            except msgspec.DecodeError as error:  # `read` says so to whom it concerns
                log.warning("a choice in %s cannot be read: %s", self.place.where, error)
                continue
            if choice.artifact_id != TORCH:
                found.setdefault(choice.artifact_id, []).append(choice.model)
        return found


def _note_name(model: str) -> str:
    name = quote(model, safe="")
    # File names have 255 bytes at most.
    return name if len(name) <= 200 else sha256(model.encode()).hexdigest()
