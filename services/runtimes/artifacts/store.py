"""The artifact store: compiled models under the sha-256 of their manifests, in a folder or in S3.

An artifact is visible whole or not at all, whenever a process is killed. What is held or chosen by `use` is never
deleted. Every method raises StoreError (errors.py), whose reason says what kind of failure it is and whose message says
what would help.
"""

import base64
import json
import logging
import math
import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import msgspec

from services.runtimes.artifacts import contents
from services.runtimes.artifacts.errors import Reason, StoreError, explained
from services.runtimes.artifacts.folder import Folder
from services.runtimes.artifacts.leases import Leases
from services.runtimes.artifacts.manifest import (
    FILE_NAME,
    ArtifactPrecision,
    File,
    Kind,
    Manifest,
    Target,
    artifact_id,
    encode,
)
from services.runtimes.artifacts.place import USED, Place
from services.runtimes.artifacts.s3 import Bucket
from services.runtimes.artifacts.user_folders import data_folder

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{8,64}")
PAGE_SIZE_MOST = 200
# In place of an artifact's id: the model is run from its checkpoint.
TORCH = "torch"
# How long a lease counts after its last renewal: an artifact of a holder that was killed can be deleted after it.
LEASE_S = 180.0
# In S3 each is a request.
_MANIFESTS_AT_A_TIME = 16


@dataclass(frozen=True)
class Stored:
    """An artifact in a store."""

    id: str
    manifest: Manifest
    manifest_json: bytes = field(repr=False)
    published_at: float  # by the store's clock, seconds since 1970

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return len(self.manifest_json) + sum(file.size_bytes for file in self.manifest.files)


@dataclass(frozen=True)
class Page:
    """A part of the list of artifacts. next_page_token: "" on the last page."""

    artifacts: tuple[Stored, ...]
    next_page_token: str


@dataclass(frozen=True)
class Collected:
    """What `collect` removed. freed_bytes: of the deleted artifacts, and of what dead processes had left."""

    deleted: tuple[Stored, ...]
    freed_bytes: int


class _Choice(msgspec.Struct, frozen=True):
    """The note that `use` writes."""

    model: str
    artifact_id: str


def default_location() -> str:
    """Where artifacts are kept unless a setting says otherwise: ~/.local/share/inkwell/artifacts."""
    return str(data_folder() / "artifacts")


def open_store(location: str = "", *, lease_s: float = LEASE_S) -> "Store":
    """The store at a location: a folder, or s3://bucket/prefix; "" for `default_location`. Contacts nothing yet.

    S3 takes its endpoint, region and credentials from the usual AWS_* variables (AWS_ENDPOINT_URL for another S3).
    Every process that shares a store needs the same lease_s. Raises StoreError for any other kind of location.
    """
    location = location or default_location()
    scheme, separator, _ = location.partition("://")
    if not separator:
        return Store(Folder(Path(location).expanduser().absolute()), lease_s=lease_s)
    if scheme == "s3":
        return Store(Bucket(location), lease_s=lease_s)
    raise StoreError(
        Reason.INVALID,
        f"artifact store {location!r}: {scheme}:// is not supported; give a folder or s3://bucket/prefix",
    )


class Store:
    """Compiled models, shared by threads, processes and machines."""

    def __init__(self, place: Place, *, lease_s: float = LEASE_S) -> None:
        self._place = place
        self._leases = Leases(place, lease_s)
        self._known: dict[str, tuple[Manifest, bytes]] = {}  # what an id stands for never changes

    @property
    def location(self) -> str:
        """As `open_store` takes it."""
        return self._place.where

    # Finding.

    def find(
        self,
        *,
        model: str = "",
        target: Target | None = None,
        precision: ArtifactPrecision | None = None,
        source_digest: str = "",
        kind: Kind | None = None,
        recipe: str = "",
    ) -> list[Stored]:
        """All artifacts that match, newest first. One that cannot be read is left out, and the log says so."""
        wanted = {
            name: value
            for name, value in (
                ("model", model),
                ("target", target),
                ("precision", precision),
                ("source_digest", source_digest),
                ("kind", kind),
                ("recipe", recipe),
            )
            if value
        }
        ids = self._place.ids()
        with ThreadPoolExecutor(_MANIFESTS_AT_A_TIME) as pool:
            loaded = list(pool.map(self._readable, ids, ids.values()))
        found = []
        for stored in loaded:
            if stored and all(getattr(stored.manifest, name) == value for name, value in wanted.items()):
                found.append(stored)
        return sorted(found, key=_order)

    def page(
        self,
        *,
        page_size: int = 50,
        page_token: str = "",
        model: str = "",
        target: Target | None = None,
        precision: ArtifactPrecision | None = None,
        source_digest: str = "",
        kind: Kind | None = None,
    ) -> Page:
        """A page of `find`. Artifacts that come or go between two pages shift no other to another page.

        page_size: 1 to PAGE_SIZE_MOST. page_token: "" or of the page before with the same filters.
        """
        if not 1 <= page_size <= PAGE_SIZE_MOST:
            raise StoreError(Reason.INVALID, f"page_size: {page_size}; it has to be from 1 to {PAGE_SIZE_MOST}")
        filters = json.dumps([model, target, precision, source_digest, kind])
        found = self.find(model=model, target=target, precision=precision, source_digest=source_digest, kind=kind)
        if page_token:
            last = _read_token(page_token, filters)
            found = [stored for stored in found if _order(stored) > last]
        shown = tuple(found[:page_size])
        return Page(shown, _token(_order(shown[-1]), filters) if len(found) > page_size else "")

    def find_recipe(self, recipe: str) -> Stored | None:
        """The artifact that was made by this recipe."""
        return next(iter(self.find(recipe=recipe)), None)

    def get(self, id_or_prefix: str) -> Stored:
        """The artifact with this id, or with one that begins so: 8 digits or more."""
        wanted = id_or_prefix.lower()
        if not _ID.fullmatch(wanted):
            raise StoreError(
                Reason.INVALID,
                f"artifact id {id_or_prefix[:80]!r}: it has to be the 64 hexadecimal digits of an artifact, or the"
                " first 8 or more of them",
            )
        ids = self._place.ids()
        matching = [one for one in ids if one.startswith(wanted)]
        if len(matching) > 1:
            names = ", ".join(sorted(one[:16] for one in matching))
            raise StoreError(
                Reason.AMBIGUOUS, f"artifact id {wanted}: there is more than one ({names}); give more digits"
            )
        stored = self._load(matching[0], ids[matching[0]]) if matching else None
        if stored is None:
            raise StoreError(Reason.NOT_FOUND, f"there is no artifact {wanted} in {self.location}")
        return stored

    # Reading.

    def local_folder(self, artifact_id: str) -> Path:
        """The artifact's files in a folder of this machine, not to be written to; `hold` it for as long as you read.

        From S3 they are fetched into a cache, each checked by its sha-256 before any is seen.
        """
        stored = self.get(artifact_id)
        return self._place.folder(stored.id, stored.manifest.files, stored.manifest_json)

    def read(self, artifact_id: str, path: str, offset: int = 0) -> Iterator[bytes]:
        """One file's content from an offset on, in pieces of at most a MiB. `manifest.json` is a file like the others.

        Raises at once, not with the first piece, for what the artifact has not.
        """
        stored = self.get(artifact_id)
        if path == FILE_NAME:
            size, pieces = len(stored.manifest_json), iter((stored.manifest_json[offset:],))
        else:
            file = next((file for file in stored.manifest.files if file.path == path), None)
            if file is None:
                raise StoreError(Reason.NOT_FOUND, f"path: artifact {stored.id[:12]} has no file {path[:200]!r}")
            size, pieces = file.size_bytes, self._place.chunks(stored.id, file, offset)
        if not 0 <= offset <= size:
            raise StoreError(Reason.INVALID, f"offset: {offset}; {path} has {size} bytes")
        return pieces if offset < size else iter(())

    def verify(self, artifact_id: str) -> list[str]:
        """Reads every file where it is stored; what is not as the manifest says, a line each. Empty: all is well."""
        stored = self.get(artifact_id)
        problems = []
        for file in stored.manifest.files:
            digest, size = sha256(), 0
            try:
                for chunk in self._place.chunks(stored.id, file, 0):
                    digest.update(chunk)
                    size += len(chunk)
            except StoreError as error:
                if error.reason is not Reason.DAMAGED:
                    raise
                problems.append(str(error))
                continue
            problems += contents.differences([file], [File(file.path, size, digest.hexdigest())])
        return problems

    # Publishing.

    def staging(self) -> Path:
        """An empty folder to make an artifact in. It is removed by `publish` or `discard`; if the process that asked
        for it ends before, by the next `collect`."""
        with explained("starting an artifact", self._place.staging.root):
            return self._place.staging.new()

    def discard(self, staging: Path) -> None:
        """Removes a staging folder, if it is still there. Never raises."""
        self._place.staging.discard(staging)

    def publish(self, staging: Path, manifest: Manifest) -> Stored:
        """Makes the folder's files an artifact. If there is one of the same recipe, that one is the answer.

        staging: from `staging()`, it is gone afterwards whatever comes of it; any other folder is copied.
        manifest.files may be left empty, the store fills it in; else the files have to be as it says.
        """
        try:
            if not self._place.staging.holds(staging):
                staging = self._copied(staging)
            with explained("reading the new artifact", staging):
                files = contents.files_in(staging)
            if manifest.files and (problems := contents.differences(manifest.files, files)):
                raise StoreError(Reason.INVALID, f"files: {'; '.join(problems[:5])}")
            manifest = msgspec.structs.replace(manifest, files=files)
            contents.check_manifest(manifest)
            return self._publish(staging, manifest)
        finally:
            self.discard(staging)

    def _copied(self, folder: Path) -> Path:
        # A rename works within one file system only.
        staging = self.staging()
        try:
            with explained("copying the new artifact", staging):
                for path in contents.paths_in(folder):
                    (staging / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / path, staging / path)
        except BaseException:
            self.discard(staging)
            raise
        return staging

    def _publish(self, staging: Path, manifest: Manifest) -> Stored:
        content = encode(manifest)
        new = artifact_id(content)
        existing = self.find_recipe(manifest.recipe)
        if existing is not None:
            return existing
        try:
            with self._leases.publishing(new):
                self._place.prepare(new, staging, manifest.files, content)
                with self._place.locked():
                    existing = self.find_recipe(manifest.recipe)
                    if existing is None:
                        self._place.appear(new, staging, content)
        except BaseException:
            self._abandon(new)
            raise
        if existing is None:
            return self.get(new)
        if existing.id != new:
            self._abandon(new)
        return existing

    def _abandon(self, new: str) -> None:
        try:
            with self._place.locked():
                # Another process may be publishing the very same artifact.
                if all(lease.artifact_id != new for lease in self._leases.live()):
                    self._place.abandon(new)
        except StoreError as error:
            log.warning("what was brought to %s of an artifact is left to `collect`: %s", self.location, error)

    # Holding, choosing, removing.

    @contextmanager
    def hold(self, artifact_id: str, holder: str) -> Iterator[Stored]:
        """Nobody deletes the artifact within; for `lease_s` longer if this process is killed.

        holder: for people, such as "OCR service". In a store that is read-only or full there is no lease, and the log
        says so.
        """
        name = ""
        try:
            with self._place.locked():
                stored = self.get(artifact_id)
                name = self._leases.write(stored.id, f"{holder} on {socket.gethostname()}")
        except StoreError as error:
            if error.reason not in (Reason.DENIED, Reason.FULL):
                raise
            stored = self.get(artifact_id)
            log.warning("artifact %s is used without a lease, others could delete it: %s", stored.id[:12], error)
        try:
            yield stored
        finally:
            if name:
                self._leases.end(name)

    def use(self, model: str, artifact_id: str) -> None:
        """From now on the model is run from this artifact, wherever that is left to choose; TORCH: from none."""
        if not model:
            raise StoreError(Reason.INVALID, "model: it is empty")
        with self._place.locked():
            chosen = TORCH if artifact_id == TORCH else self.get(artifact_id).id
            self._place.write_note(USED, _note_name(model), msgspec.json.encode(_Choice(model, chosen)))

    def used(self, model: str) -> str | None:
        """The id that `use` was last given for the model, or TORCH."""
        note = self._place.note(USED, _note_name(model))
        if note is None:
            return None
        try:
            return msgspec.json.decode(note, type=_Choice).artifact_id
        except msgspec.DecodeError as error:
            raise StoreError(
                Reason.DAMAGED,
                f"model {model}: what `inkwell use` chose cannot be read from {self.location} ({error}); choose again",
            ) from error

    def unuse(self, model: str) -> bool:
        """Forgets what `use` chose; whether there was something."""
        with self._place.locked():
            there = self._place.note(USED, _note_name(model)) is not None
            self._place.remove_note(USED, _note_name(model))
        return there

    def users(self) -> dict[str, list[str]]:
        """Who keeps each artifact from being deleted, in words; artifacts that nobody does are not in it."""
        found: dict[str, list[str]] = {}
        for note in self._place.notes(USED).values():
            try:
                choice = msgspec.json.decode(note.content, type=_Choice)
            except msgspec.DecodeError as error:  # `used` says so to whom it concerns
                log.warning("a choice in %s cannot be read: %s", self.location, error)
                continue
            if choice.artifact_id != TORCH:
                found.setdefault(choice.artifact_id, []).append(f"chosen for model {choice.model}")
        for lease in self._leases.live():
            found.setdefault(lease.artifact_id, []).append(lease.holder)
        return found

    def delete(self, artifact_id: str) -> int:
        """Removes an artifact that nobody uses; answers with its bytes."""
        with self._place.locked():
            # A damaged one can be deleted too, by its whole id.
            ids = self._place.ids()
            one, size = artifact_id.lower(), 0
            if one in ids:
                try:
                    stored = self._load(one, ids[one])
                    size = stored.size_bytes if stored else 0
                except StoreError as error:
                    log.warning("deleting nevertheless: %s", error)
            else:
                stored = self.get(artifact_id)
                one, size = stored.id, stored.size_bytes
            users = self.users().get(one, [])
            if users:
                raise StoreError(
                    Reason.IN_USE,
                    f"artifact {one[:12]} is in use: {', '.join(users)}; unload it there, or choose another for the"
                    " model",
                )
            self._place.delete(one)
        self._known.pop(one, None)
        return size

    def collect(self, *, keep_newest: int = 1, older_than_s: float = 0.0) -> Collected:
        """Deletes what nobody needs, and what processes that died left behind.

        Kept are: what is in use; of each model, target and precision for each hardware the newest `keep_newest`; what
        is younger than `older_than_s` seconds or than the beginning of any publish under way.
        """
        if keep_newest < 0 or older_than_s < 0:
            raise StoreError(Reason.INVALID, "keep_newest and older_than_s: they have to be 0 or more")
        begun = min((lease.since for lease in self._leases.live() if lease.publishing), default=math.inf)
        youngest = self._place.now() - older_than_s
        seen: dict[tuple[str, ...], int] = {}
        deleted, freed = [], 0
        for stored in self.find():
            about = stored.manifest
            group = (
                about.model,
                about.target,
                about.precision,
                about.requires.hardware,
                about.requires.compute_capability,
            )
            seen[group] = seen.get(group, 0) + 1
            if seen[group] <= keep_newest or stored.published_at > youngest or stored.published_at >= begun:
                continue
            try:
                freed += self.delete(stored.id)
                deleted.append(stored)
            except StoreError as error:
                if error.reason not in (Reason.IN_USE, Reason.NOT_FOUND):
                    raise
        with self._place.locked():
            self._leases.remove_stale()
            freed += self._place.sweep({lease.artifact_id for lease in self._leases.live()})
        return Collected(tuple(deleted), freed)

    def _readable(self, one: str, published_at: float) -> Stored | None:
        try:
            return self._load(one, published_at)
        except StoreError as error:
            if error.reason is not Reason.DAMAGED:
                raise
            log.warning("left out: %s", error)
            return None

    def _load(self, one: str, published_at: float) -> Stored | None:
        if one not in self._known:
            content = self._place.manifest(one)
            if content is None:  # deleted just now
                return None
            self._known[one] = (contents.read_manifest(content, one, self.location), content)
        manifest, content = self._known[one]
        return Stored(one, manifest, content, published_at)


def _order(stored: Stored) -> tuple[float, str]:
    return (-datetime.fromisoformat(stored.manifest.created_at).timestamp(), stored.id)


def _note_name(model: str) -> str:
    name = quote(model, safe="")
    # File names have 255 bytes at most.
    return name if len(name) <= 200 else sha256(model.encode()).hexdigest()


def _token(last: tuple[float, str], filters: str) -> str:
    content = json.dumps([*last, sha256(filters.encode()).hexdigest()[:16]])
    return base64.urlsafe_b64encode(content.encode()).decode()


def _read_token(token: str, filters: str) -> tuple[float, str]:
    try:
        at, last, digest = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        place = (float(at), str(last))
    except (ValueError, TypeError):
        raise StoreError(
            Reason.INVALID, "page_token: it is none that this store gave; leave it empty for the first page"
        ) from None
    if digest != sha256(filters.encode()).hexdigest()[:16]:
        raise StoreError(Reason.INVALID, "page_token: it belongs to other filters; leave it empty for the first page")
    return place
