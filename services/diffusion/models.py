"""The front's view of the models: which there are, which a call means, and loading one that a call needs."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from services.diffusion import catalog
from services.diffusion.domain import EngineInfo, Loading, LoadJob, ModelInfo, ModelState, UnloadJob
from services.diffusion.settings import ModelSettings, Settings
from services.kit import faults
from services.kit.device import Device
from services.kit.engine_api import Finished, Raw, Update
from services.kit.engine_host import EngineHost, engine_not_ready


class ListedModel(msgspec.Struct, frozen=True):
    """A model as ListModels shows it."""

    name: str
    state: ModelState
    is_default: bool
    file_bytes: int  # of its weights on disk; 0 where not known
    vaes: tuple[str, ...]
    info: ModelInfo | None  # of the last time it was loaded
    hardware: str = ""  # where it is loaded
    runtime: str = ""


class Models:
    """Answers from what the engine said last and from the folders; asks the engine to load and unload."""

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        self._host = host
        self._settings = settings
        self._raw: Raw | None = None
        self._info = EngineInfo("", "", ())
        self._remembered: dict[str, ModelInfo] = {}  # as they were when loaded last

    def engine_info(self) -> EngineInfo:
        """What the engine said of itself last; raises Fault (ENGINE_NOT_READY) before it said anything."""
        raw = self._host.info
        if raw is None:
            raise engine_not_ready()
        if raw is not self._raw:
            self._raw, self._info = raw, msgspec.msgpack.decode(raw, type=EngineInfo)
            self._remembered.update((info.name, info) for info in self._info.models)
        return self._info

    async def chosen(self, name: str, *, field: str = "model") -> ModelInfo:
        """The model that a call names, the default one for an empty name; loaded first if it is not.

        field: of the request, for the fault. Raises Fault: NOT_FOUND, or whatever keeps the model from being loaded.
        """
        name = name or self._settings.model_of_empty_name
        loaded = self.engine_info().model(name)
        return loaded or await self._load(await self.known(name, field=field))

    async def known(self, name: str, *, field: str) -> str:
        """The name, if it is a known model's; raises Fault (NOT_FOUND, or INVALID_ARGUMENT when it is empty)."""
        if not name:
            raise faults.invalid_field(field, "it is empty; name a model that ListModels shows")
        known = await self._known()
        if name not in known and self.engine_info().model(name) is None:
            raise faults.not_found("model", name, known, field=field)
        return name

    async def load(self, job: LoadJob) -> AsyncGenerator[Loading | ModelInfo]:
        """Load a known model; yields where it stands and the loaded model last."""
        async with self._host.control() as control:
            control.start(job)
            async for event in control:
                match event:
                    case Update(payload=payload):
                        yield msgspec.msgpack.decode(payload, type=Loading)
                    case Finished(payload=payload):
                        info = msgspec.msgpack.decode(payload, type=ModelInfo)
                        self._remembered[job.model] = info
                        yield info

    async def unload(self, name: str) -> ListedModel:
        """Free a known model's memory once the calls in it are done."""
        async with self._host.control() as job:
            job.start(UnloadJob(name))
            async for _ in job:
                pass
        models = {model.name: model for model in await self.listed()}
        # None where its folder is gone.
        return models.get(name) or ListedModel(name, "unloaded", False, 0, (), self._remembered.get(name))

    def loaded(self, info: ModelInfo) -> ListedModel:
        """A model that was just loaded, as `listed` shows it."""
        engine = self.engine_info()
        is_default = info.name == self._settings.model_of_empty_name
        return ListedModel(
            info.name, "ready", is_default, info.file_bytes, info.vaes, info, engine.hardware, info.runtime
        )

    def device(self) -> Device:
        """What the engine computes on; unknown before it said so."""
        return Device() if self._host.info is None else self.engine_info().device

    async def listed(self) -> list[ListedModel]:
        """Every known model, and those that are loaded though their folder is gone; the default one first."""
        info = EngineInfo("", "", ()) if self._host.info is None else self.engine_info()
        known = await self._known()
        loaded = {model.name: model for model in info.models}
        sizes = await asyncio.to_thread(lambda: {name: catalog.file_bytes(row) for name, row in known.items()})
        at_start = self._settings.names_at_start

        def listed(name: str) -> ListedModel:
            if not self._host.ready:
                state: ModelState = "loading" if name in at_start else "unloaded"
            elif name in loaded:
                state = "ready"
            else:
                state = "loading" if name in info.loading else "unloaded"
            last = loaded.get(name) or self._remembered.get(name)
            row = known.get(name)
            is_default = name == self._settings.model_of_empty_name
            vaes = tuple(row.vaes) if row is not None else ()
            file_bytes = last.file_bytes if last is not None else sizes.get(name, 0)
            runtime = loaded[name].runtime if name in loaded else ""
            return ListedModel(name, state, is_default, file_bytes, vaes, last, info.hardware, runtime)

        names = [*known, *(name for name in loaded if name not in known)]
        return sorted(map(listed, names), key=lambda model: not model.is_default)

    async def _load(self, name: str) -> ModelInfo:
        async for progress in self.load(LoadJob(name)):
            if isinstance(progress, ModelInfo):
                return progress
        raise faults.internal("the engine ended a load without a result")

    async def _known(self) -> dict[str, ModelSettings]:
        # Looked at on a thread: the folder may lie on a slow disk.
        return await asyncio.to_thread(catalog.known_models, self._settings)
