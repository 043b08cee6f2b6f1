"""LoRAs of one model, kept beside it and put in for as long as a picture that asks for them has its turn.

diffusers loads a LoRA by wrapping the layers that it changes. Here the wrappers stand aside afterwards: the model's own
layers are in place unless a picture wants otherwise, so a picture without LoRAs runs exactly the model as it was
loaded, at its speed. Putting a LoRA in is one dictionary entry a layer. Each LoRA has wrappers of its own, put around
each other where several change one layer: transformers, loading a second one into a text encoder, would find the
weights of the first missing from the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from services.diffusion.engine.adapter_files import lora_parts

_ADAPTER = "lora"  # to peft, every LoRA is the only one


@dataclass(frozen=True, eq=False)
class _Site:
    """A place in the model where a LoRA stands."""

    parent: nn.Module
    name: str  # of the layer, within its parent
    base: nn.Module
    wrapper: Any  # peft's layer around the base

    def put(self, module: nn.Module) -> None:
        # Assigning the attribute would do the same, at ten times the cost.
        self.parent._modules[self.name] = module


@dataclass(frozen=True, eq=False)
class LoadedLora:
    """A LoRA in memory."""

    sites: tuple[_Site, ...]


class Loras:
    """Puts LoRAs into the parts of one pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._parts = lora_parts(pipeline)
        self._in: dict[tuple[nn.Module, str], _Site] = {}  # by place

    def load(self, file: Path) -> LoadedLora:
        """Read a LoRA that `check_lora` has passed; the model is as it was loaded afterwards, whatever is raised."""
        self.put_in(())
        try:
            self._pipeline.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=_ADAPTER,
                use_safetensors=True,
                local_files_only=True,
            )
        finally:
            sites = [site for part in self._parts.values() for site in _take_out(part)]
        return LoadedLora(tuple(sites))

    def put_in(self, loras: Sequence[tuple[LoadedLora, float]]) -> None:
        """Let these LoRAs, added up in this order with these weights, change the model, and no others."""
        for site in self._in.values():
            site.put(site.base)
        self._in = {}
        for lora, weight in loras:
            for site in lora.sites:
                place = site.parent, site.name
                below = self._in.get(place)
                site.wrapper._modules["base_layer"] = site.base if below is None else below.wrapper
                site.wrapper.set_scale(_ADAPTER, weight)
                site.put(site.wrapper)
                self._in[place] = site


def _take_out(part: nn.Module) -> list[_Site]:
    """Put the part's own layers back where wrappers are, and let it forget that it ever had any."""
    sites = []
    for path, wrapper in [pair for pair in part.named_modules() if isinstance(pair[1], BaseTunerLayer)]:
        where, _, name = path.rpartition(".")
        site = _Site(part.get_submodule(where), name, wrapper.get_base_layer(), wrapper)
        site.put(site.base)
        _settle(site)
        sites.append(site)
    part.__dict__.pop("peft_config", None)
    part.__dict__.pop("_hf_peft_config_loaded", None)
    return sites


def _settle(site: _Site) -> None:
    """A LoRA computes where and in what precision its layer does, whatever its file was saved in."""
    weight: Any = site.base.weight
    for names in site.wrapper.adapter_layer_names:
        for matrix in getattr(site.wrapper, names).values():
            matrix.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
    site.wrapper.eval()
