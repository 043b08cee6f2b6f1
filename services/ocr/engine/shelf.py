"""The models in memory: loaded, warmed, used, unloaded, and the jobs that wait for one.

Everything happens on the engine's own thread but the two slow parts of loading (engine/loading.py), which run one after
another on a second thread while the engine goes on with the models that it has. A model that has to leave finishes its
jobs first; jobs that come for it meanwhile wait until it is loaded again, so that nothing that was taken in is lost.
"""

import gc
import itertools
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import msgspec
import torch

from services.kit import faults
from services.kit.engine_api import Accepted, Described, EngineEvent, Failed, Finished, Raw, Update
from services.kit.faults import Fault
from services.ocr import catalog
from services.ocr.domain import EmbedJob, EngineInfo, Loading, LoadJob, ReadJob, UnloadJob
from services.ocr.engine.embedding import Embedder
from services.ocr.engine.lane import Lane
from services.ocr.engine.loading import Checked, Desk, Loader, fault_of
from services.ocr.engine.sources import Wanted, on_device
from services.ocr.settings import Settings
from services.runtimes import device, eviction
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware

_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


@dataclass
class _Load:
    """A model to be loaded: for LoadJobs, or for jobs that wait in `Shelf._parked`."""

    name: str
    wanted: Wanted
    jobs: list[str] = field(default_factory=list)
    unloaders: list[str] = field(default_factory=list)  # UnloadJobs that came meanwhile
    stage: Loading = Loading("waiting")
    checked: Checked | None = None
    future: "Future[Checked] | Future[Desk] | None" = None
    evicted: list[str] = field(default_factory=list)  # that left for it, or are about to


class Shelf:
    """Holds models within `limit` bytes of weights. All methods are called on one thread.

    `wake` is called on another thread whenever `busy` may have become true.
    """

    def __init__(self, settings: Settings, hardware: Hardware, limit: int) -> None:
        self.desks: dict[str, Desk] = {}
        self.wake: Callable[[], None] = lambda: None
        self._settings = settings
        self._loader = Loader(settings, hardware)
        self._device = device.describe(on_device(hardware, settings))
        self._limit = limit
        self._retiring: list[Desk] = []  # replaced by the same model in another precision, finishing their jobs
        self._loads: deque[_Load] = deque()  # the first is under way
        self._parked: dict[str, dict[str, ReadJob | EmbedJob]] = {}  # by model and job
        self._events: list[EngineEvent] = []
        self._told: EngineInfo | None = None
        self._clock = itertools.count(1)
        # From the loading thread: a load has come to a stage, or (None) its work there is done.
        self._news: queue.SimpleQueue[tuple[_Load, Loading | None]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loading")

    # --- what it holds ---

    def info(self) -> EngineInfo:
        """The loaded models and those that will be."""
        return EngineInfo(
            tuple(desk.info for desk in self.desks.values()),
            tuple(dict.fromkeys(load.name for load in self._loads)),
            self._device,
        )

    def working(self) -> Iterator[Lane | Embedder]:
        """Everything that has a step to do."""
        for desk in (*self.desks.values(), *self._retiring):
            for part in (desk.lane, desk.embedder):
                if part.busy:
                    yield part

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to tell or to do; loading itself is done elsewhere."""
        return (
            bool(self._events)
            or not self._news.empty()
            or any(desk.closing and desk.idle for desk in self.desks.values())
            or any(desk.idle for desk in self._retiring)
        )

    def load_at_start(self, names: list[str]) -> None:
        """Load models before the first job; raises CheckpointError when one cannot be used or is too large.

        Those after the first that do not fit beside the ones before are left for the first call that names them.
        """
        for name in names:
            checked = self._loader.check(name, Wanted())
            held = sum(desk.info.weight_bytes for desk in self.desks.values())
            if checked.needed_bytes > self._limit:
                raise CheckpointError(self._too_large(name, checked))
            if checked.needed_bytes + held > self._limit:
                print(
                    f"{name} is not loaded yet: it takes {checked.needed_bytes} bytes, the models before it take {held}"
                    f" and memory_limit_bytes is {self._limit}",
                    file=sys.stderr,
                )
                continue
            self.desks[name] = self._loader.read(name, checked)
        self.advance()
        self._events.clear()  # the engine's first description says it all

    # --- jobs ---

    def submit(self, job_id: str, job: ReadJob | EmbedJob) -> None:
        """Give a job to its model, or keep it until the model is loaded; raises Fault for a name that is not known."""
        desk = self.desks.get(job.model)
        if desk is not None and not desk.closing:
            self._hand_over(desk, job_id, job)
            return
        if job.model not in catalog.known_models(self._settings):
            raise self._unknown(job.model)
        self._parked.setdefault(job.model, {})[job_id] = job
        if not any(load.name == job.model for load in self._loads):
            self._loads.append(_Load(job.model, Wanted()))
        self.advance()

    def load(self, job_id: str, job: LoadJob) -> None:
        """Load a known model unless it is loaded so; raises Fault for a name that is not known."""
        if job.model not in catalog.known_models(self._settings):
            raise self._unknown(job.model)
        wanted = Wanted.by(job)
        self._events.append(Accepted(job_id))
        load = next((load for load in self._loads if (load.name, load.wanted) == (job.model, wanted)), None)
        if load is None:
            load = _Load(job.model, wanted)
            self._loads.append(load)
        load.jobs.append(job_id)
        desk = self.desks.get(job.model)
        if desk is None or desk.closing or load.checked is not None:
            self._tell(job_id, load.stage)
        # Else it may be loaded so already, which the loading thread sees: it has to look at folders and artifacts.
        self.advance()

    def unload(self, job_id: str, job: UnloadJob) -> None:
        """Let a model leave once its jobs are done; raises Fault for a name that is not known."""
        if job.model not in catalog.known_models(self._settings) and job.model not in self.desks:
            raise self._unknown(job.model)
        self._events.append(Accepted(job_id))
        desk = self.desks.get(job.model)
        if desk is None:
            load = next((load for load in self._loads if load.name == job.model), None)
            if load is None:
                self._events.append(Finished(job_id, Raw(_encoder.encode(None))))
            else:
                load.unloaders.append(job_id)
            return
        desk.closing = True
        desk.unloaders.append(job_id)
        self.advance()

    def cancel(self, job_id: str) -> bool:
        """Drop a job; False if it is not here. A load that is under way goes on: others may want the model."""
        for parked in self._parked.values():
            if parked.pop(job_id, None) is not None:
                return True
        for load in self._loads:
            for jobs in (load.jobs, load.unloaders):
                if job_id in jobs:
                    jobs.remove(job_id)
                    return True
        for desk in self.desks.values():
            if job_id in desk.unloaders:
                desk.unloaders.remove(job_id)
                if not desk.unloaders:
                    self._reopen(desk)
                return True
            if desk.lane.cancel(job_id) or desk.embedder.cancel(job_id):
                return True
        return any(desk.lane.cancel(job_id) or desk.embedder.cancel(job_id) for desk in self._retiring)

    def advance(self) -> None:
        """Let go of what may leave, take in what is loaded, begin the next load."""
        while not self._news.empty():
            load, stage = self._news.get()
            if stage is not None:
                self._enter(load, stage)
        for desk in [desk for desk in self._retiring if desk.idle]:
            self._retiring.remove(desk)
            desk.close()
        for name, desk in list(self.desks.items()):
            if desk.closing and desk.idle:
                self._drop(name, desk)
        while self._loads and self._advance_load(self._loads[0]):
            load = self._loads.popleft()
            for name in load.evicted:
                # Should it have ended before they left, they stay.
                left = self.desks.get(name)
                if left is not None and left.closing and not left.unloaders:
                    self._reopen(left)
        info = self.info()
        if info != self._told:
            self._told = info
            # Before the ends of loads, so that who hears of one finds the model described.
            self._events.insert(0, Described(Raw(_encoder.encode(info))))

    def take_events(self) -> list[EngineEvent]:
        """What there is to tell since the last time."""
        events, self._events = self._events, []
        return events

    # --- loading, on the engine's thread ---

    def _advance_load(self, load: _Load) -> bool:
        """Do what can be done for the first load now; True when it is over."""
        if load.future is not None:
            if not load.future.done():
                return False
            done, load.future = load.future, None
            try:
                result = done.result()
            except BaseException as error:  # noqa: BLE001 - whatever a broken folder does, the others go on
                self._fail(load, fault_of(load.name, error))
                return True
            if isinstance(result, Desk):
                self._shelve(load, result)
                return True
            load.checked = result
        if not load.jobs and not self._parked.get(load.name):
            self._end_unloaders(load)
            return True  # nobody wants it any more
        desk = self.desks.get(load.name)
        if desk is not None and desk.closing:
            return False  # the same model is about to leave; that comes first
        if load.checked is None:
            load.future = self._start(load, partial(self._loader.check, load.name, load.wanted))
            return False
        if desk is not None and desk.source == load.checked.source:
            desk.last_used = next(self._clock)
            self._end(load, desk)
            return True
        try:
            if not self._make_room(load, load.checked):
                return False
        except Fault as fault:
            self._fail(load, fault)
            return True
        self._enter(load, Loading("reading_weights", tuple(load.evicted)))
        warming = partial(self._report, load, Loading("warming", tuple(load.evicted)))
        work = partial(self._loader.read, load.name, load.checked, when_read=warming)
        load.future = self._start(load, work)
        return False

    def _start(self, load: _Load, work: Callable[[], T]) -> "Future[T]":
        future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._report(load, None))
        return future

    def _report(self, load: _Load, stage: Loading | None) -> None:
        """Called on the loading thread."""
        self._news.put((load, stage))
        self.wake()

    def _enter(self, load: _Load, stage: Loading) -> None:
        load.stage = stage
        for job_id in load.jobs:
            self._tell(job_id, stage)

    def _make_room(self, load: _Load, checked: Checked) -> bool:
        """Let models leave until the load fits; False while some still have jobs. Raises Fault if it never fits."""
        if checked.needed_bytes > self._limit:
            raise faults.too_large(
                "name",
                "MODEL_TOO_LARGE",
                self._too_large(load.name, checked),
                needed_bytes=checked.needed_bytes,
                limit_bytes=self._limit,
            )
        # The same model in another precision goes on serving until the new one is there.
        other = self.desks.get(load.name)
        kept = [desk for desk in (other, *self._retiring) if desk is not None]
        room = self._limit - sum(desk.info.weight_bytes for desk in kept)
        held = [
            eviction.Held(name, desk.info.weight_bytes, desk.last_used, desk.idle)
            for name, desk in self.desks.items()
            if desk is not other
        ]
        names = eviction.leaving(held, checked.needed_bytes, room)
        if names is None:
            if self._retiring:
                return False
            raise faults.failed_precondition(
                "MODEL_MEMORY_FULL",
                f"{load.name} takes {checked.needed_bytes} bytes as {checked.source.precision}, which do not fit beside"
                f" its present weights within the limit of {self._limit}; unload it first",
                needed_bytes=checked.needed_bytes,
                limit_bytes=self._limit,
            )
        for name in names:
            load.evicted += [name] if name not in load.evicted else []
            self.desks[name].closing = True
            if self.desks[name].idle:
                self._drop(name, self.desks[name])
        return not any(name in self.desks for name in names)

    def _shelve(self, load: _Load, desk: Desk) -> None:
        old = self.desks.pop(load.name, None)
        if old is not None:
            self._retiring.append(old)
            desk.unloaders += old.unloaders
        desk.last_used = next(self._clock)
        self.desks[load.name] = desk
        self._end(load, desk)

    def _end(self, load: _Load, desk: Desk) -> None:
        """Tell those who asked for it that it is loaded, and let the calls that waited for it in."""
        # An unload that was asked for meanwhile is for whatever of the name is there.
        desk.unloaders += load.unloaders
        desk.closing = bool(desk.unloaders)
        for job_id in load.jobs:
            self._events.append(Finished(job_id, Raw(_encoder.encode(desk.info))))
        for job_id, job in self._parked.pop(load.name, {}).items():
            self._hand_over(desk, job_id, job)

    def _fail(self, load: _Load, fault: Fault) -> None:
        for job_id in load.jobs:
            self._events.append(Failed(job_id, fault.data))
        self._end_unloaders(load)
        desk = self.desks.get(load.name)
        if desk is not None and not desk.closing:
            return  # the model in its other precision goes on
        if any(other.name == load.name for other in self._loads if other is not load):
            return
        for job_id in self._parked.pop(load.name, {}):
            self._events.append(Failed(job_id, fault.data))

    def _end_unloaders(self, load: _Load) -> None:
        for job_id in load.unloaders:
            self._events.append(Finished(job_id, Raw(_encoder.encode(None))))

    def _reopen(self, desk: Desk) -> None:
        desk.closing = False
        for job_id, job in self._parked.pop(desk.info.name, {}).items():
            self._hand_over(desk, job_id, job)

    def _drop(self, name: str, desk: Desk) -> None:
        del self.desks[name]
        for job_id in desk.unloaders:
            self._events.append(Finished(job_id, Raw(_encoder.encode(desk.info))))
        desk.close()
        del desk
        gc.collect()  # models hold circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _hand_over(self, desk: Desk, job_id: str, job: ReadJob | EmbedJob) -> None:
        desk.last_used = next(self._clock)
        if isinstance(job, EmbedJob):
            desk.embedder.submit(job_id, job)
        elif job.decoding.max_new_token_count <= desk.info.max_new_token_limit:
            desk.lane.submit(job_id, job)
        else:
            fault = faults.failed_precondition(
                "MODEL_CHANGED",
                f"{job.model} was replaced while the call waited and decodes {desk.info.max_new_token_limit} tokens at"
                " most now; ask again",
                model=job.model,
            )
            self._events.append(Failed(job_id, fault.data))

    def _tell(self, job_id: str, stage: Loading) -> None:
        self._events.append(Update(job_id, Raw(_encoder.encode(stage))))

    def _unknown(self, name: str) -> Fault:
        return faults.not_found("model", name, catalog.known_models(self._settings), field="model")

    def _too_large(self, name: str, checked: Checked) -> str:
        return (
            f"{name} takes {checked.needed_bytes} bytes as {checked.source.precision} and the limit for all models is"
            f" {self._limit} (memory_limit_bytes)"
        )
