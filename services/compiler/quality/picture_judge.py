"""Judges a diffusion model by the pictures that it paints, and a ControlNet, which paints none, by its outputs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.compiler.domain import CompileRequest
from services.compiler.export.exported import Exported
from services.compiler.quality.judge import Sessions
from services.compiler.quality.prompts import prompts_for
from services.compiler.quality.similarity import psnr, ssim
from services.compiler.search import Limit
from services.runtimes import diffusion_graphs as names
from services.runtimes import diffusion_sources, torch_diffusion
from services.runtimes.artifacts.manifest import Check, Graph, Measured
from services.runtimes.graph_diffusion import Opened, pipeline_of

# Pictures that the outcome is judged by, and those of each try of a search; fewer where painting takes long.
PICTURE_COUNT = 12
_SEARCH_PICTURES = 4
_CALIBRATION_PICTURES = 3
_SECONDS_MOST = 180.0
STEPS = 20
_SPEED_STEPS = 4
# Guidance multiplies what rounding does to a step by its scale, and pictures part ways that are equally good: without
# it, the network itself is what is compared.
_GUIDANCE = 1.0
# In float32 two runtimes differ by the order of their sums, which 20 steps amplify; still less than one of the 255
# steps of a picture's bytes (48 dB).
FLOAT32_PSNR_DB = 50.0
_CPU = torch.device("cpu")

Picture = NDArray[np.float64]  # [height, width, 3] in 0 to 1


@dataclass(frozen=True)
class _Scene:
    """What is painted, and the picture in float32 and its copy by way of the VAE."""

    prompt: str
    seed: int
    pictures: tuple[Picture, Picture]


class PictureJudge:
    """See Judge. Pictures of the same prompts and seeds have to be the float32 model's, to within a PSNR."""

    def __init__(self, exported: Exported, checkpoint: Path, request: CompileRequest) -> None:
        """checkpoint: a diffusers folder or a .safetensors file. Raises PromptsError, ModelError."""
        self._exported = exported
        self._whole = diffusion_sources.find(str(checkpoint))
        parts = {
            "vae" if graph.component in (names.VAE_ENCODER, names.VAE_DECODER) else graph.component
            for graph in exported.graphs
        }
        self._rest = diffusion_sources.find_rest(self._whole.folder, parts)
        self._calibration, self._prompts = prompts_for(
            request.calibration_folder, checkpoint if checkpoint.is_dir() else checkpoint.parent, PICTURE_COUNT
        )
        precisions = {request.component_precisions.get(g.component, request.precision) for g in exported.graphs}
        self._exact = precisions == {"float32"}
        decibels = FLOAT32_PSNR_DB if self._exact else request.budget.psnr_db
        self.limit = Limit("PSNR of pictures against float32", decibels, True, "dB")
        self._scenes: list[_Scene] = []
        self._last: list[tuple[Picture, Picture]] = []

    def watch(self, sessions: Sessions) -> None:
        """See Judge."""
        pipeline = self._pipeline(sessions)
        for seed, prompt in enumerate(self._calibration[:_CALIBRATION_PICTURES]):
            _paint(pipeline, prompt, 1000 + seed, STEPS)

    def reference(self, sessions: Sessions, say: Callable[[str], None]) -> None:
        """See Judge. Pictures of a float32 model are compared with torch's own, not the sessions'."""
        pipeline = self._torch() if self._exact else self._pipeline(sessions)
        began = time.perf_counter()
        for seed, prompt in enumerate(self._prompts):
            self._scenes.append(_Scene(prompt, seed, _paint(pipeline, prompt, seed, STEPS)))
            if time.perf_counter() - began > _SECONDS_MOST:
                break
        if len(self._scenes) < len(self._prompts):
            say(f"painting takes long here: {len(self._scenes)} of {len(self._prompts)} pictures are judged by")

    def value(self, sessions: Sessions, *, thorough: bool) -> float:
        """See Judge."""
        scenes = self._scenes if thorough else self._scenes[:_SEARCH_PICTURES]
        pipeline = self._pipeline(sessions)
        painted = [_paint(pipeline, scene.prompt, scene.seed, STEPS) for scene in scenes]
        if thorough:
            self._last = painted
        return _psnr_of_all(scenes, painted)

    def checks(self) -> tuple[list[Check], list[Measured]]:
        """See Judge."""
        pairs = [
            (right, found)
            for scene, painted in zip(self._scenes, self._last, strict=True)
            for right, found in zip(scene.pictures, painted, strict=True)
        ]
        value = _psnr_of_all(self._scenes, self._last)
        # Equal pictures have no finite PSNR; a manifest holds numbers.
        value = min(value, 200.0)
        check = Check(self.limit.name, value, self.limit.limit, True, "dB")
        return [check], [
            Measured("smallest PSNR of a picture", min(min(psnr(*pair), 200.0) for pair in pairs), "dB"),
            Measured("SSIM of pictures against float32", float(np.mean([ssim(*pair) for pair in pairs]))),
            Measured("pictures painted", len(self._scenes), f"of {STEPS} steps, each also once through the VAE"),
        ]

    def speed_pair(self, sessions: Sessions) -> tuple[Callable[[], object], Callable[[], object]]:
        """See Judge."""
        served, built = self._torch(), self._pipeline(sessions)
        prompt = self._prompts[0]
        return (lambda: _paint(served, prompt, 0, _SPEED_STEPS)), (lambda: _paint(built, prompt, 0, _SPEED_STEPS))

    def _torch(self) -> Any:
        return _quiet(torch_diffusion.load(self._whole, torch.float32, _CPU))

    def _pipeline(self, sessions: Sessions) -> Any:
        opened = {
            graph.component: Opened(
                Graph(graph.component, "", graph.inputs, graph.outputs, graph.axes, 0), sessions[graph.component]
            )
            for graph in self._exported.graphs
        }
        return _quiet(pipeline_of(opened, self._rest))


class OutputJudge:
    """See Judge. For a network that is no model by itself: its outputs have to be those in float32."""

    limit = Limit("root mean square error of outputs against float32", 0.1, False)

    def __init__(self, exported: Exported) -> None:
        self._graphs = exported.graphs
        self._right: dict[str, list[Mapping[str, torch.Tensor]]] = {}
        self._last = 0.0

    def watch(self, sessions: Sessions) -> None:
        """See Judge."""
        for graph in self._graphs:
            for feeds in _examples(graph.axes, graph.example, smallest=False):
                sessions[graph.component].run(feeds)

    def reference(self, sessions: Sessions, say: Callable[[str], None]) -> None:
        """See Judge."""
        for graph in self._graphs:
            self._right[graph.component] = [
                sessions[graph.component].run(feeds) for feeds in _examples(graph.axes, graph.example, smallest=True)
            ]

    def value(self, sessions: Sessions, *, thorough: bool) -> float:
        """See Judge."""
        from services.compiler.verify import error_of

        worst = 0.0
        for graph in self._graphs:
            examples = _examples(graph.axes, graph.example, smallest=True)
            for feeds, right in zip(examples, self._right[graph.component], strict=True):
                found = sessions[graph.component].run(feeds)
                worst = max(worst, *(error_of(right[name], found[name], "root mean square") for name in right))
        self._last = worst
        return worst

    def checks(self) -> tuple[list[Check], list[Measured]]:
        """See Judge."""
        return [Check(self.limit.name, self._last, self.limit.limit, False)], []

    def speed_pair(self, sessions: Sessions) -> tuple[Callable[[], object], Callable[[], object]]:
        """See Judge."""
        graph = self._graphs[0]
        (feeds,) = _examples(graph.axes, graph.example, smallest=True)
        return (lambda: graph.reference(feeds)), (lambda: sessions[graph.component].run(feeds))


def _examples(axes: Sequence[Any], example: Callable[..., Any], *, smallest: bool) -> list[Any]:
    """Inputs at the smallest size that there is; or, of other numbers, at the next larger ones."""
    chosen = [axis for axis in axes if not axis.follows]
    if smallest:
        return [example({axis.name: axis.low for axis in chosen})]
    return [example({axis.name: min(axis.high, axis.low + 2 * more) for axis in chosen}) for more in (1, 2)]


@torch.inference_mode()
def _paint(pipeline: Any, prompt: str, seed: int, steps: int) -> tuple[Picture, Picture]:
    """The picture, and what the VAE makes of it: text-to-image alone never asks for its encoder."""
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(
        prompt, num_inference_steps=steps, guidance_scale=_GUIDANCE, generator=generator, output_type="pt"
    ).images
    latents = pipeline.vae.encode(image * 2 - 1).latent_dist.mode()
    copied = (pipeline.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    return _picture(image), _picture(copied)


def _picture(images: torch.Tensor) -> Picture:
    return np.asarray(images[0].permute(1, 2, 0).double().numpy())


def _psnr_of_all(scenes: Sequence[_Scene], painted: Sequence[tuple[Picture, Picture]]) -> float:
    """Over all numbers of all pictures at once: a single bad one is not averaged away by good ones' decibels."""
    right = np.concatenate([picture.ravel() for scene in scenes for picture in scene.pictures])
    return psnr(right, np.concatenate([picture.ravel() for pair in painted for picture in pair]))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
