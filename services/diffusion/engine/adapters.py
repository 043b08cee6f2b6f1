"""The LoRAs, embeddings, IP-Adapters and controls of one model: read on first use, the least recently used dropped.

Everything that can be wrong with one is said before a picture that asks for it is begun.
"""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from services.diffusion import adapters_catalog as catalog
from services.diffusion.adapters_catalog import Known, KnownAdapter
from services.diffusion.domain import Parameters
from services.diffusion.engine import adapter_files, controls, image_prompts
from services.diffusion.engine.adapter_files import Unfit, Unusable
from services.diffusion.engine.controls import LoadedControl
from services.diffusion.engine.embeddings import Embeddings
from services.diffusion.engine.image_prompts import ImagePromptSet
from services.diffusion.engine.loras import LoadedLora, Loras
from services.diffusion.engine.overlay import Overlay, OverlaySwitch
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.faults import Fault, FaultData, FieldViolation, Kind
from services.runtimes.graph_diffusion import is_compiled
from services.runtimes.torch_diffusion import BUILDING

log = logging.getLogger(__name__)

AdapterKey = tuple[str, ...]  # kind and name, or names where several are loaded together

T = TypeVar("T")


class Model(Protocol):
    """What is needed of a LoadedModel."""

    name: str
    pipeline: Any
    denoiser: Any


@dataclass(frozen=True)
class _Spared:
    """What is not dropped to make room: what other pictures use, and what this one needs together."""

    held: frozenset[AdapterKey]
    needed: frozenset[AdapterKey]


@dataclass(frozen=True)
class _Kept:
    thing: Any
    stamp: tuple[Any, ...]  # of its files when they were read
    drop: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Held:
    """What one picture lays on its model, in memory for as long as the picture is painted.

    overlay: for `OverlaySwitch.to` before each of its turns; None if it wants the shared modules as they are.
    embeddings: names whose words its prompts use. uses: kind and name of all of it.
    """

    overlay: Overlay | None
    controls: tuple[LoadedControl, ...]  # by parameters.controls
    embeddings: tuple[str, ...]
    uses: frozenset[AdapterKey]
    _table: Embeddings

    @property
    def controlnets(self) -> list[Any]:
        """The modules that a ControlNet pipeline is made with."""
        return [control.module for control in self.controls if control.kind == "controlnet"]

    @property
    def t2i_adapters(self) -> list[Any]:
        """The modules that make residuals for the U-Net of a condition."""
        return [control.module for control in self.controls if control.kind == "t2i_adapter"]

    def prompt(self, text: str) -> str:
        """A prompt as the tokenizers must see it, its embeddings exchanged for tokens; before it is parsed."""
        return self._table.laid_in(text, self.embeddings)

    def readable(self, text: str) -> str:
        """Text that came out of a tokenizer, as the caller would write it."""
        return self._table.readable(text)

    def image_prompt_embeds(self, pipeline: Any, images: Sequence[Image.Image], *, guided: bool) -> list[Tensor] | None:
        """The argument ip_adapter_image_embeds of a pipeline's call; None without image prompts.

        images: by parameters.image_prompts. guided: whether the call uses classifier-free guidance.
        """
        if self.overlay is None or self.overlay.image_prompts is None:
            return None
        return self.overlay.image_prompts.embeds(pipeline, images, guided=guided)


class Adapters:
    """Made when the model is loaded, with nothing laid over it; lives as long as the model."""

    def __init__(self, model: Model, settings: Settings) -> None:
        # Not the model itself: who keeps these by model must be able to let it go.
        self._name, self._pipeline, self._denoiser = model.name, model.pipeline, model.denoiser
        self._settings = settings
        self._loras = Loras(model.pipeline)
        self._embeddings = Embeddings(model.pipeline)
        self._kept: OrderedDict[AdapterKey, _Kept] = OrderedDict()  # the least recently used first
        self.switch = OverlaySwitch(model.denoiser, self._loras)

    @property
    def kept(self) -> tuple[AdapterKey, ...]:
        """Kind and name of what is in memory, the least recently used first."""
        return tuple(self._kept)

    def hold(self, parameters: Parameters, *, under_way: Iterable["Held"] = ()) -> "Held":
        """What a picture lays on the model, read where it is not in memory. Not for the middle of another's turn.

        under_way: those of all pictures that are being painted with this model; nothing of theirs is dropped. A file
        that changed is read again once nobody uses what it was.

        Raises Fault: NOT_FOUND for a name that is not known, INVALID_ARGUMENT for what does not fit the model,
        FAILED_PRECONDITION for a file that cannot be used; each names the field.
        """
        if parameters.freeu is not None and not hasattr(self._denoiser, "enable_freeu"):
            raise faults.invalid_field("freeu", f"{self._name} has no U-Net, which FreeU needs; leave it out")
        words = self._words(parameters)
        loras = _summed(parameters)
        if is_compiled(self._denoiser):
            self._refuse_layers(parameters, words, loras)
        prompts = tuple(one.adapter for one in parameters.image_prompts)
        needed: set[AdapterKey] = {("lora", name) for name in loras} | {("embedding", word) for word in words}
        needed |= {("control", one.model) for one in parameters.controls}
        needed |= {("adapter", *prompts)} if prompts else set()
        held = frozenset(itertools.chain.from_iterable(one.uses for one in under_way))
        spared = _Spared(held, frozenset(needed))
        overlay = Overlay(
            loras=tuple((self._lora(name, parameters, spared), weight) for name, weight in loras.items()),
            freeu=parameters.freeu,
            image_prompts=self._image_prompts(prompts, spared) if prompts else None,
            image_prompt_scales=tuple(one.scale for one in parameters.image_prompts),
        )
        # Perturbed-attention guidance is laid over by the picture's own pipeline.
        wanted = loras or prompts or parameters.freeu is not None or parameters.perturbed_attention is not None
        return Held(
            overlay=overlay if wanted else None,
            controls=tuple(self._control(i, one.model, spared) for i, one in enumerate(parameters.controls)),
            embeddings=tuple(self._embedding(word, field, spared) for word, field in words.items()),
            uses=frozenset(needed),
            _table=self._embeddings,
        )

    def _refuse_layers(self, parameters: Parameters, words: Mapping[str, str], loras: Iterable[str]) -> None:
        """Raise Fault (FAILED_PRECONDITION) for what changes layers of torch: a compiled model has none."""
        wanted = [_lora_field(name, parameters) for name in loras]
        wanted += ["image_prompts"] if parameters.image_prompts else []
        wanted += ["perturbed_attention"] if parameters.perturbed_attention is not None else []
        wanted += ["freeu"] if parameters.freeu is not None else []
        wanted += words.values()
        for field in wanted:
            what = "an embedding" if field in words.values() else "it"
            description = (
                f"{what} changes layers of torch, and {self._name} runs as compiled graphs; leave it out, or load the"
                " model with runtime torch"
            )
            raise Fault(
                FaultData(
                    Kind.FAILED_PRECONDITION,
                    "NEEDS_TORCH",
                    f"{field}: {description}",
                    fields=(FieldViolation(field, description),),
                    metadata={"field": field, "model": self._name},
                )
            )

    # --- one of each kind ---

    def _words(self, parameters: Parameters) -> dict[str, str]:
        """The embeddings of the prompts, each with the field it was first found in."""
        if parameters.prompt_syntax == "plain":
            return {}
        known = catalog.known_embeddings(self._settings)
        names = [name for name, one in known.items() if one.fits(self._name)]
        found: dict[str, str] = {}
        for field in ("prompt", "negative_prompt"):
            for word in catalog.embeddings_in(getattr(parameters, field), names):
                found.setdefault(word, field)
        return found

    def _lora(self, name: str, parameters: Parameters, spared: _Spared) -> LoadedLora:
        field = _lora_field(name, parameters)
        known = self._allowed("lora", name, catalog.known_loras(self._settings), field)

        def read() -> tuple[LoadedLora, Callable[[], None]]:
            file = _file(known)
            adapter_files.check_lora(self._pipeline, adapter_files.header_of(file))
            return self._loras.load(file), _nothing

        return self._keep(("lora", name), [_file(known)], field, spared, read)

    def _embedding(self, word: str, field: str, spared: _Spared) -> str:
        known = self._allowed("embedding", word, catalog.known_embeddings(self._settings), field)

        def read() -> tuple[str, Callable[[], None]]:
            self._embeddings.load(word, _file(known))
            return word, lambda: self._embeddings.drop(word)

        return self._keep(("embedding", word), [_file(known)], field, spared, read)

    def _image_prompts(self, names: tuple[str, ...], spared: _Spared) -> ImagePromptSet:
        known = catalog.known_image_prompt_adapters(self._settings)
        rows = [self._allowed("adapter", name, known, f"image_prompts[{i}].adapter") for i, name in enumerate(names)]

        def read() -> tuple[ImagePromptSet, Callable[[], None]]:
            files = [(_file(row), row.image_encoder) for row in rows]
            return image_prompts.load(self._pipeline, files), _nothing

        field = "image_prompts[0].adapter" if len(names) == 1 else "image_prompts"
        return self._keep(("adapter", *names), [_file(row) for row in rows], field, spared, read)

    def _control(self, index: int, name: str, spared: _Spared) -> LoadedControl:
        field = f"controls[{index}].model"
        control = self._allowed("control", name, catalog.known_controls(self._settings), field)

        def read() -> tuple[LoadedControl, Callable[[], None]]:
            loaded = controls.load(control, self._pipeline, self._denoiser, self._settings)
            return loaded, loaded.close

        return self._keep(("control", name), sorted(control.folder.glob("*.safetensors")), field, spared, read)

    # --- what is in memory ---

    def _allowed(self, kind: str, name: str, known: Mapping[str, Known], field: str) -> Known:
        """The known one of that name. Raises Fault if there is none, it cannot be used or is for other models."""
        model = self._name
        one = known.get(name)
        if one is None:
            raise faults.not_found(kind, name, catalog.fitting(known, model), field=field)
        if one.trouble:
            raise _unusable(kind, field, name, one.trouble)
        if not one.fits(model):
            raise _unfit(kind, field, name, model, f"its operator set it up for {', '.join(one.models)}")
        return one

    def _keep(
        self,
        key: AdapterKey,
        files: Sequence[Path],
        field: str,
        spared: _Spared,
        read: Callable[[], tuple[T, Callable[[], None]]],
    ) -> T:
        """The thing of that key, read if need be; `read` answers it and how it is dropped. Raises Fault."""
        kept = self._kept.get(key)
        stamp = tuple(map(_stamp, files))
        if kept is not None and (kept.stamp == stamp or key in spared.held):
            self._kept.move_to_end(key)
            found: T = kept.thing
            return found
        kind, name = key[0], ", ".join(key[1:])
        self.switch.to(None)
        if kept is not None:
            self._drop(key)
        self._make_room(spared.held | spared.needed)
        try:
            with BUILDING:
                thing, drop = read()
        except Unfit as error:
            raise _unfit(kind, field, name, self._name, str(error)) from error
        except Unusable as error:
            raise _unusable(kind, field, name, str(error)) from error
        except Exception as error:
            log.exception("%s %s of model %s cannot be loaded", kind, name, self._name)
            raise _unusable(kind, field, name, f"it could not be loaded ({type(error).__name__})") from error
        self._kept[key] = _Kept(thing, stamp, drop)
        return thing

    def _make_room(self, spared: frozenset[AdapterKey]) -> None:
        for key in list(self._kept):
            if len(self._kept) < self._settings.adapters_kept:
                return
            if key not in spared:
                self._drop(key)

    def _drop(self, key: AdapterKey) -> None:
        self.switch.to(None)
        self._kept.pop(key).drop()


def _summed(parameters: Parameters) -> dict[str, float]:
    """The LoRAs by name; one that is named twice, as in the prompt and beside it, counts with both weights."""
    weights: dict[str, float] = {}
    for one in parameters.loras:
        weights[one.name] = weights.get(one.name, 0.0) + one.weight
    return {name: weight for name, weight in weights.items() if weight}


def _lora_field(name: str, parameters: Parameters) -> str:
    """The request's field that named the LoRA."""
    for text in (parameters.prompt_template, parameters.prompt):
        if f"<lora:{name}:" in text or f"<lora:{name}>" in text:
            return "prompt"
    return f"loras[{[one.name for one in parameters.loras].index(name)}].name"


def _file(known: KnownAdapter) -> Path:
    assert known.file is not None, "what has no file is in trouble, and refused before"
    return known.file


def _stamp(file: Path) -> tuple[int, int] | None:
    """Changes when the file is written anew."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _nothing() -> None:
    """What letting go of takes no more than forgetting it."""


def _unfit(kind: str, field: str, name: str, model: str, why: str) -> Fault:
    return faults.invalid_field(
        field, f"{name} does not fit {model}: {why}", reason=f"{kind.upper()}_UNFIT", name=name, model=model
    )


def _unusable(kind: str, field: str, name: str, why: str) -> Fault:
    description = f"{name} cannot be used: {why}"
    return Fault(
        FaultData(
            Kind.FAILED_PRECONDITION,
            f"{kind.upper()}_UNUSABLE",
            f"{field}: {description}",
            fields=(FieldViolation(field, description),),
            metadata={"field": field, "name": name},
        )
    )
