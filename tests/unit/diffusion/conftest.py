"""One engine over tiny models with random weights, driven step by step in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from services.diffusion.domain import JobUpdate, Painted, PaintJob, Parameters, PreviewPlan
from services.diffusion.engine.main import DiffusionEngine, create_engine
from services.diffusion.settings import ModelSettings, Settings
from services.kit.engine_api import Described, Failed, Finished, JobEvent, Raw, Update
from services.kit.faults import FaultData
from tests.support import diffusion_families, original_layouts, tiny_diffusion


class Driver:
    """Submits jobs to an engine and collects what it says, by job."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self.events: dict[str, list[JobEvent]] = {}

    def submit(self, name: str, job: PaintJob) -> None:
        self.events[name] = []
        self.engine.submit(name, Raw(msgspec.msgpack.encode(job)))

    def step(self) -> None:
        for event in self.engine.step():
            if not isinstance(event, Described):
                self.events[event.job].append(event)

    def until_step(self, name: str, step: int) -> None:
        """Go on until the named job has reported that step."""
        while not any(getattr(update, "step", 0) >= step for update in self.updates(name)):
            assert self.engine.busy, f"{name} ended before step {step}"
            self.step()

    def finish(self) -> None:
        while self.engine.busy:
            self.step()

    def updates(self, name: str) -> list[JobUpdate]:
        return [
            msgspec.msgpack.decode(event.payload, type=JobUpdate)
            for event in self.events[name]
            if isinstance(event, Update)
        ]

    def painted(self, name: str) -> Painted:
        last = self.events[name][-1]
        assert isinstance(last, Finished), last
        return msgspec.msgpack.decode(last.payload, type=Painted)

    def fault(self, name: str) -> FaultData:
        last = self.events[name][-1]
        assert isinstance(last, Failed), last
        return last.fault

    def paint(self, job: PaintJob) -> Painted:
        """Paint one job with nobody else around."""
        self.submit("alone", job)
        self.finish()
        return self.painted("alone")


def paint_job(
    *,
    model: str = "zero-snr",
    prompt: str = "red panda",
    negative_prompt: str = "",
    width: int = 32,
    height: int = 32,
    step_count: int = 4,
    guidance_scale: float = 2.0,
    scheduler: str = "ddim",
    seed: int = 7,
    image_count: int = 1,
    media_type: str = "image/png",
    preview_interval: int = 0,
    batch_count: int = 1,
    **more: Any,
) -> PaintJob:
    """more: other fields of Parameters."""
    more.setdefault("prompt_syntax", "weighted")
    pictures = tuple(
        Parameters(
            model=model,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            step_count=step_count,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed + i,
            **more,
        )
        for i in range(image_count * batch_count)
    )
    return PaintJob(pictures, image_count, media_type, 90, PreviewPlan(interval=preview_interval))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "zero-snr": tiny_diffusion.make_folder(root / "zero-snr", tiny_diffusion.ZERO_SNR),
        "plain": tiny_diffusion.make_folder(root / "plain", tiny_diffusion.PLAIN, preview=False),
        "flow": tiny_diffusion.make_flow_folder(root / "flow"),
    }


class Families:
    """The checkpoint families (tests/support/diffusion_families.py), each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, family: str) -> Path:
        """In diffusers' layout."""
        folder = self._root / family
        return folder if folder.is_dir() else diffusion_families.MAKERS[family](folder)

    def file(self, family: str) -> Path:
        """One safetensors file in the family's original layout."""
        file = self._root / f"{family}.safetensors"
        return file if file.is_file() else original_layouts.write(self.folder(family), file)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def settings(folders: dict[str, Path]) -> Settings:
    return Settings(models={name: ModelSettings(source=str(folder)) for name, folder in folders.items()}, threads=1)


@pytest.fixture(scope="session")
def engine(settings: Settings) -> Iterator[DiffusionEngine]:
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield create_engine(settings.model_dump_json())
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture
def driver(engine: DiffusionEngine) -> Iterator[Driver]:
    yield Driver(engine)
    assert not engine.busy, "a test left work behind"
