"""Loading one model by its name in two parts, either of which may take long: looking at its files, which may have to be
fetched, and reading and warming it.

Both may run on any thread while other models paint.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.diffusion import catalog
from services.diffusion.engine import artifacts
from services.diffusion.engine.artifacts import Wanted
from services.diffusion.engine.models import LoadedModel, needed_bytes
from services.diffusion.settings import ModelSettings, Settings
from services.kit import faults
from services.kit.faults import Fault
from services.runtimes import diffusion_sources as sources
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.store import Stored
from services.runtimes.diffusion_sources import ModelError, ModelMissingError, Source
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import HardwareMissingError, SessionError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was looked at.

    needed_bytes: memory that its weights take, its other VAEs included. stored: the artifact to run it from; None for
    the checkpoint itself, on torch.
    """

    row: ModelSettings
    source: Source
    needed_bytes: int
    stored: Stored | None = None

    @property
    def artifact(self) -> str:
        """The artifact's id; "" for the checkpoint."""
        return self.stored.id if self.stored is not None else ""


@dataclass(frozen=True)
class Loader:
    """Loads models by the names they are known by.

    warm: paints a first time with a model that was just read; raises ModelError for one that cannot.
    """

    settings: Settings
    hardware: Hardware
    dtype: torch.dtype
    warm: Callable[[LoadedModel], None]

    def check(self, name: str, wanted: Wanted) -> Checked:
        """See what a model is made of, what it is run from and what it needs.

        Raises ModelError, and Fault for an artifact or runtime that was asked for and cannot be had.
        """
        row = catalog.known_models(self.settings).get(name)
        if row is None:
            raise ModelMissingError(f"model {name}: there is no such model any more")
        try:
            source = sources.find(row.source, row.config)
            folder = None if source.file is not None else source.folder
            stored = artifacts.find(name, folder, wanted, self.settings, self.hardware)
            return Checked(row, source, needed_bytes(row, source, self.dtype, stored), stored)
        except ModelError as error:
            raise type(error)(f"model {name}: {error}") from error

    def read(self, name: str, checked: Checked, when_read: Callable[[], None] = lambda: None) -> LoadedModel:
        """Read the weights, call `when_read`, and warm the model; raises what `fault_of` knows."""
        if checked.stored is None:
            compiles = self.settings.torch_compile == "on"
            model = LoadedModel(name, checked.row, self.hardware, self.dtype, checked.source, compiles=compiles)
        else:
            holder = f"diffusion service, model {name}"
            in_use = artifacts.hold(checked.stored, self.settings, self.hardware, holder)
            model = LoadedModel(name, checked.row, self.hardware, torch.float32, in_use=in_use)
        try:
            when_read()
            self.warm(model)
        except BaseException:
            model.close()
            raise
        return model


def fault_of(name: str, error: BaseException) -> Fault:
    """Why a model could not be loaded, as its callers are told."""
    match error:
        case Fault():
            return error
        case ModelMissingError():
            return Fault(
                faults.FaultData(
                    faults.Kind.NOT_FOUND,
                    "MODEL_FILES_NOT_FOUND",
                    str(error),
                    resource=faults.Resource("model", name),
                )
            )
        case HardwareMissingError():
            return faults.failed_precondition("HARDWARE_MISSING", f"model {name}: {error}", model=name)
        case SessionError():
            return faults.failed_precondition(
                "ARTIFACT_UNUSABLE",
                f"model {name}: {error}; compile it again, or run it on torch (runtime)",
                model=name,
            )
        case StoreError():
            return artifacts.store_fault(error)
        case ModelError():
            return faults.failed_precondition("MODEL_UNUSABLE", str(error), model=name)
        case MemoryError() | torch.OutOfMemoryError():
            return faults.overloaded(
                "MODEL_MEMORY_FULL",
                f"model {name}: the machine had no memory left for it; unload another or lower memory_limit_bytes",
                retry_after_ms=5000,
                model=name,
            )
        case _:
            log.error("loading model %s failed", name, exc_info=error)
            return faults.internal(f"loading model {name} failed in an unforeseen way; the service's log has more")
