"""The networks of a diffusion model as compiled graphs (diffusion_graphs.py), in the shape of diffusers' own modules.

A pipeline is made of them as of the modules that they stand for: same classes, configurations, calls and answers, but
no weights of torch. Whatever reaches into a module's layers (LoRA, FreeU, attention processors, tiling) finds none.

Numbers between the graphs are float32 on the CPU; a graph of 16 bits gets and gives its own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from services.runtimes import diffusion_graphs as names
from services.runtimes import diffusion_sources, torch_diffusion
from services.runtimes.artifacts.manifest import Graph, Manifest
from services.runtimes.diffusion_sources import ModelError, Source
from services.runtimes.sessions.interface import Session, SessionOptions
from services.runtimes.sessions.opening import open_session

_CPU = torch.device("cpu")


class Opened:
    """One graph, ready to run; it computes as many rows at a time as it was verified for."""

    def __init__(self, graph: Graph, session: Session) -> None:
        self.component = graph.component
        self.input_shapes = {port.name: port.shape for port in graph.inputs}
        self._dtypes: dict[str, torch.dtype] = {port.name: getattr(torch, port.dtype) for port in graph.inputs}
        self._row_places = {
            port.name: port.shape.index(names.BATCH)
            for port in (*graph.inputs, *graph.outputs)
            if names.BATCH in port.shape
        }
        self._outputs = [port.name for port in graph.outputs]
        self._rows_most = next((axis.high for axis in graph.axes if axis.name == names.BATCH), 1)
        self._session = session

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The wanted outputs (None for all), floats as float32.

        Raises SessionError, and ModelError where the feeds are not what the graph takes.
        """
        if missing := self.input_shapes.keys() ^ feeds.keys():
            raise ModelError(
                f"{self.component}: the graph and the model that it stands for take different inputs, such as"
                f" {min(missing)}; compile it again"
            )
        ready = {name: tensor.to(_CPU, self._dtypes[name]).contiguous() for name, tensor in feeds.items()}
        count = next(tensor.shape[self._row_places[name]] for name, tensor in ready.items() if name in self._row_places)
        answers = [self._session.run(part, wanted) for part in self._parts(ready, count)]
        return {name: self._joined(name, [answer[name] for answer in answers]) for name in wanted or self._outputs}

    def _parts(self, feeds: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
        if count <= self._rows_most:
            yield feeds
            return
        for first in range(0, count, self._rows_most):
            length = min(self._rows_most, count - first)
            yield {
                name: tensor.narrow(self._row_places[name], first, length).contiguous()
                if name in self._row_places
                else tensor
                for name, tensor in feeds.items()
            }

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._row_places[name])
        return whole.float() if whole.is_floating_point() else whole


# --- modules that are graphs ---


class _Compiled(nn.Module):
    """What all of them have in common. They hold no parameters, so `to` and `eval` change nothing."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what they are called with and answer."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where they are called from."""
        return _CPU


def is_compiled(module: object) -> bool:
    """Whether a part of a pipeline is a graph."""
    return isinstance(module, _Compiled)


def class_name(module: object) -> str:
    """The class of a part of a pipeline, as diffusers or transformers call it, whether compiled or not."""
    return (type(module).__bases__[-1] if is_compiled(module) else type(module)).__name__


class _FromDiffusers(_Compiled):
    def __init__(self, folder: Path, *graphs: Opened) -> None:
        """folder: of the part's config.json."""
        nn.Module.__init__(self)
        stands_for: Any = type(self).__bases__[-1]
        defaults = {name: one.default for name, one in inspect.signature(stands_for.__init__).parameters.items()}
        defaults.pop("self")
        own = stands_for.load_config(folder, local_files_only=True)
        self._internal_dict = FrozenDict({**defaults, **own})
        self._graphs = graphs


class CompiledUNet(_FromDiffusers, diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel."""

    def __init__(self, folder: Path, graph: Opened) -> None:
        super().__init__(folder, graph)
        config: Any = self.config
        # SDXL's pipelines ask how wide the embedding of sizes and pooled prompt is.
        if config.get("addition_embed_type") == "text_time":
            self.add_embedding = SimpleNamespace(
                linear_1=SimpleNamespace(in_features=config.projection_class_embeddings_input_dim)
            )
        self.encoder_hid_proj = None
        self._residuals = [name for name in graph.input_shapes if "residual" in name]
        self._none: Callable[[int, int, int], dict[str, Tensor]] = lru_cache(maxsize=2)(self._no_residuals)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One evaluation, as the module's. Raises ModelError for arguments that graphs have no inputs for."""
        _refuse(self, {"cross_attention_kwargs": cross_attention_kwargs, **others})
        rows, _, height, width = sample.shape
        feeds = {
            names.SAMPLE: sample,
            names.TIMESTEP: _by_row(timestep, rows),
            names.ENCODER_HIDDEN_STATES: encoder_hidden_states,
            **_added(added_cond_kwargs),
        }
        if timestep_cond is not None:
            feeds[names.TIMESTEP_COND] = timestep_cond
        if down_block_additional_residuals is None or mid_block_additional_residual is None:
            feeds |= self._none(rows, height, width)
        else:
            down = {names.down_residual(index): each for index, each in enumerate(down_block_additional_residuals)}
            feeds |= {**down, names.MID_RESIDUAL: mid_block_additional_residual}
        prediction = self._graphs[0].run(feeds)[names.PREDICTION]
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _no_residuals(self, rows: int, height: int, width: int) -> dict[str, Tensor]:
        shapes = self._graphs[0].input_shapes
        sizes = {names.BATCH: rows, names.HEIGHT: height, names.WIDTH: width}
        return {
            name: torch.zeros([names.size_of(one, sizes) if isinstance(one, str) else one for one in shapes[name]])
            for name in self._residuals
        }


class CompiledSD3Transformer(_FromDiffusers, diffusers.SD3Transformer2DModel):  # type: ignore[misc]
    """An SD3Transformer2DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        *,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One evaluation, as the module's. Raises ModelError for arguments that graphs have no inputs for."""
        _refuse(self, others)
        feeds = {
            names.HIDDEN_STATES: hidden_states,
            names.ENCODER_HIDDEN_STATES: encoder_hidden_states,
            names.POOLED_PROJECTIONS: pooled_projections,
            names.TIMESTEP: _by_row(timestep, len(hidden_states)),
        }
        prediction = self._graphs[0].run(feeds)[names.PREDICTION]
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


class CompiledFluxTransformer(_FromDiffusers, diffusers.FluxTransformer2DModel):  # type: ignore[misc]
    """A FluxTransformer2DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        *,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One evaluation, as the module's. Raises ModelError for arguments that graphs have no inputs for."""
        _refuse(self, others)
        rows = len(hidden_states)
        feeds = {
            names.HIDDEN_STATES: hidden_states,
            names.ENCODER_HIDDEN_STATES: encoder_hidden_states,
            names.POOLED_PROJECTIONS: pooled_projections,
            names.TIMESTEP: _by_row(timestep, rows),
            names.IMG_IDS: img_ids,
            names.TXT_IDS: txt_ids,
        }
        if guidance is not None:
            feeds[names.GUIDANCE] = _by_row(guidance, rows)
        prediction = self._graphs[0].run(feeds)[names.PREDICTION]
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


class CompiledControlNet(_FromDiffusers, diffusers.ControlNetModel):  # type: ignore[misc]
    """A ControlNetModel."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One evaluation, as the module's. Raises ModelError for arguments that graphs have no inputs for."""
        _refuse(self, {"guess_mode": guess_mode or None, **others})
        feeds = {
            names.SAMPLE: sample,
            names.TIMESTEP: _by_row(timestep, len(sample)),
            names.ENCODER_HIDDEN_STATES: encoder_hidden_states,
            names.CONDITION: controlnet_cond,
            **_added(added_cond_kwargs),
        }
        answer = {name: each * conditioning_scale for name, each in self._graphs[0].run(feeds).items()}
        mid = answer.pop(names.MID_RESIDUAL)
        down = [answer[names.down_residual(index)] for index in range(len(answer))]
        if not return_dict:
            return down, mid
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=mid)


class CompiledVae(_FromDiffusers, diffusers.AutoencoderKL):  # type: ignore[misc]
    """An AutoencoderKL: its encoder and its decoder."""

    def __init__(self, folder: Path, encoder: Opened, decoder: Opened) -> None:
        super().__init__(folder, encoder, decoder)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """As the module's."""
        posterior = DiagonalGaussianDistribution(self._graphs[0].run({names.PIXELS: x})[names.MOMENTS])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """As the module's."""
        pixels = self._graphs[1].run({names.LATENTS: z})[names.PIXELS]
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


class _FromTransformers(_Compiled):
    def __init__(self, folder: Path, graph: Opened) -> None:
        """folder: of the part's config.json."""
        nn.Module.__init__(self)
        stands_for: Any = type(self).__bases__[-1]
        self.config = stands_for.config_class.from_pretrained(folder, local_files_only=True)
        self._graph = graph


class _CompiledClip(_FromTransformers):
    projects: ClassVar[bool] = False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        """As the module's. Raises ModelError for an attention mask, which graphs have no input for."""
        _refuse(self, {"attention_mask": attention_mask})
        wanted = [names.LAST_HIDDEN_STATE, names.POOLED, *([names.HIDDEN_STATES] if output_hidden_states else [])]
        answer = self._graph.run({names.INPUT_IDS: input_ids}, wanted)
        states = answer[names.HIDDEN_STATES].unbind() if output_hidden_states else None
        if self.projects:
            return CLIPTextModelOutput(
                text_embeds=answer[names.POOLED],
                last_hidden_state=answer[names.LAST_HIDDEN_STATE],
                hidden_states=states,
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=answer[names.LAST_HIDDEN_STATE], pooler_output=answer[names.POOLED], hidden_states=states
        )

    def skipping(self, input_ids: Tensor, skip: int) -> Tensor:
        """Hidden states [batch, tokens, channels] without the last `skip` layers, but with the last layer norm."""
        states: Tensor = self._graph.run({names.INPUT_IDS: input_ids}, [names.NORMED_STATES])[names.NORMED_STATES]
        return states[-(skip + 1)]


class CompiledClip(_CompiledClip, CLIPTextModel):  # type: ignore[misc]
    """A CLIPTextModel."""


class CompiledClipWithProjection(_CompiledClip, CLIPTextModelWithProjection):  # type: ignore[misc]
    """A CLIPTextModelWithProjection."""

    projects = True


class CompiledT5(_FromTransformers, T5EncoderModel):  # type: ignore[misc]
    """A T5EncoderModel."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """As the module's. Raises ModelError for an attention mask, which graphs have no input for."""
        _refuse(self, {"attention_mask": attention_mask})
        answer = self._graph.run({names.INPUT_IDS: input_ids}, [names.LAST_HIDDEN_STATE])
        return BaseModelOutput(last_hidden_state=answer[names.LAST_HIDDEN_STATE])


def _by_row(value: Tensor | float, rows: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(rows)


def _added(conditions: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (conditions or {}).items() if name in (names.TEXT_EMBEDS, names.TIME_IDS)}


def _refuse(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ModelError(f"{type(module).__name__}: a compiled graph has no {name}; it takes torch layers")


# --- opening ---

_MODULES: dict[str, type[Any]] = {
    "UNet2DConditionModel": CompiledUNet,
    "SD3Transformer2DModel": CompiledSD3Transformer,
    "FluxTransformer2DModel": CompiledFluxTransformer,
    "CLIPTextModel": CompiledClip,
    "CLIPTextModelWithProjection": CompiledClipWithProjection,
    "T5EncoderModel": CompiledT5,
}


def find(folder: Path, manifest: Manifest) -> Source:
    """What of an artifact, whose files lie in `folder`, is not a graph: configurations, tokenizers, other networks.

    Raises ModelError for an artifact that holds no diffusion model.
    """
    if manifest.kind != "diffusion" or manifest.graph(names.VAE_DECODER) is None:
        raise ModelError(f"the artifact of {manifest.model} holds no diffusion model (kind {manifest.kind})")
    graphs = {graph.component for graph in manifest.graphs}
    parts = {"vae" if component in (names.VAE_ENCODER, names.VAE_DECODER) else component for component in graphs}
    return diffusion_sources.find_rest(folder / manifest.model_folder, parts)


def open_pipeline(
    folder: Path, manifest: Manifest, source: Source, options: SessionOptions
) -> tuple[Any, Callable[[], None]]:
    """The text-to-image pipeline of an artifact, and what closes its graphs. source: out of `find`.

    Raises SessionError (HardwareMissingError among them), ModelError.
    """
    with ExitStack() as opening:
        graphs = {graph.component: _opened(folder, graph, manifest, options, opening) for graph in manifest.graphs}
        return pipeline_of(graphs, source), opening.pop_all().close


def pipeline_of(graphs: Mapping[str, Opened], source: Source) -> Any:
    """The text-to-image pipeline of a model's graphs, by component. Raises ModelError."""
    modules: dict[str, Any] = {
        "vae": CompiledVae(source.folder / "vae", graphs[names.VAE_ENCODER], graphs[names.VAE_DECODER])
    }
    for component, graph in graphs.items():
        if component in (names.VAE_ENCODER, names.VAE_DECODER):
            continue
        described = source.index.get(component)
        kind = described[1] if isinstance(described, list) and len(described) == 2 else None
        if kind not in _MODULES:
            raise ModelError(f"{component}: this version cannot run the graph of a {kind}")
        modules[component] = _MODULES[kind](source.folder / component, graph)
    return torch_diffusion.load(source, torch.float32, _CPU, modules)


def open_controlnet(folder: Path, manifest: Manifest, options: SessionOptions) -> tuple[Any, Callable[[], None]]:
    """The ControlNet of an artifact, and what closes its graph. Raises SessionError, ModelError."""
    graph = manifest.graph(names.CONTROLNET)
    if graph is None:
        raise ModelError(f"the artifact of {manifest.model} holds no ControlNet")
    with ExitStack() as opening:
        opened = _opened(folder, graph, manifest, options, opening)
        return CompiledControlNet(folder / manifest.model_folder, opened), opening.pop_all().close


def _opened(folder: Path, graph: Graph, manifest: Manifest, options: SessionOptions, opening: ExitStack) -> Opened:
    session = open_session(folder / graph.file, manifest.runtime, options)
    opening.callback(session.close)
    return Opened(graph, session)
