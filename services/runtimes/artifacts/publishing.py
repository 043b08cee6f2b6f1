"""How a folder becomes an artifact: visible whole or not at all, once for each recipe."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.runtimes.artifacts import contents
from services.runtimes.artifacts.errors import Reason, StoreError, explained
from services.runtimes.artifacts.leases import Leases
from services.runtimes.artifacts.manifest import Manifest, artifact_id, encode
from services.runtimes.artifacts.place import Place
from services.runtimes.artifacts.stored import Stored

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publishing:
    """The making of artifacts in a place. Every method raises StoreError."""

    place: Place
    leases: Leases
    find_recipe: Callable[[str], Stored | None]
    get: Callable[[str], Stored]

    def staging(self) -> Path:
        """See Store."""
        with explained("starting an artifact", self.place.staging.root):
            return self.place.staging.new()

    def publish(self, staging: Path, manifest: Manifest) -> Stored:
        """See Store."""
        try:
            if not self.place.staging.holds(staging):
                staging = self._copied(staging)
            with explained("reading the new artifact", staging):
                files = contents.files_in(staging)
            if manifest.files and (problems := contents.differences(manifest.files, files)):
                raise StoreError(Reason.INVALID, f"files: {'; '.join(problems[:5])}")
            manifest = msgspec.structs.replace(manifest, files=files)
            contents.check_manifest(manifest)
            return self._publish(staging, manifest)
        finally:
            self.place.staging.discard(staging)

    def _copied(self, folder: Path) -> Path:
        # A rename works within one file system only.
        staging = self.staging()
        try:
            with explained("copying the new artifact", staging):
                for path in contents.paths_in(folder):
                    (staging / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / path, staging / path)
        except BaseException:
            self.place.staging.discard(staging)
            raise
        return staging

    def _publish(self, staging: Path, manifest: Manifest) -> Stored:
        content = encode(manifest)
        new = artifact_id(content)
        existing = self.find_recipe(manifest.recipe)
        if existing is not None:
            return existing
        try:
            with self.leases.publishing(new):
                self.place.prepare(new, staging, manifest.files, content)
                with self.place.locked():
                    existing = self.find_recipe(manifest.recipe)
                    if existing is None:
                        self.place.appear(new, staging, content)
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
            with self.place.locked():
                # Another process may be publishing the very same artifact.
                if all(lease.artifact_id != new for lease in self.leases.live()):
                    self.place.abandon(new)
        except StoreError as error:
            log.warning("what was brought to %s of an artifact is left to `collect`: %s", self.place.where, error)
