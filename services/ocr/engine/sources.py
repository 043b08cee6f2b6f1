"""Where a model is run from: its checkpoint on torch, or an artifact that the compiler made of it."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from services.kit import faults
from services.kit.faults import Fault
from services.ocr.domain import LoadJob, Precision, Runtime
from services.ocr.settings import Settings
from services.runtimes import int8_folder, torch_trocr
from services.runtimes.artifacts.choice import ChoiceError, choose
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.store import Store, Stored, open_store
from services.runtimes.artifacts.user_folders import cache_folder
from services.runtimes.graph_trocr import GraphTrocr, open_graphs
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import SessionOptions


@dataclass(frozen=True)
class Wanted:
    """How a model is to be run; None and "" leave it to the settings."""

    precision: Precision | None = None
    runtime: Runtime | None = None
    artifact: str = ""

    @classmethod
    def by(cls, job: LoadJob) -> "Wanted":
        """As a LoadJob asks."""
        return cls(job.precision, job.runtime, job.artifact)


@dataclass(frozen=True)
class Source:
    """What a model is run from. stored: None for the checkpoint itself, on torch."""

    precision: Precision
    stored: Stored | None = None

    @property
    def artifact(self) -> str:
        """The artifact's id; "" for the checkpoint."""
        return self.stored.id if self.stored else ""


@dataclass
class Opened:
    """An artifact in use, held against deletion until it is closed."""

    networks: GraphTrocr
    helpers: Path  # folder of the checkpoint's files but its weights
    holding: ExitStack

    def close(self) -> None:
        """Free its memory, and let others delete it."""
        self.networks.close()
        self.holding.close()


def torch_only(wanted: Wanted, settings: Settings) -> bool:
    """Whether no artifact can be meant, so that none needs to be looked for."""
    return not wanted.artifact and (wanted.runtime or settings.runtime) == "torch"


def on_device(hardware: Hardware, settings: Settings) -> Hardware:
    """The hardware, or what of it the setting `device` names."""
    if settings.device == "auto":
        return hardware
    family = settings.device.partition(":")[0]
    # ROCm's devices are called cuda too.
    same = family == hardware.device.partition(":")[0]
    return replace(hardware, label=hardware.label if same else family, device=settings.device)


def find(name: str, folder: Path, wanted: Wanted, settings: Settings, hardware: Hardware) -> Source:
    """What to run the checkpoint in the folder from.

    Raises Fault for what was asked for and cannot be. Where nothing was asked for, a store that cannot be reached is
    told of on stderr and torch runs the model.
    """
    precision = wanted.precision or settings.precision
    runtime = wanted.runtime or settings.runtime
    stored = None
    if not torch_only(wanted, settings):
        try:
            stored = _chosen(name, folder, wanted, settings, on_device(hardware, settings))
        except ChoiceError as error:
            raise faults.failed_precondition("ARTIFACT_UNUSABLE", str(error), model=name) from error
        except StoreError as error:
            if wanted.artifact or runtime != "auto":
                raise _store_fault(error, wanted) from error
            print(f"{name} is run on torch, as the artifact store cannot be read: {error}", file=sys.stderr)
    if stored is not None:
        _check_asked(stored, wanted)
        return Source(stored.manifest.precision, stored)
    if precision == "int4_weight_only":
        raise faults.failed_precondition(
            "ARTIFACT_NEEDED",
            f"model {name}: torch does not compute int4_weight_only; compile an artifact (inkwell compile {name} --to"
            " openvino --precision int4_weight_only), or ask for int8_weight_only",
            model=name,
        )
    made_for = int8_folder.precision_of(folder) if precision == "auto" else None
    return Source(made_for or torch_trocr.choose_precision(precision, hardware))


def open_source(name: str, stored: Stored, settings: Settings, hardware: Hardware) -> Opened:
    """Fetch an artifact if it is not here, and open it. Raises StoreError, SessionError, CheckpointError."""
    manifest = stored.manifest
    options = SessionOptions(
        on_device(hardware, settings),
        threads=settings.threads,
        allow_16_bit=manifest.precision in ("bfloat16", "float16"),
        cache_folder=cache_folder() / "sessions",
        triton_address=settings.triton_address,
        triton_timeout_s=settings.triton_timeout_s,
        triton_shared_memory=settings.triton_shared_memory,
    )
    with ExitStack() as holding:
        store = open_store(settings.artifact_store)
        holding.enter_context(store.hold(stored.id, f"OCR service, model {name}"))
        folder = store.local_folder(stored.id)
        networks = open_graphs(folder, manifest, options)
        return Opened(networks, folder / manifest.model_folder, holding.pop_all())


def _chosen(name: str, folder: Path, wanted: Wanted, settings: Settings, hardware: Hardware) -> Stored | None:
    store = open_store(settings.artifact_store)
    runtime = wanted.runtime or settings.runtime
    if runtime == "auto" and not wanted.artifact and not _has_any(store, name):
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
        runtime=runtime,
        precision=wanted.precision or settings.precision,
        artifact=wanted.artifact,
    )


def _has_any(store: Store, name: str) -> bool:
    return store.used(name) is not None or bool(store.find(kind="trocr"))


def _check_asked(stored: Stored, wanted: Wanted) -> None:
    """An artifact that was named decides on precision and runtime; what was asked besides has to agree."""
    for field, asked, has in (
        ("precision", wanted.precision, stored.manifest.precision),
        ("runtime", wanted.runtime, stored.manifest.runtime),
    ):
        if wanted.artifact and asked and asked != has:
            raise faults.invalid_field(field, f"artifact {stored.id[:12]} has {has}, not {asked}; leave it out")


def store_fault(error: StoreError) -> Fault:
    """A store's error as a caller is told of it."""
    if error.reason is Reason.UNAVAILABLE:
        return faults.unavailable("ARTIFACT_STORE_UNAVAILABLE", str(error), retry_after_ms=5000)
    return faults.failed_precondition("ARTIFACT_UNUSABLE", str(error))


def _store_fault(error: StoreError, wanted: Wanted) -> Fault:
    if wanted.artifact and error.reason is Reason.NOT_FOUND:
        data = faults.FaultData(
            faults.Kind.NOT_FOUND,
            "ARTIFACT_NOT_FOUND",
            f"artifact: {error}",
            fields=(faults.FieldViolation("artifact", str(error)),),
            resource=faults.Resource("artifact", wanted.artifact),
        )
        return Fault(data)
    if wanted.artifact and error.reason in (Reason.AMBIGUOUS, Reason.INVALID):
        return faults.invalid_field("artifact", str(error))
    return store_fault(error)
