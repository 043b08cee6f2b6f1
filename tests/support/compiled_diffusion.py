"""Diffusion checkpoints as artifacts in a store: exported as the compiler does, unquantized and unmeasured."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from openvino import convert_model, save_model

from services.compiler.export import diffusion
from services.compiler.export.exported import Exported
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.manifest import SPEED_RATIO, Graph, Manifest, Measured, Requires, Target
from services.runtimes.artifacts.store import Store, Stored, open_store
from tests.support import artifacts, tiny_diffusion

TARGETS: Mapping[str, Target] = {"onnxruntime": "onnx", "openvino": "openvino"}
_MODELS = Path(__file__).resolve().parents[2] / "models"
_folders = tempfile.TemporaryDirectory(prefix="compiled-diffusion-")


def tiny(folder: Path) -> Path:
    """A Stable Diffusion of a few thousand weights."""
    return tiny_diffusion.make_folder(folder)


def emoji(_: Path) -> Path:
    """The real model."""
    return _MODELS / "emoji-tiny"


def edges(_: Path) -> Path:
    """Its ControlNet."""
    return _MODELS / "emoji-tiny-edges"


@dataclass(frozen=True)
class Compiled:
    """A checkpoint, its graphs, and a store with its artifact for each of TARGETS. Shared: not to be changed."""

    folder: Path
    made: Exported
    store: Store
    artifacts: Mapping[str, Stored]  # by runtime


@cache
def compiled(make: Callable[[Path], Path]) -> Compiled:
    """Exports a checkpoint once a test run, as that takes seconds."""
    work = Path(_folders.name) / make.__name__
    folder = make(work / "checkpoint")
    store = open_store(str(work / "store"))
    made = exported(folder, work / "exported")
    return Compiled(folder, made, store, {runtime: publish(store, folder, made, runtime) for runtime in TARGETS})


def exported(checkpoint: Path, out: Path) -> Exported:
    """The checkpoint's graphs as ONNX files in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return diffusion.export(checkpoint, out, lambda note: None)


def publish(
    store: Store,
    checkpoint: Path,
    made: Exported,
    runtime: str,
    *,
    model: str = "tiny",
    speed: float | None = None,
    **changes: Any,
) -> Stored:
    """Publish it for a runtime. speed: how many times as fast as torch the manifest calls it."""
    target = TARGETS[runtime]
    staging = store.staging()
    graphs = tuple(_graph(each.component, each.file, staging, target, made) for each in made.graphs)
    for file in made.helper_files:
        (staging / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / file, staging / "model" / file)
    digest = digest_of(checkpoint)
    manifest: Manifest = artifacts.manifest(
        kind="diffusion",
        model=model,
        source=str(checkpoint),
        source_digest=digest,
        recipe=f"{digest} {target} {speed}",
        target=target,
        graphs=graphs,
        requires=Requires(),
        measured=() if speed is None else (Measured(SPEED_RATIO, speed),),
        details=made.details,
        **changes,
    )
    return store.publish(staging, manifest)


def _graph(component: str, file: Path, staging: Path, target: Target, made: Exported) -> Graph:
    name = file.name if target == "onnx" else f"{component}.xml"
    if target == "onnx":
        shutil.copyfile(file, staging / name)
    else:
        save_model(convert_model(file), staging / name, compress_to_fp16=False)
    graph = made.graph(component)
    size = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in onnx.load(file).graph.initializer)
    return Graph(component, name, graph.inputs, graph.outputs, graph.axes, size)
