"""Diffusers checkpoints as ONNX graphs, one a network: services/runtimes/diffusion_graphs.py says what they take.

A whole model becomes its text encoders, its denoiser, and the two halves of its VAE; a ControlNet's folder becomes one
graph. Tokenizers, schedulers, small autoencoders for previews and safety checkers stay as they are.
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import torch
from torch import Tensor, nn
from torch.export import Dim

from services.compiler.export.diffusion_examples import Example, conditions, noise, pictures, timesteps
from services.compiler.export.diffusion_networks import (
    T5,
    Clip,
    ControlNet,
    FluxTransformer,
    Network,
    SD3Transformer,
    UNet,
    VaeDecoder,
    VaeEncoder,
    plain_operators,
)
from services.compiler.export.exported import Exported, ExportedGraph, ExportError
from services.compiler.export.onnx_files import export_module, ports
from services.runtimes import diffusion_graphs as names
from services.runtimes import diffusion_sources, torch_diffusion
from services.runtimes.artifacts.manifest import Axis
from services.runtimes.diffusion_sources import ModelError, Source

# Rows of one evaluation that are verified: a negative prompt, and sub-prompts that are joined by AND.
ROWS_MOST = 4
_VAE_ROWS_MOST = 2
_TEXT_ROWS_MOST = 2
_T5_TOKENS_MOST = 512
# What torch.export is told; the verified sizes are Axis. Sides start where every level of a U-Net has more than one
# row, for a trace asks whether it has.
_ANY = 1 << 14
_SIDE_LEAST = 17
_CPU = torch.device("cpu")


def export(
    folder: Path,
    out: Path,
    say: Callable[[str], None],
    *,
    max_side_px: int = 0,
    max_batch_size: int = ROWS_MOST,
    only: Collection[str] | None = None,
) -> Exported:
    """Write one ONNX file a network of the checkpoint into the folder `out`.

    folder: a diffusers folder, or that of a ControlNet. max_side_px: largest side of a picture that is verified; 0 for
    the model's own size. max_batch_size: rows likewise, up to ROWS_MOST. only: components to export; None for all.
    Raises ModelError for what is no such checkpoint, ExportError for what cannot be exported, OSError.
    """
    if not (folder / diffusion_sources.INDEX).is_file() and (folder / "config.json").is_file():
        return _export_controlnet(folder, out, say, max_side_px, max_batch_size)
    source = diffusion_sources.find(str(folder))
    pipeline = torch_diffusion.load(source, torch.float32, _CPU)
    for part in _modules(pipeline).values():
        part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    example = Example(pipeline)
    sides = _Sides(example.side, example.factor, max_side_px)
    rows = min(max_batch_size, ROWS_MOST)
    graphs = [
        _write(component, network, feeds, axes, out, say)
        for component, network, feeds, axes in _components(pipeline, example, sides, rows)
        if only is None or component in only
    ]
    return Exported(
        kind="diffusion",
        graphs=tuple(graphs),
        helper_files=tuple(_helper_files(source, {graph.component for graph in graphs})),
        details=_details(pipeline, example.factor),
    )


# --- components ---

_Feeds = Callable[[Mapping[str, int]], dict[str, Tensor]]
_Component = tuple[str, Network, _Feeds, tuple[Axis, ...]]


class _Sides:
    """The sizes that are verified, as axes."""

    def __init__(self, side: int, factor: int, max_side_px: int) -> None:
        """side: the model's own, in latents; factor: pixels a latent."""
        self.low, self.high = max(2, side // 4 * 2), max(side, max_side_px // factor)
        self._factor = factor

    @property
    def latents(self) -> tuple[Axis, ...]:
        return tuple(Axis(name, self.low, self.high) for name in (names.HEIGHT, names.WIDTH))

    def halved(self, unet: Any) -> list[Axis]:
        """Those of the skip connections' residuals, of every level of a U-Net below the first."""
        levels = sum(block.downsamplers is not None for block in unet.down_blocks)
        return [
            Axis(
                names.halved(name, level),
                names.halved_size(self.low, level),
                names.halved_size(self.high, level),
                follows=name,
            )
            for level in range(1, levels + 1)
            for name in (names.HEIGHT, names.WIDTH)
        ]

    @property
    def pixels(self) -> tuple[Axis, ...]:
        low, high = self.low * self._factor, self.high * self._factor
        return tuple(Axis(name, low, high) for name in (names.PIXEL_HEIGHT, names.PIXEL_WIDTH))


def _components(pipeline: Any, example: Example, sides: _Sides, rows: int) -> list[_Component]:
    batch, text_batch = Axis(names.BATCH, 1, rows), Axis(names.BATCH, 1, _TEXT_ROWS_MOST)
    vae_batch = Axis(names.BATCH, 1, _VAE_ROWS_MOST)
    found: list[_Component] = []
    for component in names.TEXT_ENCODERS:
        encoder = getattr(pipeline, component, None)
        if encoder is None:
            continue
        feeds = partial(example.token_ids, component)
        kind = type(encoder).__name__
        if kind.startswith("CLIPTextModel"):
            found.append((component, Clip(encoder), feeds, (text_batch,)))
        elif kind == "T5EncoderModel":
            tokens = Axis(names.TOKENS, 16, _T5_TOKENS_MOST)
            found.append((component, T5(encoder), feeds, (text_batch, tokens)))
        else:
            raise ExportError(f"{component}: a {kind} cannot be exported; CLIPTextModel and T5EncoderModel can")
    component, denoiser = _denoiser(pipeline)
    tokens = example.token_axis
    if isinstance(denoiser, FluxTransformer):
        most = sides.high * sides.high // 4
        patches = Axis(names.PATCHES, sides.low * sides.low // 4, most)
        found.append((component, denoiser, example.flux, (batch, tokens, patches)))
    elif isinstance(denoiser, SD3Transformer):
        found.append((component, denoiser, example.sd3, (batch, tokens, *sides.latents)))
    else:
        assert isinstance(denoiser, UNet)
        axes = (batch, tokens, *sides.latents, *sides.halved(pipeline.unet))
        found.append((component, denoiser, partial(example.unet, denoiser), axes))
    vae = pipeline.vae
    if type(vae).__name__ != "AutoencoderKL":
        raise ExportError(f"vae: a {type(vae).__name__} cannot be exported; AutoencoderKL can")
    found.append((names.VAE_ENCODER, VaeEncoder(vae), example.vae_encoder, (vae_batch, *sides.pixels)))
    found.append((names.VAE_DECODER, VaeDecoder(vae), example.vae_decoder, (vae_batch, *sides.latents)))
    return found


def _denoiser(pipeline: Any) -> tuple[str, Network]:
    kinds: dict[str, tuple[str, type[Any]]] = {
        "UNet2DConditionModel": (names.UNET, UNet),
        "SD3Transformer2DModel": (names.TRANSFORMER, SD3Transformer),
        "FluxTransformer2DModel": (names.TRANSFORMER, FluxTransformer),
    }
    module = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    kind = type(module).__name__
    if kind not in kinds:
        raise ExportError(f"a pipeline that denoises with a {kind} cannot be exported; accepted: {', '.join(kinds)}")
    component, network = kinds[kind]
    return component, network(module)


def _write(
    component: str,
    network: Network,
    feeds: _Feeds,
    axes: tuple[Axis, ...],
    out: Path,
    say: Callable[[str], None],
) -> ExportedGraph:
    say(f"exporting the {component.replace('_', ' ')}")
    file = out / f"{component}.onnx"
    # No size is 1 and none like another, so that the trace takes none for a number of the model.
    sizes = {
        names.BATCH: 2,
        names.TOKENS: 26,
        names.PATCHES: 20,
        names.HEIGHT: 18,
        names.WIDTH: 22,
        names.PIXEL_HEIGHT: 160,
        names.PIXEL_WIDTH: 192,
    }
    traced = feeds(sizes)
    network.eval()
    try:
        with plain_operators():
            export_module(
                network,
                network.arguments(traced),
                network.arguments(_dynamic(component, network, traced)),  # type: ignore[arg-type]
                file,
                input_names=list(network.inputs),
                output_names=network.outputs,
            )
    except ExportError as error:
        raise ExportError(f"{component}: {error}") from error
    inputs, outputs = ports(file)
    return ExportedGraph(component, file, inputs, outputs, axes, reference=network.reference, example=feeds)


def _dynamic(component: str, network: Network, traced: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Which dimensions of each input the caller chooses."""
    batch, tokens, patches = (Dim(name, min=1, max=_ANY) for name in (names.BATCH, names.TOKENS, names.PATCHES))
    height, width, tall, wide = (
        Dim(name, min=_SIDE_LEAST, max=_ANY)
        for name in (names.HEIGHT, names.WIDTH, names.PIXEL_HEIGHT, names.PIXEL_WIDTH)
    )
    picture = {0: batch, 2: height, 3: width}
    by_name: dict[str, dict[int, Any]] = {
        names.SAMPLE: picture,
        names.LATENTS: picture,
        names.HIDDEN_STATES: {0: batch, 1: patches} if isinstance(network, FluxTransformer) else picture,
        names.PIXELS: {0: batch, 2: tall, 3: wide},
        names.CONDITION: {0: batch, 2: tall, 3: wide},
        names.ENCODER_HIDDEN_STATES: {0: batch, 1: tokens},
        names.INPUT_IDS: {0: batch, 1: tokens} if isinstance(network, T5) else {0: batch},
        names.IMG_IDS: {0: patches},
        names.TXT_IDS: {0: tokens},
    }
    dynamic = {}
    for name in network.inputs:
        if name in by_name:
            dynamic[name] = by_name[name]
        elif name.startswith("down_residual") or name == names.MID_RESIDUAL:
            # Sizes of their own to torch.export, which finds out that they are the sample's halved.
            rows = traced[name].shape[2]
            times = next(n for n in range(8) if names.halved_size(traced[names.SAMPLE].shape[2], n) == rows)
            least, most = names.halved_size(_SIDE_LEAST, times), names.halved_size(_ANY, times)
            own = {
                place: Dim(names.halved(axis, times), min=least, max=most)
                for place, axis in ((2, names.HEIGHT), (3, names.WIDTH))
            }
            dynamic[name] = {0: batch, **(own if times else {2: height, 3: width})}
        else:
            dynamic[name] = {0: batch}
    return dynamic


# --- ControlNets ---


def _export_controlnet(
    folder: Path, out: Path, say: Callable[[str], None], max_side_px: int, max_batch_size: int
) -> Exported:
    class_name = _class_name(folder)
    if class_name != "ControlNetModel":
        raise ExportError(f"a {class_name or 'folder of no known class'} cannot be exported; ControlNetModel can")
    net: Any = torch_diffusion.load_module(
        diffusers.ControlNetModel, folder, what=names.CONTROLNET, dtype=torch.float32, device=_CPU
    )
    net.requires_grad_(False)
    config = net.config
    factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    # A ControlNet's folder does not say what size it is for: that of the models that it is as wide as.
    sides = _Sides(64 if config.block_out_channels[0] >= 320 else 8, factor, max_side_px)
    network = ControlNet(net)

    def feeds(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        rows, height, width = (sizes[name] for name in (names.BATCH, names.HEIGHT, names.WIDTH))
        return {
            names.SAMPLE: noise(1, rows, config.in_channels, height, width),
            names.TIMESTEP: timesteps(rows),
            names.ENCODER_HIDDEN_STATES: noise(2, rows, sizes[names.TOKENS], _told_width(config)),
            **conditions(config, rows, None),
            names.CONDITION: pictures(rows, height * factor, width * factor)[:, : config.conditioning_channels],
        }

    pixels = [
        msgspec.structs.replace(axis, follows=latents.name)
        for axis, latents in zip(sides.pixels, sides.latents, strict=True)
    ]
    batch, tokens = Axis(names.BATCH, 1, min(max_batch_size, ROWS_MOST)), Axis(names.TOKENS, 16, 154)
    axes = (batch, tokens, *sides.latents, *pixels)
    graph = _write(names.CONTROLNET, network, feeds, axes, out, say)
    details = names.Details(sum(weight.numel() for weight in net.parameters()), 0)
    return Exported("diffusion", (graph,), (Path("config.json"),), msgspec.to_builtins(details))


def _told_width(config: Any) -> int:
    width = config.get("encoder_hid_dim") or config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _class_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a JSON object: {error}") from error


# --- what goes with the graphs ---


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _details(pipeline: Any, factor: int) -> dict[str, Any]:
    exported = [part for name, part in _modules(pipeline).items() if name != "safety_checker"]
    count = sum(weight.numel() for part in exported for weight in part.parameters())
    made: dict[str, Any] = msgspec.to_builtins(names.Details(count, factor))
    return made


def _helper_files(source: Source, components: set[str]) -> list[Path]:
    """All that a pipeline is made of but the weights of the networks that are graphs now, relative to the folder."""
    graphs = {
        component.removesuffix("_encoder").removesuffix("_decoder") if "vae" in component else component
        for component in components
    }
    kept = []
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts) or len(relative.parts) > 2:
            continue
        is_weights = path.suffix in (".safetensors", *diffusion_sources.PICKLES) or ".index." in path.name
        of_graph = len(relative.parts) == 1 or relative.parts[0] in graphs
        if path.suffix in diffusion_sources.PICKLES or (is_weights and of_graph):
            continue
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".md"):
            kept.append(relative)
    return kept
