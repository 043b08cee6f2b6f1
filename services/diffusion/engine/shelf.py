"""The models in memory: loaded, warmed, used, unloaded, and the jobs that wait for one or several.

Everything happens on the engine's own thread but the two slow parts of loading (looking at the files, which may have
to be fetched, and reading and warming), which run one after another on a second thread while the engine goes on with
the models that it has. A model that has to leave finishes its jobs first; jobs that come for it meanwhile wait until it
is loaded again, so that nothing that was taken in is lost.
"""

import functools
import gc
import itertools
import logging
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import torch

from services.diffusion import catalog
from services.diffusion.domain import EngineInfo, Loading, LoadJob, ModelInfo, PaintJob, UnloadJob
from services.diffusion.engine.artifacts import Wanted
from services.diffusion.engine.loader import Checked, Loader, fault_of
from services.diffusion.engine.models import LoadedModel
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.engine_api import Accepted, Described, EngineEvent, Failed, Finished, Raw, Update
from services.kit.faults import Fault
from services.runtimes import device, eviction
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.hardware import Hardware

log = logging.getLogger(__name__)

_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


@dataclass
class _Held:
    """A loaded model and who uses it."""

    model: LoadedModel
    bytes: int  # that it counts for: its weights, and those of other VAEs that it may load later
    last_used: int
    users: set[str] = field(default_factory=set)  # jobs under way
    # It has to leave: jobs that come from now on wait for it to be loaded again.
    closing: bool = False
    unloaders: list[str] = field(default_factory=list)  # UnloadJobs that wait for it to leave


@dataclass
class _Load:
    """A model to be loaded: for LoadJobs, or for jobs that wait in `Shelf._parked`."""

    name: str
    wanted: Wanted = Wanted()
    jobs: list[str] = field(default_factory=list)
    unloaders: list[str] = field(default_factory=list)  # UnloadJobs that came meanwhile
    stage: Loading = Loading("waiting")
    checked: Checked | None = None
    future: "Future[Checked] | Future[LoadedModel] | None" = None
    evicted: list[str] = field(default_factory=list)  # that left for it, or are about to


class Shelf:
    """Holds models within `limit` bytes of weights. All methods are called on one thread.

    warm: paints a first time with a model that was just loaded, and raises ModelError for one that cannot; called on
    the loading thread. `wake` is called there whenever `busy` may have become true.
    """

    def __init__(
        self,
        settings: Settings,
        hardware: Hardware,
        dtype: torch.dtype,
        limit: int,
        warm: Callable[[LoadedModel], None] = lambda model: None,
    ) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._settings = settings
        self._hardware = hardware
        self._device = device.describe(hardware)
        self._loader = Loader(settings, hardware, dtype, warm)
        self._limit = limit
        self._held: dict[str, _Held] = {}
        self._loads: deque[_Load] = deque()  # the first is under way
        self._parked: dict[str, PaintJob] = {}
        self._arrived: list[tuple[str, PaintJob]] = []  # no longer parked; they are users already
        self._events: list[EngineEvent] = []
        self._told: EngineInfo | None = None
        self._clock = itertools.count(1)
        # From the loading thread: a load has come to a stage, or (None) its work there is done.
        self._news: queue.SimpleQueue[tuple[_Load, Loading | None]] = queue.SimpleQueue()
        # Autograd is on in a new thread.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="loading", initializer=functools.partial(torch.set_grad_enabled, False)
        )

    # --- what it holds ---

    def info(self) -> EngineInfo:
        """The loaded models and those that will be."""
        return EngineInfo(
            self._hardware.label,
            f"torch {torch.__version__}",
            tuple(held.model.info for held in self._held.values()),
            tuple(dict.fromkeys(load.name for load in self._loads)),
            self._device,
        )

    def model(self, name: str) -> LoadedModel:
        """A loaded model. Raises KeyError for one that is not."""
        return self._held[name].model

    @property
    def busy(self) -> bool:
        """Whether `advance` or its takers have something to do; loading itself is done elsewhere."""
        return (
            bool(self._events or self._arrived)
            or not self._news.empty()
            or any(held.closing and not held.users for held in self._held.values())
        )

    def load_at_start(self) -> None:
        """Load the models that the settings want before the first job; raises ModelError for one that cannot be.

        Those after the first that do not fit beside the ones before are left for the first call that names them.
        """
        known = catalog.known_models(self._settings)
        for name in self._settings.names_at_start:
            if name not in known:
                raise ModelError(f"load_at_start: there is no model {name!r}; here are: {', '.join(known)}")
            checked = self._loader.check(name, Wanted())
            if checked.needed_bytes > self._limit:
                raise ModelError(self._too_large(name, checked))
            held = sum(held.bytes for held in self._held.values())
            if checked.needed_bytes + held > self._limit:
                log.warning(
                    "%s is not loaded yet: it takes %d bytes, the models before it take %d and the limit is %d",
                    name,
                    checked.needed_bytes,
                    held,
                    self._limit,
                )
                continue
            model = self._loader.read(name, checked)
            self._held[name] = _Held(model, max(checked.needed_bytes, model.info.memory_bytes), next(self._clock))
        self._told = self.info()  # the engine's first description says it all

    # --- jobs ---

    def take(self, job_id: str, job: PaintJob) -> dict[str, LoadedModel] | None:
        """The models of a job by name, its own until `release`; None when it has to wait for one (see `arrived`).

        Raises Fault for a name that is not known.
        """
        known = catalog.known_models(self._settings)
        for name in job.models:
            if name not in known and name not in self._held:
                raise self._unknown(name, "model" if name == job.parameters.model else "refiner.model")
        if not self._missing(job):
            return self._hand_out(job_id, job)
        self._parked[job_id] = job
        self.advance()
        return None

    def release(self, job_id: str) -> None:
        """The job is over, and no longer needs its models."""
        for held in self._held.values():
            held.users.discard(job_id)

    def arrived(self) -> list[tuple[str, PaintJob, dict[str, LoadedModel]]]:
        """Jobs that waited and whose models are there now, in the order they came."""
        arrived, self._arrived = self._arrived, []
        return [(job_id, job, {name: self.model(name) for name in job.models}) for job_id, job in arrived]

    def load(self, job_id: str, job: LoadJob) -> None:
        """Load a known model unless it is loaded so; raises Fault for a name that is not known."""
        if job.model not in catalog.known_models(self._settings):
            raise self._unknown(job.model, "name")
        self._events.append(Accepted(job_id))
        wanted = Wanted.by(job)
        held = self._held.get(job.model)
        if held is not None and not held.closing and _is_as(held.model.info, wanted):
            held.last_used = next(self._clock)
            self._finish(job_id, held.model.info)
            return
        load = next((load for load in self._loads if (load.name, load.wanted) == (job.model, wanted)), None)
        load = load or self._queue(job.model, wanted)
        load.jobs.append(job_id)
        self._tell(job_id, load.stage)
        self.advance()

    def unload(self, job_id: str, job: UnloadJob) -> None:
        """Let a model leave once its jobs are done; raises Fault for a name that is not known."""
        if job.model not in catalog.known_models(self._settings) and job.model not in self._held:
            raise self._unknown(job.model, "name")
        self._events.append(Accepted(job_id))
        held, load = self._held.get(job.model), self._load_of(job.model)
        if held is not None:
            held.closing = True
            held.unloaders.append(job_id)
            self.advance()
        elif load is not None:
            load.unloaders.append(job_id)
        else:
            self._finish(job_id, None)

    def cancel(self, job_id: str) -> bool:
        """Drop a job; False if it is not here. A load that is under way goes on: others may want the model."""
        if self._parked.pop(job_id, None) is not None:
            return True
        for index, (arrived, _) in enumerate(self._arrived):
            if arrived == job_id:
                del self._arrived[index]
                self.release(job_id)
                return True
        for load in self._loads:
            for jobs in (load.jobs, load.unloaders):
                if job_id in jobs:
                    jobs.remove(job_id)
                    return True
        for held in self._held.values():
            if job_id in held.unloaders:
                held.unloaders.remove(job_id)
                if not held.unloaders and not any(held.model.name in load.evicted for load in self._loads):
                    held.closing = False
                return True
        return False

    def advance(self) -> None:
        """Let go of what may leave, take in what is loaded, begin the next load, hand out what jobs waited for."""
        while not self._news.empty():
            load, stage = self._news.get()
            if stage is not None:
                self._enter(load, stage)
        while True:
            self._drop_idle()
            self._hand_out_parked()
            if not self._loads or not self._advance_load(self._loads[0]):
                break
            for name in self._loads.popleft().evicted:
                # Should it have ended before they left, they stay.
                left = self._held.get(name)
                if left is not None and not left.unloaders:
                    left.closing = False
        info = self.info()
        if info != self._told:
            self._told = info
            # Before the ends of loads, so that who hears of one finds the model described.
            self._events.insert(0, Described(Raw(_encoder.encode(info))))

    def take_events(self) -> list[EngineEvent]:
        """What there is to tell since the last time."""
        events, self._events = self._events, []
        return events

    # --- jobs and models ---

    def _missing(self, job: PaintJob) -> list[str]:
        return [name for name in job.models if (held := self._held.get(name)) is None or held.closing]

    def _hand_out(self, job_id: str, job: PaintJob) -> dict[str, LoadedModel]:
        for name in job.models:
            self._held[name].users.add(job_id)
            self._held[name].last_used = next(self._clock)
        return {name: self.model(name) for name in job.models}

    def _hand_out_parked(self) -> None:
        """Hand out what is there, and see to it that what is not there will be."""
        for job_id, job in list(self._parked.items()):
            missing = self._missing(job)
            if not missing:
                del self._parked[job_id]
                self._hand_out(job_id, job)
                self._arrived.append((job_id, job))
            for name in missing:
                if self._load_of(name) is None:
                    self._queue(name)

    def _load_of(self, name: str) -> _Load | None:
        return next((load for load in self._loads if load.name == name), None)

    def _queue(self, name: str, wanted: Wanted = Wanted()) -> _Load:  # noqa: B008 - it cannot change
        load = _Load(name, wanted)
        self._loads.append(load)
        return load

    def _waiting_for(self, name: str) -> dict[str, PaintJob]:
        return {job_id: job for job_id, job in self._parked.items() if name in job.models}

    # --- loading, on the engine's thread ---

    def _advance_load(self, load: _Load) -> bool:
        """Do what can be done for the first load now; True when it is over."""
        if load.future is not None:
            if not load.future.done():
                return False
            done, load.future = load.future, None
            try:
                result = done.result()
            except BaseException as error:  # noqa: BLE001 - whatever a broken checkpoint does, the others go on
                self._fail(load, fault_of(load.name, error))
                return True
            if isinstance(result, LoadedModel):
                self._shelve(load, result)
                return True
            load.checked = result
        if load.checked is not None:
            self._refuse_what_never_fits_together(load, load.checked)
        if not load.jobs and not self._waiting_for(load.name):
            self._end_unloaders(load)
            return True  # nobody wants it any more
        held = self._held.get(load.name)
        if held is not None and held.closing:
            return False  # the same model is about to leave; that comes first
        if load.checked is None:
            load.future = self._start(load, functools.partial(self._loader.check, load.name, load.wanted))
            return False
        if held is not None:
            if held.model.info.artifact == load.checked.artifact:
                for job_id in load.jobs:
                    self._finish(job_id, held.model.info)
                held.unloaders += load.unloaders
                held.closing = bool(held.unloaders)
                return True
            # It runs from something else. Now that the other is known to be there, it leaves.
            held.closing = True
            self._drop_idle()
            if load.name in self._held:
                return False
        try:
            if not self._make_room(load, load.checked):
                return False
        except Fault as fault:
            self._fail(load, fault)
            return True
        self._enter(load, Loading("reading_weights", tuple(load.evicted)))
        warming = functools.partial(self._report, load, Loading("warming", tuple(load.evicted)))
        load.future = self._start(load, functools.partial(self._loader.read, load.name, load.checked, warming))
        return False

    def _start(self, load: _Load, work: Callable[[], T]) -> "Future[T]":
        future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._report(load, None))
        return future

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
        names = self._leaving(checked, self._beside(load.name)) or []
        for name in names:
            load.evicted += [name] if name not in load.evicted else []
            self._held[name].closing = True
        self._drop_idle()
        return not any(name in self._held for name in names)

    def _beside(self, name: str) -> set[str]:
        """What the jobs that wait for a model need beside it. It stays, or they would wait for ever."""
        return {other for job in self._waiting_for(name).values() for other in job.models if other != name}

    def _refuse_what_never_fits_together(self, load: _Load, checked: Checked) -> None:
        if checked.needed_bytes > self._limit or self._leaving(checked, self._beside(load.name)) is not None:
            return
        for job_id, job in self._waiting_for(load.name).items():
            if len(job.models) > 1:
                del self._parked[job_id]
                self._events.append(Failed(job_id, self._too_large_together(job, checked).data))

    def _leaving(self, checked: Checked, kept: set[str]) -> list[str] | None:
        room = self._limit - sum(held.bytes for name, held in self._held.items() if name in kept)
        # A model that waiting jobs want beside another leaves only after those that nobody wants.
        wanted = {name for job in self._parked.values() for name in job.models}
        others = [
            eviction.Held(name, held.bytes, held.last_used, not held.users and name not in wanted)
            for name, held in self._held.items()
            if name not in kept
        ]
        return eviction.leaving(others, checked.needed_bytes, room)

    def _shelve(self, load: _Load, model: LoadedModel) -> None:
        assert load.checked is not None
        # An unload that was asked for meanwhile comes after the jobs that waited.
        held = _Held(
            model, max(load.checked.needed_bytes, model.info.memory_bytes), next(self._clock), unloaders=load.unloaders
        )
        self._held[load.name] = held
        for job_id in load.jobs:
            self._finish(job_id, model.info)
        self._hand_out_parked()
        held.closing = bool(held.unloaders)

    def _fail(self, load: _Load, fault: Fault) -> None:
        for job_id in (*load.jobs, *self._waiting_for(load.name)):
            self._parked.pop(job_id, None)
            self._events.append(Failed(job_id, fault.data))
        self._end_unloaders(load)

    def _end_unloaders(self, load: _Load) -> None:
        for job_id in load.unloaders:
            self._finish(job_id, None)

    def _drop_idle(self) -> None:
        gone = [name for name, held in self._held.items() if held.closing and not held.users]
        for name in gone:
            held = self._held.pop(name)
            held.model.close()
            for job_id in held.unloaders:
                self._finish(job_id, None)
        if gone:
            gc.collect()  # models hold circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _finish(self, job_id: str, result: msgspec.Struct | None) -> None:
        self._events.append(Finished(job_id, Raw(_encoder.encode(result))))

    def _tell(self, job_id: str, stage: Loading) -> None:
        self._events.append(Update(job_id, Raw(_encoder.encode(stage))))

    def _report(self, load: _Load, stage: Loading | None) -> None:
        self._news.put((load, stage))
        self.wake()

    # --- faults ---

    def _unknown(self, name: str, field: str) -> Fault:
        return faults.not_found("model", name, catalog.known_models(self._settings), field=field)

    def _too_large(self, name: str, checked: Checked) -> str:
        stored = checked.stored
        dtype = stored.manifest.precision if stored else str(self._loader.dtype).removeprefix("torch.")
        return (
            f"model {name} takes {checked.needed_bytes} bytes as {dtype} and the limit for all models is"
            f" {self._limit} (memory_limit_bytes)"
        )

    def _too_large_together(self, job: PaintJob, checked: Checked) -> Fault:
        names = " and ".join(job.models)
        return faults.too_large(
            "refiner.model",
            "MODEL_TOO_LARGE",
            f"{names} do not fit in memory together: the limit for all models is {self._limit} bytes"
            " (memory_limit_bytes)",
            needed_bytes=checked.needed_bytes,
            limit_bytes=self._limit,
        )


def _is_as(info: ModelInfo, wanted: Wanted) -> bool:
    """Whether a loaded model runs as wanted, as far as can be told without looking at folders and artifacts."""
    if wanted.artifact:
        return info.artifact.startswith(wanted.artifact)
    return wanted.runtime is None or info.runtime.split()[0] == wanted.runtime
