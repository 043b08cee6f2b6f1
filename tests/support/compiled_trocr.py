"""TrOCR-style checkpoints as artifacts in a store: exported as the compiler does, unquantized and unmeasured."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import torch
from openvino import convert_model, save_model
from transformers import BeitConfig, BeitModel, VisionEncoderDecoderModel

from services.compiler.export import trocr
from services.compiler.export.exported import Exported
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.manifest import (
    SPEED_RATIO,
    ArtifactPrecision,
    BuiltOn,
    Graph,
    Manifest,
    Measured,
    Requires,
    Target,
)
from services.runtimes.artifacts.store import Store, Stored, open_store
from tests.support import artifacts, published_trocr, tiny_trocr

TARGETS: Mapping[str, Target] = {"onnxruntime": "onnx", "openvino": "openvino"}
EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "handwriting-tiny"
_folders = tempfile.TemporaryDirectory(prefix="compiled-trocr-")


def tied(folder: Path) -> Path:
    """ViT without biases of queries, keys and values, as trocr-base and trocr-large have it; learned positions, gelu,
    normalized embeddings that are the output layer too."""
    return tiny_trocr.save(folder, tiny_trocr.build(positions=160, qkv_bias=False))


def untied(folder: Path) -> Path:
    """DeiT; sines for positions, relu, embeddings that are scaled and not normalized, an output layer of its own."""
    large = published_trocr.ARCHITECTURES["trocr-large-printed"]
    published_trocr.save(folder, published_trocr.Architecture(2, 6, 2, 4, True, True, large.decoder))
    return folder


def beit(folder: Path) -> Path:
    """BEiT, whose attention has a bias for each distance between two patches."""
    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=(tiny_trocr.HEIGHT, tiny_trocr.WIDTH),
        patch_size=8,
        num_channels=1,
        use_relative_position_bias=True,
    )
    encoder = BeitModel(config, add_pooling_layer=False)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    reader = tiny_trocr.build(layers=1)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=reader.decoder)
    model.generation_config = reader.generation_config
    return tiny_trocr.save(folder, model.eval())


def embedded(_: Path) -> Path:
    """The real model: a hybrid of convolutions and a transformer."""
    return EMBEDDED


FAMILIES: tuple[Callable[[Path], Path], ...] = (tied, untied, embedded)


@dataclass(frozen=True)
class Compiled:
    """A checkpoint, its graphs, and a store with its artifact for each of TARGETS. Shared: not to be changed."""

    folder: Path
    made: Exported
    store: Store


@cache
def compiled(family: Callable[[Path], Path]) -> Compiled:
    """Exports a family once a test run, as that takes seconds."""
    work = Path(_folders.name) / family.__name__
    folder = family(work / "checkpoint")
    store = open_store(str(work / "store"))
    made = exported(folder, work / "exported")
    for runtime in TARGETS:
        publish(store, folder, made, runtime)
    return Compiled(folder, made, store)


def exported(checkpoint: Path, out: Path) -> Exported:
    """The checkpoint's graphs as ONNX files in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return trocr.export(checkpoint, out, lambda note: None, max_batch_size=32)


def publish(
    store: Store,
    checkpoint: Path,
    made: Exported,
    runtime: str,
    *,
    model: str = "tiny",
    speed: float | None = None,
    precision: ArtifactPrecision = "float32",
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
        model=model,
        source=str(checkpoint),
        source_digest=digest,
        recipe=f"{digest} {target} {precision} {speed}",
        target=target,
        precision=precision,
        graphs=graphs,
        model_folder="model",
        built_on=BuiltOn("cpu", "some CPU", (), {}),
        requires=Requires(),
        measured=() if speed is None else (Measured(SPEED_RATIO, speed),),
        details=made.details,
    )
    return store.publish(staging, manifest)


def _graph(component: str, file: Path, staging: Path, target: Target, made: Exported) -> Graph:
    if target == "onnx":
        shutil.copyfile(file, staging / file.name)
        name = file.name
    else:
        name = f"{component}.xml"
        save_model(convert_model(file), staging / name, compress_to_fp16=False)
    graph = made.graph(component)
    size = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in onnx.load(file).graph.initializer)
    return Graph(component, name, graph.inputs, graph.outputs, graph.axes, size)
