"""Diffusion models that come and go while the service serves, as callers see them."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2 as pb
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from services.diffusion.__main__ import build
from services.diffusion.settings import ModelSettings, Settings
from services.kit.server import ServiceServer
from tests.support import diffusion_families, original_layouts, tiny_diffusion

pytestmark = pytest.mark.asyncio(loop_scope="module")

READY, UNLOADED = common_pb2.MODEL_STATE_READY, common_pb2.MODEL_STATE_UNLOADED


@dataclass
class Service:
    server: ServiceServer
    stub: Any
    folder: Path

    async def models(self) -> dict[str, Any]:
        return {m.name: m for m in (await self.stub.ListModels(pb.ListModelsRequest())).models}

    async def load(self, name: str) -> list[Any]:
        return [event async for event in self.stub.LoadModel(pb.LoadModelRequest(name=name))]

    async def unload(self, name: str) -> Any:
        return (await self.stub.UnloadModel(pb.UnloadModelRequest(name=name))).model

    def generate(self, name: str = "", **fields: Any) -> Any:
        fields = {"prompt": "red panda", "seed": 7, "step_count": 3, **fields}
        return self.stub.Generate(pb.GenerateRequest(model=name, **fields))

    async def paint(self, name: str = "", **fields: Any) -> bytes:
        responses = [response async for response in self.generate(name, **fields)]
        return bytes(responses[-1].result.images[0].image.content)

    async def refused(self, call: Any) -> tuple[str, str, str]:
        """Code, reason and message that the call ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        status = rpc_status.from_call(caught.value)
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        return caught.value.code().name, info.reason, status.message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: default, second, third and broken; beside it a single file."""
    root = tmp_path_factory.mktemp("models")
    for name in ("default", "second", "third"):
        tiny_diffusion.make_folder(root / name, tiny_diffusion.PLAIN, preview=False)
    shutil.copytree(root / "second", root / "broken")
    weights = root / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    diffusion_families.make_sd15(root / "sd15")
    original_layouts.write(root / "sd15", root / "sd15.safetensors")
    return root


async def serving(folder: Path, **options: Any) -> AsyncIterator[Service]:
    settings = Settings(
        port=0,
        models={
            "default": ModelSettings(source=str(folder / "default")),
            "one-file": ModelSettings(source=str(folder / "sd15.safetensors"), config=str(folder / "sd15")),
        },
        model_folder=str(folder),
        load_at_start=["default"],
        threads=1,
        **options,
    )
    server = build(settings)
    await server.start()
    try:
        await server.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Service(server, diffusion_pb2_grpc.DiffusionServiceStub(channel), folder)
    finally:
        await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(folder: Path) -> AsyncIterator[Service]:
    async for running in serving(folder):
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(folder: Path, service: Service) -> AsyncIterator[Service]:
    """A service with room for two of the small models."""
    each = (await service.models())["default"].memory_bytes
    async for running in serving(folder, memory_limit_bytes=int(2.5 * each)):
        yield running


async def test_models_of_the_folder_are_known_and_not_loaded(service: Service) -> None:
    models = await service.models()
    assert set(models) == {"default", "one-file", "second", "third", "broken", "sd15"}
    assert next(iter(models)) == "default"
    default, second = models["default"], models["second"]
    assert (default.state, default.is_default) == (READY, True)
    assert default.memory_bytes >= 4 * default.parameter_count
    assert "image" in default.features
    assert "ddim" in default.schedulers
    assert (second.state, second.hardware, second.memory_bytes) == (UNLOADED, "", 0)
    assert second.file_bytes == default.file_bytes > 0
    assert models["one-file"].file_bytes == (service.folder / "sd15.safetensors").stat().st_size


async def test_loading_tells_its_stages_and_ends_with_the_model(service: Service) -> None:
    events = await service.load("second")
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert [e.progress.stage for e in events[:-1]] == [
        pb.LOAD_STAGE_WAITING,
        pb.LOAD_STAGE_READING_WEIGHTS,
        pb.LOAD_STAGE_WARMING,
    ]
    loaded = events[-1].result.model
    assert (loaded.name, loaded.state) == ("second", READY)
    assert loaded == (await service.models())["second"]
    assert [e.WhichOneof("event") for e in await service.load("second")] == ["result"]
    unloaded = await service.unload("second")
    assert unloaded == (await service.models())["second"]
    assert (unloaded.state, unloaded.memory_bytes) == (UNLOADED, 0)
    assert unloaded.default_width == tiny_diffusion.SIDE  # still known from when it was loaded


async def test_a_call_loads_the_model_it_names(service: Service) -> None:
    await service.unload("third")
    first = await service.paint("third")
    assert (await service.models())["third"].state == READY
    assert await service.paint("third") == first


async def test_limits_are_those_of_the_model_that_is_loaded_for_the_call(service: Service) -> None:
    await service.unload("third")
    code, _, message = await service.refused(service.paint("third", width=33))
    assert code == "INVALID_ARGUMENT"
    assert "33 is not a multiple of 8" in message


async def test_a_single_file_is_served_like_any_other(service: Service) -> None:
    fields = {"scheduler": "ddim", "guidance_scale": 5.0, "output": pb.OutputOptions(media_type="image/jpeg")}
    ours = await service.paint("one-file", **fields)
    theirs = await service.paint("sd15", **fields)
    assert ours.replace(b"one-file", b"") != theirs  # the parameters name the model
    assert ours[-2000:] == theirs[-2000:]  # the pixels are the same


async def test_many_callers_share_one_load(service: Service) -> None:
    await service.unload("third")
    pictures = await asyncio.gather(*(service.paint("third") for _ in range(5)))
    assert len(set(pictures)) == 1


async def test_painting_goes_on_while_a_model_is_loaded(service: Service) -> None:
    before = await service.paint()
    await service.unload("second")
    course = service.stub.LoadModel(pb.LoadModelRequest(name="second"))
    told = []
    async for event in course:
        told.append(event.WhichOneof("event"))
        if told == ["progress"]:
            assert await service.paint() == before
    assert told[-1] == "result"


async def test_a_failed_load_leaves_everything_serving(service: Service) -> None:
    before = await service.paint()
    code, reason, message = await service.refused(service.load("broken"))
    assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_UNUSABLE")
    assert "model broken: vae: diffusion_pytorch_model.safetensors is not a whole safetensors file" in message
    assert (await service.refused(service.paint("broken")))[1] == "MODEL_UNUSABLE"
    models = await service.models()
    assert (models["broken"].state, models["default"].state) == (UNLOADED, READY)
    assert await service.paint() == before


async def test_a_model_in_use_is_unloaded_when_its_calls_are_done(service: Service) -> None:
    await service.load("second")
    stream = service.generate("second", step_count=40)
    while not (await stream.read()).HasField("progress"):
        pass
    unloading = asyncio.create_task(service.unload("second"))
    while not (await stream.read()).HasField("result"):
        pass
    assert (await unloading).state == UNLOADED


async def test_a_folder_written_while_serving_can_be_painted_with(service: Service) -> None:
    assert (await service.refused(service.paint("fresh")))[:2] == ("NOT_FOUND", "MODEL_NOT_FOUND")
    shutil.copytree(service.folder / "third", service.folder / ".fresh")
    (service.folder / ".fresh").rename(service.folder / "fresh")
    try:
        assert (await service.load("fresh"))[-1].result.model.name == "fresh"
    finally:
        shutil.rmtree(service.folder / "fresh")
    # It serves until it is unloaded, and is gone then.
    await service.paint("fresh")
    assert (await service.unload("fresh")).state == UNLOADED
    assert "fresh" not in await service.models()


@pytest.mark.parametrize("name", ["", "nobody", "../models/second", "/etc", ".", "second/..", "x" * 100_000])
async def test_names_are_no_paths(service: Service, name: str) -> None:
    wanted = ("INVALID_ARGUMENT", "INVALID_FIELD") if not name else ("NOT_FOUND", "MODEL_NOT_FOUND")
    for call in (service.load(name), service.unload(name)):
        code, reason, message = await service.refused(call)
        assert (code, reason) == wanted
        assert len(message) < 400


async def test_the_least_recently_used_model_leaves_when_memory_is_short(narrow: Service) -> None:
    await narrow.load("second")
    await narrow.paint("default")
    events = await narrow.load("third")
    assert list(events[-2].progress.evicted_models) == ["second"]
    states = {name: model.state for name, model in (await narrow.models()).items()}
    assert (states["default"], states["second"], states["third"]) == (READY, UNLOADED, READY)


async def test_no_call_is_lost_when_models_take_turns_in_memory(narrow: Service) -> None:
    names = ("default", "second", "third") * 4
    pictures = await asyncio.gather(*(narrow.paint(name) for name in names))
    assert len(set(pictures)) == 3


async def test_what_is_larger_than_the_memory_for_all_is_refused(narrow: Service) -> None:
    code, reason, message = await narrow.refused(narrow.load("sd15"))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "MODEL_TOO_LARGE")
    assert "memory_limit_bytes" in message
    assert await narrow.paint()
