"""Where a model is run from: its checkpoint on torch, or an artifact that the compiler made of it."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.diffusion.domain import LoadJob, Runtime
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.faults import Fault
from services.runtimes.artifacts.choice import ChoiceError, choose
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.store import Store, Stored, open_store
from services.runtimes.artifacts.user_folders import cache_folder
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import SessionOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """How a model is to be run; None and "" leave it to the settings."""

    runtime: Literal["auto"] | Runtime | None = None
    artifact: str = ""

    @classmethod
    def by(cls, job: LoadJob) -> "Wanted":
        """As a LoadJob asks."""
        return cls(job.runtime, job.artifact)


@dataclass
class InUse:
    """An artifact whose files lie in `folder`, held against deletion until it is closed."""

    stored: Stored
    folder: Path
    options: SessionOptions
    closing: ExitStack

    def close_with(self, close: Callable[[], None]) -> None:
        """Call it first when this is closed."""
        self.closing.callback(close)

    def close(self) -> None:
        """Free what was opened of it, and let others delete it."""
        self.closing.close()


def find(name: str, folder: Path | None, wanted: Wanted, settings: Settings, hardware: Hardware) -> Stored | None:
    """The artifact to run a checkpoint from; None to run it on torch.

    folder: None for a checkpoint that lies in no folder of its own, which the compiler does not take. Raises Fault for
    what was asked for and cannot be. Where nothing was asked for, a store that cannot be reached is logged and torch
    runs the model.
    """
    runtime = wanted.runtime or settings.runtime
    if not wanted.artifact and runtime == "torch":
        return None
    asked = bool(wanted.artifact) or runtime != "auto"
    if folder is None:
        if not asked:
            return None
        raise faults.failed_precondition(
            "ARTIFACT_UNUSABLE",
            f"model {name}: it is a single file, and artifacts are made of diffusers folders; save it as one, or run it"
            " on torch (runtime)",
            model=name,
        )
    try:
        stored = _chosen(name, folder, wanted, settings, hardware, asked=asked)
    except ChoiceError as error:
        raise faults.failed_precondition("ARTIFACT_UNUSABLE", str(error), model=name) from error
    except StoreError as error:
        if asked:
            raise _store_fault(error, wanted) from error
        log.warning("model %s is run on torch, as the artifact store cannot be read: %s", name, error)
        return None
    if stored is not None and wanted.artifact and wanted.runtime not in (None, stored.manifest.runtime):
        has = stored.manifest.runtime
        raise faults.invalid_field("runtime", f"artifact {stored.id[:12]} is for {has}, not {wanted.runtime}")
    return stored


def hold(stored: Stored, settings: Settings, hardware: Hardware, holder: str) -> InUse:
    """Fetch an artifact if it is not here. holder: for people, who asks what keeps it. Raises StoreError."""
    with ExitStack() as closing:
        store = open_store(settings.artifact_store)
        closing.enter_context(store.hold(stored.id, holder))
        options = SessionOptions(
            hardware,
            threads=settings.threads,
            allow_16_bit=stored.manifest.precision in ("bfloat16", "float16"),
            cache_folder=cache_folder() / "sessions",
            triton_address=settings.triton_address,
            triton_timeout_s=settings.triton_timeout_s,
            triton_shared_memory=settings.triton_shared_memory,
        )
        return InUse(stored, store.local_folder(stored.id), options, closing.pop_all())


def store_fault(error: StoreError) -> Fault:
    """A store's error as a caller is told of it."""
    if error.reason is Reason.UNAVAILABLE:
        return faults.unavailable("ARTIFACT_STORE_UNAVAILABLE", str(error), retry_after_ms=5000)
    return faults.failed_precondition("ARTIFACT_UNUSABLE", str(error))


def _chosen(
    name: str, folder: Path, wanted: Wanted, settings: Settings, hardware: Hardware, *, asked: bool
) -> Stored | None:
    store = open_store(settings.artifact_store)
    if not asked and not _has_any(store, name):
        # Hashing a large checkpoint takes seconds.
        return None
    try:
        digest = digest_of(folder)
    except OSError as error:
        raise ChoiceError(f"model {name}: its checkpoint cannot be read: {error}") from error
    return choose(
        store,
        digest,
        model=name,
        hardware=hardware,
        runtime=wanted.runtime or settings.runtime,
        precision=settings.dtype,
        artifact=wanted.artifact,
    )


def _has_any(store: Store, name: str) -> bool:
    return store.used(name) is not None or bool(store.find(kind="diffusion"))


def _store_fault(error: StoreError, wanted: Wanted) -> Fault:
    if wanted.artifact and error.reason is Reason.NOT_FOUND:
        return Fault(
            faults.FaultData(
                faults.Kind.NOT_FOUND,
                "ARTIFACT_NOT_FOUND",
                f"artifact: {error}",
                fields=(faults.FieldViolation("artifact", str(error)),),
                resource=faults.Resource("artifact", wanted.artifact),
            )
        )
    if wanted.artifact and error.reason in (Reason.AMBIGUOUS, Reason.INVALID):
        return faults.invalid_field("artifact", str(error))
    return store_fault(error)
