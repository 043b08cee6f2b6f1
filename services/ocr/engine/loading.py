"""Loading one model in two parts, either of which may take long: looking at its checkpoint, and reading and warming it.

Both may run on any thread while other models read.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.kit import faults
from services.kit.faults import Fault
from services.ocr import catalog
from services.ocr.domain import ModelInfo
from services.ocr.engine import memory, model, sources
from services.ocr.engine.embedding import Embedder
from services.ocr.engine.lane import Lane
from services.ocr.engine.model import ReadingModel
from services.ocr.engine.sources import Source, Wanted
from services.ocr.engine.warming import warm
from services.ocr.settings import Settings
from services.runtimes import checkpoints, safetensors_files
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.checkpoints import CheckpointError, CheckpointMissingError
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import HardwareMissingError, SessionError


@dataclass
class Desk:
    """A loaded model and the jobs in it."""

    lane: Lane
    embedder: Embedder
    source: Source
    last_used: int = 0
    # Jobs that come from now on wait for the model to be loaded again: it has to leave.
    closing: bool = False
    unloaders: list[str] = field(default_factory=list)  # UnloadJobs that wait for it to leave

    @property
    def info(self) -> ModelInfo:
        """What callers see of the model."""
        return self.lane.model.info

    def close(self) -> None:
        """Free what it holds outside of Python's memory; it may not be used after it."""
        self.lane.model.close()

    @property
    def idle(self) -> bool:
        """Whether no job is in it."""
        return not (self.lane.busy or self.embedder.busy)


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was looked at: where it lies, what it is run from, and the memory that loading it takes."""

    folder: Path
    source: Source
    needed_bytes: int


@dataclass(frozen=True)
class Loader:
    """Loads models by the names they are known by."""

    settings: Settings
    hardware: Hardware

    def check(self, name: str, wanted: Wanted) -> Checked:
        """Fetch a checkpoint if it is not here yet, and see what it is run from and needs.

        Raises CheckpointError, and Fault for an artifact or runtime that was asked for and cannot be had.
        """
        known = catalog.known_models(self.settings).get(name)
        if known is None:
            raise CheckpointMissingError("there is no such model any more")
        pickles = self.settings.allow_pickled_weights
        folder = checkpoints.fetch(checkpoints.resolve(known.source), allow_pickled_weights=pickles)
        checkpoints.read_config(folder)
        checkpoints.require_weights(folder, allow_pickled_weights=pickles)
        source = sources.find(name, folder, wanted, self.settings, self.hardware)
        if source.stored is not None:
            return Checked(folder, source, source.stored.manifest.weight_bytes)
        try:
            count = safetensors_files.number_count_in(folder)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        # The size of a pickle is that of its numbers, float32 in all older checkpoints.
        needed = catalog.file_bytes(folder) if count is None else memory.needed_bytes(count, source.precision)
        return Checked(folder, source, needed)

    def read(self, name: str, checked: Checked, *, when_read: Callable[[], None] = lambda: None) -> Desk:
        """Read the weights, call `when_read`, and warm the model; raises what `fault_of` knows."""
        settings = self.settings
        reading = model.load(name, checked.folder, source=checked.source, settings=settings, hardware=self.hardware)
        when_read()
        try:
            return self._warmed(reading, checked)
        except BaseException:
            reading.close()
            raise

    def _warmed(self, reading: ReadingModel, checked: Checked) -> Desk:
        settings, networks = self.settings, reading.networks
        step_s = settings.encoder_step_ms / 1000
        batch_size = min(settings.encoder_batch_size, networks.image_limit)
        desk = Desk(
            Lane(
                model=reading,
                max_rows=min(settings.max_rows, networks.row_limit),
                encoder_batch_size=batch_size,
                encoder_step_s=step_s,
                encoder_wait_s=settings.encoder_wait_ms / 1000,
                detect_blank=settings.detect_blank,
            ),
            Embedder(reading, batch_size=batch_size, step_s=step_s),
            source=checked.source,
        )
        warm(desk.lane)
        return desk


def fault_of(name: str, error: BaseException) -> Fault:
    """Why a model could not be loaded, as its callers are told."""
    match error:
        case Fault():
            return error
        case CheckpointMissingError():
            return Fault(
                faults.FaultData(
                    faults.Kind.NOT_FOUND,
                    "MODEL_FILES_NOT_FOUND",
                    f"model {name}: {error}",
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
            return sources.store_fault(error)
        case CheckpointError():
            return faults.failed_precondition("MODEL_UNUSABLE", f"model {name}: {error}", model=name)
        case MemoryError() | torch.OutOfMemoryError():
            return faults.overloaded(
                "MODEL_MEMORY_FULL",
                f"model {name}: the machine had no memory left for it; unload another or lower memory_limit_bytes",
                retry_after_ms=5000,
                model=name,
            )
        case _:
            traceback.print_exception(error)
            return faults.internal(f"loading model {name} failed in an unforeseen way; the service's log has more")
