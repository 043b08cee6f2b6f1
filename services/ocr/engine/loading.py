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
from services.ocr.domain import ModelInfo, Precision
from services.ocr.engine import memory, model
from services.ocr.engine.embedding import Embedder
from services.ocr.engine.lane import Lane
from services.ocr.engine.warming import warm
from services.ocr.settings import Settings
from services.runtimes import checkpoints, int8_folder, safetensors_files, torch_trocr
from services.runtimes.checkpoints import CheckpointError, CheckpointMissingError
from services.runtimes.hardware import Hardware


@dataclass
class Desk:
    """A loaded model and the jobs in it."""

    lane: Lane
    embedder: Embedder
    last_used: int = 0
    # Jobs that come from now on wait for the model to be loaded again: it has to leave.
    closing: bool = False
    unloaders: list[str] = field(default_factory=list)  # UnloadJobs that wait for it to leave

    @property
    def info(self) -> ModelInfo:
        """What callers see of the model."""
        return self.lane.model.info

    @property
    def idle(self) -> bool:
        """Whether no job is in it."""
        return not (self.lane.busy or self.embedder.busy)


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was looked at: where it lies, and the memory that loading it takes."""

    folder: Path
    needed_bytes: int


@dataclass(frozen=True)
class Loader:
    """Loads models by the names they are known by."""

    settings: Settings
    hardware: Hardware

    def precision(self, name: str, wanted: Precision | None) -> Precision:
        """What is wanted, else what is set, else what the model's folder was made for, else the hardware's best."""
        choice = wanted or self.settings.precision
        known = catalog.known_models(self.settings).get(name) if choice == "auto" else None
        made_for = int8_folder.precision_of(Path(known.source).expanduser()) if known else None
        return made_for or torch_trocr.choose_precision(choice, self.hardware)

    def check(self, name: str, precision: Precision) -> Checked:
        """Fetch a checkpoint if it is not here yet, and see what it needs; raises CheckpointError."""
        known = catalog.known_models(self.settings).get(name)
        if known is None:
            raise CheckpointMissingError("there is no such model any more")
        pickles = self.settings.allow_pickled_weights
        folder = checkpoints.fetch(checkpoints.resolve(known.source), allow_pickled_weights=pickles)
        checkpoints.read_config(folder)
        checkpoints.require_weights(folder, allow_pickled_weights=pickles)
        try:
            count = safetensors_files.number_count_in(folder)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        # The size of a pickle is that of its numbers, float32 in all older checkpoints.
        needed = catalog.file_bytes(folder) if count is None else memory.needed_bytes(count, precision)
        return Checked(folder, needed)

    def read(
        self, name: str, precision: Precision, checked: Checked, *, when_read: Callable[[], None] = lambda: None
    ) -> Desk:
        """Read the weights, call `when_read`, and warm the model; raises CheckpointError."""
        settings = self.settings
        reading = model.load(name, checked.folder, precision=precision, settings=settings, hardware=self.hardware)
        when_read()
        step_s = settings.encoder_step_ms / 1000
        desk = Desk(
            Lane(
                model=reading,
                max_rows=settings.max_rows,
                encoder_batch_size=settings.encoder_batch_size,
                encoder_step_s=step_s,
                encoder_wait_s=settings.encoder_wait_ms / 1000,
                detect_blank=settings.detect_blank,
            ),
            Embedder(reading, batch_size=settings.encoder_batch_size, step_s=step_s),
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
