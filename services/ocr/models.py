"""The front's view of the models: which there are, which a call means, and loading one that a call needs."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec

from services.kit import faults
from services.kit.device import Device
from services.kit.engine_api import Finished, Raw, Update
from services.kit.engine_host import EngineHost, engine_not_ready
from services.ocr import catalog, languages
from services.ocr.catalog import KnownModel
from services.ocr.domain import EngineInfo, Loading, LoadJob, ModelInfo, ModelState, UnloadJob
from services.ocr.languages import Speaker
from services.ocr.settings import Settings


class ListedModel(msgspec.Struct, frozen=True):
    """A model as ListModels shows it."""

    name: str
    state: ModelState
    is_default: bool
    languages: tuple[str, ...]
    file_bytes: int  # of its weights on disk; 0 where not known
    info: ModelInfo | None  # of the last time it was loaded


class Models:
    """Answers from what the engine said last and from the folders; asks the engine to load and unload."""

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        self._host = host
        self._settings = settings
        self._raw: Raw | None = None
        self._info = EngineInfo(())
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

    async def chosen(self, name: str, hints: Sequence[str] = ()) -> ModelInfo:
        """The model that a call means, loaded first if it is not.

        The one it names, else that of the first language hint that a known model declares, else the default one.
        Raises Fault: NOT_FOUND for a name, INVALID_ARGUMENT for a hint, whatever keeps the model from being loaded.
        """
        info = self.engine_info()
        _check_hints(hints)
        if not name and hints:
            name = await self._speaking(hints)
        loaded = info.find(name or self._settings.default_model_name)
        return loaded or await self._load(await self.known(name or self._settings.default_model_name, field="model"))

    async def known(self, name: str, *, field: str) -> str:
        """The name, if it is a known model's; raises Fault (NOT_FOUND, or INVALID_ARGUMENT when it is empty)."""
        if not name:
            raise faults.invalid_field(field, "it is empty; name a model that ListModels shows")
        known = await self._known()
        if name not in known and self.engine_info().find(name) is None:
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
        if name in models:
            return models[name]
        return ListedModel(name, "unloaded", False, (), 0, self._remembered.get(name))  # its folder is gone

    def device(self) -> Device:
        """What the engine computes on; unknown before it said so."""
        return Device() if self._host.info is None else self.engine_info().device

    async def listed(self) -> list[ListedModel]:
        """Every known model, and those that are loaded though their folder is gone; the default one first."""
        info = EngineInfo(()) if self._host.info is None else self.engine_info()
        known = await self._known()
        loaded = {model.name: model for model in info.models}
        names = [*known, *(name for name in loaded if name not in known)]
        sizes = await asyncio.to_thread(self._cards, [known[name] for name in names if name in known])
        at_start = self._settings.names_at_start

        def state(name: str) -> ModelState:
            if not self._host.ready:
                return "loading" if name in at_start else "unloaded"
            if name in loaded:
                return "ready"
            return "loading" if name in info.loading else "unloaded"

        models = []
        for name in names:
            file_bytes, declared = sizes.get(name, (0, ()))
            last = loaded.get(name) or self._remembered.get(name)
            spoken = last.languages if last is not None and not declared else declared
            is_default = name == self._settings.default_model_name
            models.append(ListedModel(name, state(name), is_default, spoken, file_bytes, last))
        return sorted(models, key=lambda model: not model.is_default)

    async def _load(self, name: str) -> ModelInfo:
        async for progress in self.load(LoadJob(name)):
            if isinstance(progress, ModelInfo):
                return progress
        raise faults.internal("the engine ended a load without a result")

    async def _speaking(self, hints: Sequence[str]) -> str:
        models = [
            Speaker(model.name, model.languages, model.state == "ready", model.is_default)
            for model in await self.listed()
        ]
        name = languages.choose(hints, models)
        if name is None:
            there = ", ".join(languages.known(models)) or "none"
            raise faults.invalid_field(
                "language_hints",
                f"no model declares any of {', '.join(hints)}; declared are: {there}",
                reason="UNKNOWN_LANGUAGE",
                known_languages=there,
            )
        return name

    async def _known(self) -> dict[str, KnownModel]:
        # Looked at on a thread: the folder may lie on a slow disk.
        return await asyncio.to_thread(catalog.known_models, self._settings)

    def _cards(self, models: list[KnownModel]) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Size on disk and declared languages by name."""
        cards = {}
        for model in models:
            folder = catalog.folder_of(model.source)
            spoken = catalog.languages_of(model.name, folder, self._settings)
            cards[model.name] = (catalog.file_bytes(folder) if folder else 0, spoken)
        return cards


def _check_hints(hints: Sequence[str]) -> None:
    if len(hints) > languages.HINTS_MOST:
        raise faults.invalid_field(
            "language_hints",
            f"{len(hints)} hints are more than the limit of {languages.HINTS_MOST}",
            limit=languages.HINTS_MOST,
        )
    bad = [
        faults.FieldViolation(
            f"language_hints[{index}]", f"{hint[:40]!r} is not a BCP 47 language tag, such as fr or uk-UA"
        )
        for index, hint in enumerate(hints)
        if not languages.is_tag(hint)
    ]
    if bad:
        raise faults.invalid_fields(bad)
