"""What a picture lays over the modules that it shares with its neighbours, and the switching between pictures.

LoRAs, FreeU, IP-Adapters and attention processors change the shared modules. An `Overlay` says what one picture wants;
before every turn of its lane the engine calls `OverlaySwitch.to` with it, and the shared modules are as that picture
needs them. Pictures that want nothing pass None and find the modules exactly as they were loaded. A lane that ends in
the middle needs no care: the next one's turn begins with a switch, too.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from services.diffusion.domain import FreeU
from services.diffusion.engine.image_prompts import ImagePromptSet
from services.diffusion.engine.loras import LoadedLora, Loras


@dataclass(eq=False)
class Overlay:
    """Of one picture, for as long as it is painted.

    loras: with their weights, in the order they are added up. processors: attention processors as the
    picture's own pipeline left them at its last turn, for perturbed-attention guidance sets its own; [] before it.
    """

    loras: tuple[tuple[LoadedLora, float], ...] = ()
    freeu: FreeU | None = None
    image_prompts: ImagePromptSet | None = None
    image_prompt_scales: tuple[float, ...] = ()
    processors: list[Any] = field(default_factory=list)


_NOTHING = Overlay()


class OverlaySwitch:
    """Of one model. Not for threads: the engine's is the only one that runs it."""

    def __init__(self, denoiser: Any, loras: Loras) -> None:
        self._denoiser = denoiser
        self._loras = loras
        named = [(name, module) for name, module in denoiser.named_modules() if hasattr(module, "set_processor")]
        self._names = [f"{name}.processor" for name, _ in named]
        self._attentions = [module for _, module in named]
        self._plain = [module.processor for module in self._attentions]
        self._projection = getattr(denoiser, "encoder_hid_proj", None)
        self._projection_kind = denoiser.config.get("encoder_hid_dim_type")
        self._applied = _NOTHING

    def to(self, overlay: Overlay | None) -> None:
        """Make the shared modules those of a picture; None for one that wants nothing. Nothing to do when they are."""
        wanted = overlay or _NOTHING
        before = self._applied
        if wanted is before:
            return
        self._applied = wanted
        if before is not _NOTHING:
            before.processors = [module.processor for module in self._attentions]
        self._set_processors(wanted)
        if wanted.loras != before.loras:
            self._loras.put_in(wanted.loras)
        if wanted.freeu != before.freeu:
            self._set_freeu(wanted.freeu)
        if wanted.image_prompts is not before.image_prompts:
            self._set_projection(wanted.image_prompts)
        if wanted.image_prompts is not None:
            wanted.image_prompts.scale(wanted.image_prompt_scales)

    def _set_processors(self, overlay: Overlay) -> None:
        if overlay.processors:
            wanted = overlay.processors
        elif overlay.image_prompts is not None:
            wanted = [
                overlay.image_prompts.processors.get(*pair) for pair in zip(self._names, self._plain, strict=True)
            ]
        else:
            wanted = self._plain
        for module, processor in zip(self._attentions, wanted, strict=True):
            if module.processor is not processor:
                # One that has weights is a submodule and does not make way by itself. diffusers' own setter also
                # writes a log line a layer.
                module._modules.pop("processor", None)
                module.processor = processor

    def _set_freeu(self, freeu: FreeU | None) -> None:
        if freeu is None:
            self._denoiser.disable_freeu()
        else:
            # diffusers takes a factor of 0 for FreeU switched off.
            factors = {name: getattr(freeu, name) or sys.float_info.min for name in ("s1", "s2", "b1", "b2")}
            self._denoiser.enable_freeu(**factors)

    def _set_projection(self, prompts: ImagePromptSet | None) -> None:
        self._denoiser.encoder_hid_proj = self._projection if prompts is None else prompts.projection
        self._denoiser.config.encoder_hid_dim_type = self._projection_kind if prompts is None else "ip_image_proj"
