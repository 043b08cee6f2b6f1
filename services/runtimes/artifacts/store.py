"""The artifact store: compiled models under the sha-256 of their manifests, in a folder or in S3.

An artifact is visible whole or not at all, whenever a process is killed. What is held or chosen by `use` is never
deleted. Every method raises StoreError (errors.py), whose reason says what kind of failure it is and whose message says
what would help.
"""

import json
import logging
import math
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from services.runtimes.artifacts import contents
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.folder import Folder
from services.runtimes.artifacts.leases import Leases
from services.runtimes.artifacts.manifest import (
    FILE_NAME,
    ArtifactPrecision,
    File,
    Kind,
    Manifest,
    Target,
)
from services.runtimes.artifacts.place import Place
from services.runtimes.artifacts.publishing import Publishing
from services.runtimes.artifacts.s3 import Bucket
from services.runtimes.artifacts.stored import PAGE_SIZE_MOST, Page, Stored, check_page_size, order, page_of
from services.runtimes.artifacts.user_folders import data_folder
from services.runtimes.artifacts.uses import TORCH, Uses

__all__ = [
    "LEASE_S",
    "PAGE_SIZE_MOST",
    "TORCH",
    "Collected",
    "Page",
    "Store",
    "Stored",
    "default_location",
    "open_store",
]

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{8,64}")
# How long a lease counts after its last renewal: an artifact of a holder that was killed can be deleted after it.
LEASE_S = 180.0
# In S3 each is a request.
_MANIFESTS_AT_A_TIME = 16


@dataclass(frozen=True)
class Collected:
    """What `collect` removed. freed_bytes: of the deleted artifacts, and of what dead processes had left."""

    deleted: tuple[Stored, ...]
    freed_bytes: int


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
        self._publishing = Publishing(place, self._leases, self.find_recipe, self.get)
        self._uses = Uses(place)
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
        return sorted(found, key=order)

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
        check_page_size(page_size)
        filters = json.dumps([model, target, precision, source_digest, kind])
        found = self.find(model=model, target=target, precision=precision, source_digest=source_digest, kind=kind)
        return page_of(found, page_size, page_token, filters)

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
        return self._publishing.staging()

    def discard(self, staging: Path) -> None:
        """Removes a staging folder, if it is still there. Never raises."""
        self._place.staging.discard(staging)

    def publish(self, staging: Path, manifest: Manifest) -> Stored:
        """Makes the folder's files an artifact. If there is one of the same recipe, that one is the answer.

        staging: from `staging()`, it is gone afterwards whatever comes of it; any other folder is copied.
        manifest.files may be left empty, the store fills it in; else the files have to be as it says.
        """
        return self._publishing.publish(staging, manifest)

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
            self._uses.write(model, chosen)

    def used(self, model: str) -> str | None:
        """The id that `use` was last given for the model, or TORCH."""
        return self._uses.read(model)

    def unuse(self, model: str) -> bool:
        """Forgets what `use` chose; whether there was something."""
        with self._place.locked():
            return self._uses.forget(model)

    def users(self) -> dict[str, list[str]]:
        """Who keeps each artifact from being deleted, in words; artifacts that nobody does are not in it."""
        found = {
            chosen: [f"chosen for model {model}" for model in models]
            for chosen, models in self._uses.artifacts().items()
        }
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
