"""The engine of the OCR service: takes jobs in, lets models and pages have their steps, and says what came of them."""

import sys
from collections.abc import Callable

import msgspec
import torch
from transformers.utils import logging as transformers_logging

from services.kit.engine_api import Cancelled, EngineEvent, Raw, at_end
from services.ocr import catalog
from services.ocr.domain import EmbedJob, EngineInfo, LayoutJob, LoadJob, ReadJob, UnloadJob, Work
from services.ocr.engine.layout import Detector, DetectorMissing
from services.ocr.engine.pages import Pages
from services.ocr.engine.shelf import Shelf
from services.ocr.engine.sources import on_device
from services.ocr.engine.turns import Turns
from services.ocr.settings import MEMORY_SHARE, Settings
from services.runtimes import tuning
from services.runtimes.artifacts import leases
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import detect, free_memory

_work_decoder: msgspec.msgpack.Decoder[Work] = msgspec.msgpack.Decoder(Work)


class OcrEngine:
    """Implements `services.kit.engine_api.BackgroundEngine` for `Work` payloads."""

    def __init__(self, shelf: Shelf, pages: Pages) -> None:
        self.shelf = shelf
        self._pages = pages
        self._turns = Turns()
        self._cancelled: list[EngineEvent] = []

    def on_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called when a model that is being loaded or a page has come a step further."""
        self.shelf.wake = wake
        self._pages.wake = wake

    def info(self) -> EngineInfo:
        """The loaded models."""
        return self.shelf.info()

    @torch.inference_mode()
    def submit(self, job: str, payload: Raw) -> None:
        """Take in an encoded Work; raises Fault for a model that is not known, or a page where none are read."""
        match _work_decoder.decode(payload):
            case ReadJob() | EmbedJob() as work:
                self.shelf.submit(job, work)
            case LoadJob() as work:
                self.shelf.load(job, work)
            case UnloadJob() as work:
                self.shelf.unload(job, work)
            case LayoutJob() as work:
                self._pages.submit(job, work)

    @torch.inference_mode()
    def cancel(self, job: str) -> None:
        """Drop a job; its rows are free at once."""
        if self._pages.cancel(job) or self.shelf.cancel(job):
            self._cancelled.append(Cancelled(job))

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do; what goes on on other threads is no work until it is done."""
        return bool(self._cancelled) or self.shelf.busy or self._pages.busy or any(self.shelf.working())

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        """One encoder micro-batch or one decoding step of whoever has had the least time."""
        events, self._cancelled = self._cancelled, []
        self.shelf.advance()
        events += self.shelf.take_events()
        events += self._pages.take_events()
        if working := list(self.shelf.working()):
            events += self._turns.step(working)
        return events


def create_engine(settings_json: str) -> OcrEngine:
    """Load and warm the models that are wanted at the start; raises CheckpointError when one cannot be used."""
    settings = Settings.model_validate_json(settings_json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    at_end(leases.end_all)
    hardware = detect()
    threads = settings.threads or hardware.core_count
    torch.set_num_threads(threads)
    tuning.start(on_device(hardware, settings), settings.torch_compile)
    device = hardware.device if settings.device == "auto" else settings.device
    limit = settings.memory_limit_bytes or int(MEMORY_SHARE * free_memory(device))
    shelf = Shelf(settings, hardware, limit)
    known = catalog.known_models(settings)
    for name in settings.names_at_start:
        if name not in known:
            raise CheckpointError(f"load_at_start: there is no model {name!r}; here are: {', '.join(known)}")
    shelf.load_at_start(settings.names_at_start)
    return OcrEngine(shelf, _pages(settings, threads))


def _pages(settings: Settings, threads: int) -> Pages:
    if not settings.read_documents:
        return Pages(None, "the setting read_documents is false")
    try:
        return Pages(Detector.load(threads), max_lines=settings.max_page_lines)
    except DetectorMissing as error:
        # Lines are read without it.
        print(f"documents will not be read: {error}", file=sys.stderr)
        return Pages(None, str(error))
