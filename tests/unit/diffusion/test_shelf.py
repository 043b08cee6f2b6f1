"""Models that come and go while the engine paints: loading, taking turns in memory, leaving, and nothing lost."""

import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from services.diffusion.domain import EngineInfo, Loading, LoadJob, ModelInfo, Refiner, UnloadJob
from services.diffusion.engine.main import DiffusionEngine
from services.diffusion.engine.models import LoadedModel, needed_bytes
from services.diffusion.settings import ModelSettings, Settings
from services.kit.engine_api import Accepted, Cancelled, Described, EngineEvent, Failed, Finished, Raw, Update
from services.kit.faults import Fault, FaultData, Kind
from services.runtimes import diffusion_sources as sources
from services.runtimes.diffusion_sources import ModelError
from tests.support import tiny_diffusion
from tests.unit.diffusion.conftest import paint_job

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PATIENCE_S = 60
NAMES = ("a", "b", "c")


class Course:
    """An engine whose loads are waited for, and all that it said."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self.said: list[EngineEvent] = []
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        engine.on_wake(lambda: self._woken.put(None))

    def submit(self, name: str, work: Any) -> None:
        self.engine.submit(name, Raw(msgspec.msgpack.encode(work)))

    def step(self) -> None:
        """One step, waiting for the loading thread where there is nothing else to do."""
        while not self.engine.busy:
            self._woken.get(timeout=PATIENCE_S)
        self.said += self.engine.step()

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def of(self, job: str) -> list[EngineEvent]:
        return [event for event in self.said if not isinstance(event, Described) and event.job == job]

    def over(self, *jobs: str) -> bool:
        return all(any(isinstance(e, Finished | Failed | Cancelled) for e in self.of(job)) for job in jobs)

    def finish(self, *jobs: str) -> None:
        self.until(lambda: self.over(*jobs))

    def stages(self, job: str) -> list[Loading]:
        return [msgspec.msgpack.decode(e.payload, type=Loading) for e in self.of(job) if isinstance(e, Update)]

    def fault(self, job: str) -> FaultData:
        last = self.of(job)[-1]
        assert isinstance(last, Failed), last
        return last.fault

    def result(self, job: str) -> Raw:
        last = self.of(job)[-1]
        assert isinstance(last, Finished), last
        return last.payload

    @property
    def loaded(self) -> set[str]:
        return {model.name for model in self.engine.info().models}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: three that are whole, one whose unet is cut off, one whose text encoder is another's."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_diffusion.make_folder(root / name, tiny_diffusion.PLAIN, preview=False)
    shutil.copytree(root / "a", root / "broken")
    weights = root / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(root / "a", root / "misfit")
    config = CLIPTextConfig.from_pretrained(root / "a" / "text_encoder")
    config.hidden_size = 64
    CLIPTextModel(config).save_pretrained(root / "misfit" / "text_encoder")
    return root


@pytest.fixture(scope="module")
def model_bytes(root: Path) -> int:
    row = ModelSettings(source=str(root / "a"))
    return needed_bytes(row, sources.find(row.source, row.config), torch.float32)


@pytest.fixture
def make(root: Path, model_bytes: int) -> Iterator[Callable[..., Course]]:
    """Makes an engine with room for so many models; the folder's are known, "a" is the default."""
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def make(room: float = 9, at_start: tuple[str, ...] = ()) -> Course:
        settings = Settings(
            models={"a": ModelSettings(source=str(root / "a"))},
            model_folder=str(root),
            load_at_start=list(at_start),
            memory_limit_bytes=int(room * model_bytes),
            threads=1,
        )
        return Course(DiffusionEngine(settings))

    yield make
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def paint(model: str, **more: Any) -> Any:
    return paint_job(model=model, **{"step_count": 2, **more})


class TestAtTheStart:
    def test_only_what_is_wanted_is_loaded(self, make: Any) -> None:
        assert make(at_start=("c",)).loaded == {"c"}
        assert make().loaded == set()

    def test_what_does_not_fit_waits_for_a_call(self, make: Any) -> None:
        course = make(room=1.5, at_start=("b", "a"))
        assert course.loaded == {"a"}  # the default one comes first
        course.submit("job", paint("b"))
        course.finish("job")
        assert course.loaded == {"b"}

    @pytest.mark.parametrize(
        ("names", "room", "says"),
        [
            (("nobody",), 9, "load_at_start: there is no model 'nobody'; here are: a, b, broken, c, misfit"),
            (("broken",), 9, "model broken: unet: diffusion_pytorch_model.safetensors is not a whole"),
            (("a",), 0.5, "memory_limit_bytes"),
        ],
    )
    def test_what_cannot_be_is_said(self, make: Any, names: tuple[str, ...], room: float, says: str) -> None:
        with pytest.raises(ModelError, match=says):
            make(room, names)


class TestLoading:
    def test_tells_its_stages_and_ends_with_the_model(self, make: Any) -> None:
        course = make()
        course.submit("load", LoadJob("b"))
        course.finish("load")
        assert isinstance(course.of("load")[0], Accepted)
        assert [stage.stage for stage in course.stages("load")] == ["waiting", "reading_weights", "warming"]
        info = msgspec.msgpack.decode(course.result("load"), type=ModelInfo)
        assert course.engine.info().model("b") == info
        # Whoever hears of the end finds the model described.
        told = [
            msgspec.msgpack.decode(event.info, type=EngineInfo) if isinstance(event, Described) else event
            for event in course.said
        ]
        end = told.index(course.of("load")[-1])
        described = [event for event in told[:end] if isinstance(event, EngineInfo)]
        assert described[0].loading == ("b",)
        assert described[-1].model("b") == info
        assert described[-1].loading == ()
        course.submit("again", LoadJob("b"))
        course.finish("again")
        assert course.stages("again") == []

    def test_many_share_one_load(self, make: Any) -> None:
        course = make()
        jobs = [f"load {i}" for i in range(3)] + [f"job {i}" for i in range(3)]
        for job in jobs:
            course.submit(job, LoadJob("b") if job.startswith("load") else paint("b"))
        course.finish(*jobs)
        assert all(isinstance(course.of(job)[-1], Finished) for job in jobs)
        assert sum(stage.stage == "warming" for stage in course.stages("load 0")) == 1

    def test_goes_on_beside_painting_and_changes_no_byte(self, make: Any) -> None:
        course = make(at_start=("a",))
        course.submit("alone", paint("a", step_count=6))
        course.finish("alone")
        course.submit("load", LoadJob("b"))
        pictures = 0
        while not course.over("load") or pictures < 2:
            course.submit(f"job {pictures}", paint("a", step_count=6))
            course.finish(f"job {pictures}")
            assert course.result(f"job {pictures}") == course.result("alone")
            pictures += 1

    def test_that_fails_leaves_everything_else_as_it_is(self, make: Any) -> None:
        course = make(room=1.5, at_start=("a",))
        course.submit("load", LoadJob("broken"))
        course.submit("job", paint("broken"))
        course.submit("other", paint("a"))
        course.finish("load", "job", "other")
        for job in ("load", "job"):
            fault = course.fault(job)
            assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "MODEL_UNUSABLE")
            assert "model broken: unet: diffusion_pytorch_model.safetensors is not a whole" in fault.message
        assert isinstance(course.of("other")[-1], Finished)
        assert course.loaded == {"a"}
        assert course.engine.info().loading == ()

    def test_of_parts_that_do_not_fit_each_other_fails(self, make: Any) -> None:
        course = make()
        course.submit("load", LoadJob("misfit"))
        course.finish("load")
        fault = course.fault("load")
        assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "MODEL_UNUSABLE")
        assert "model misfit: it fails on a first picture: " in fault.message
        assert course.loaded == set()

    def test_of_what_is_too_large_is_refused(self, make: Any) -> None:
        course = make(room=0.5)
        course.submit("load", LoadJob("b"))
        course.finish("load")
        fault = course.fault("load")
        assert (fault.kind, fault.reason) == (Kind.TOO_LARGE, "MODEL_TOO_LARGE")
        assert "memory_limit_bytes" in fault.message

    @pytest.mark.parametrize("work", [LoadJob("nobody"), UnloadJob("nobody"), paint("nobody")])
    def test_of_what_nobody_knows_is_refused_at_once(self, make: Any, work: Any) -> None:
        with pytest.raises(Fault, match="here are: a, b, broken, c, misfit"):
            make().submit("job", work)


class TestLeaving:
    def test_unloading_frees_the_name_and_not_the_model(self, make: Any) -> None:
        course = make(at_start=("a",))
        course.submit("unload", UnloadJob("a"))
        course.finish("unload")
        assert course.loaded == set()
        course.submit("again", UnloadJob("a"))
        course.finish("again")
        course.submit("job", paint("a"))
        course.finish("job")
        assert course.loaded == {"a"}

    def test_waits_for_the_calls_inside(self, make: Any) -> None:
        course = make(at_start=("a",))
        course.submit("job", paint("a", step_count=5))
        course.step()
        course.submit("unload", UnloadJob("a"))
        course.submit("late", paint("a"))  # is painted once the model is loaded again
        course.until(lambda: course.over("job"))
        assert not course.over("unload")
        course.finish("unload", "late")
        assert isinstance(course.of("late")[-1], Finished)
        assert course.said.index(course.of("unload")[-1]) < course.said.index(course.of("late")[0])
        assert course.loaded == {"a"}

    def test_asked_for_during_a_load_comes_after_it(self, make: Any) -> None:
        course = make()
        course.submit("load", LoadJob("b"))
        course.submit("unload", UnloadJob("b"))
        course.finish("load", "unload")
        assert isinstance(course.of("load")[-1], Finished)
        assert course.loaded == set()

    def test_can_be_called_off(self, make: Any) -> None:
        course = make(at_start=("a",))
        course.submit("job", paint("a", step_count=3))
        course.submit("unload", UnloadJob("a"))
        course.engine.cancel("unload")
        course.finish("job", "unload")
        assert course.of("unload")[-1] == Cancelled("unload")
        assert course.loaded == {"a"}

    def test_the_least_recently_used_goes_first(self, make: Any) -> None:
        course = make(room=2.5, at_start=("a", "b"))
        course.submit("job", paint("a"))
        course.finish("job")
        course.submit("load", LoadJob("c"))
        course.finish("load")
        assert course.stages("load")[-1].evicted_models == ("b",)
        assert course.loaded == {"a", "c"}

    def test_one_that_is_in_use_finishes_first(self, make: Any) -> None:
        course = make(room=1.5, at_start=("a",))
        course.submit("job", paint("a", step_count=4))
        course.submit("other", paint("b"))
        course.finish("job", "other")
        assert isinstance(course.of("job")[-1], Finished)
        assert isinstance(course.of("other")[-1], Finished)
        assert course.loaded == {"b"}

    def test_no_job_is_lost_when_models_take_turns(self, make: Any) -> None:
        course = make(room=1.5)
        jobs = {f"{i} of {name}": paint(name, seed=i) for i in range(3) for name in NAMES}
        for job, work in jobs.items():
            course.submit(job, work)
        course.finish(*jobs)
        assert all(isinstance(course.of(job)[-1], Finished) for job in jobs)
        assert len(course.loaded) == 1


class TestWaiting:
    def test_jobs_can_be_cancelled(self, make: Any) -> None:
        course = make(at_start=("a",))
        course.submit("job", paint("b"))
        course.submit("load", LoadJob("c"))
        course.engine.cancel("job")
        course.engine.cancel("load")
        course.submit("later", paint("a"))
        course.finish("job", "load", "later")
        assert course.of("job") == [Cancelled("job")]
        assert course.of("load")[-1] == Cancelled("load")
        course.submit("c", LoadJob("c"))
        course.finish("c")

    def test_a_job_gets_all_the_models_that_it_needs(self, make: Any) -> None:
        shelf = make().engine.shelf
        job = paint("a", refiner=Refiner("b"))
        assert shelf.take("job", job) is None
        self.until_arrived(shelf)
        ((name, arrived, models),) = shelf.arrived()
        assert (name, arrived, set(models)) == ("job", job, {"a", "b"})
        assert all(isinstance(model, LoadedModel) for model in models.values())
        assert set(shelf.take("another", job)) == {"a", "b"}

    def test_both_stay_while_the_other_is_loaded(self, make: Any) -> None:
        shelf = make(room=2.5, at_start=("a", "c")).engine.shelf
        shelf.take("lately used", paint("c"))
        shelf.release("lately used")
        assert shelf.take("job", paint("a", refiner=Refiner("b"))) is None
        self.until_arrived(shelf)
        assert {model.name for model in shelf.info().models} == {"a", "b"}  # though c was used after a

    def test_two_that_do_not_fit_together_are_refused(self, make: Any) -> None:
        shelf = make(room=1.5, at_start=("a",)).engine.shelf
        assert shelf.take("job", paint("a", refiner=Refiner("b"))) is None
        events = self.until(shelf, Failed)
        (fault,) = [event.fault for event in events if isinstance(event, Failed)]
        assert fault.reason == "MODEL_TOO_LARGE"
        assert "a and b do not fit in memory together" in fault.message
        assert shelf.take("alone", paint("a")) is not None

    def until_arrived(self, shelf: Any) -> None:
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        shelf.wake = lambda: woken.put(None)
        shelf.advance()
        while not shelf._arrived:
            woken.get(timeout=PATIENCE_S)
            shelf.advance()

    def until(self, shelf: Any, kind: type) -> list[EngineEvent]:
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        shelf.wake = lambda: woken.put(None)
        shelf.advance()
        events = shelf.take_events()
        while not any(isinstance(event, kind) for event in events):
            woken.get(timeout=PATIENCE_S)
            shelf.advance()
            events += shelf.take_events()
        return list(events)
