"""What a compiled model says of itself: manifest.json in the artifact's folder.

The compiler writes it, the stores list it, the engines decide by it whether they can run the artifact. An artifact's
id is the sha-256 of this file, which names the sha-256 of every other file: one id, one content.
"""

import hashlib
from typing import Any, Literal

import msgspec

FILE_NAME = "manifest.json"
# Raised whenever an older engine could not run what a newer compiler writes.
FORMAT = 1

# What the graphs are written for.
Target = Literal["onnx", "openvino", "tensorrt", "triton"]
# What runs a model. "torch" needs no artifact.
RuntimeName = Literal["torch", "onnxruntime", "openvino", "tensorrt", "triton"]
RUNTIME_OF: dict[Target, RuntimeName] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "triton": "triton",
}
ArtifactPrecision = Literal[
    "float32", "bfloat16", "float16", "int8_dynamic", "int8_weight_only", "int8_static", "int4_weight_only"
]
Kind = Literal["trocr", "diffusion"]


class Port(msgspec.Struct, frozen=True):
    """An input or output of a graph. shape: a number, or the name of an axis whose size the caller chooses."""

    name: str
    dtype: str  # as numpy calls it, or "bfloat16"
    shape: tuple[int | str, ...]


class Axis(msgspec.Struct, frozen=True):
    """A dimension that the caller chooses, the sizes it was verified for, both included."""

    name: str
    low: int
    high: int
    # Axis that its size follows from, such as half of it: nothing to choose, but a size that inputs have.
    follows: str = ""


class Graph(msgspec.Struct, frozen=True):
    """One network of the model."""

    # "encoder", "decoder"; "text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_encoder",
    # "vae_decoder", "controlnet".
    component: str
    file: str  # relative to the artifact's folder; weights beside it are found by the format's own rules
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: tuple[Axis, ...]
    weight_bytes: int
    kept_in_float: tuple[str, ...] = ()  # layers that quantization left out, by the names they have in the graph


class Check(msgspec.Struct, frozen=True):
    """Something that was measured of the finished artifact and had to hold. passed: value against limit."""

    name: str  # such as "encoder: largest error of last_hidden_state", "character error rate"
    value: float
    limit: float
    at_least: bool  # whether value >= limit was asked for, else value <= limit
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Measured(msgspec.Struct, frozen=True):
    """A figure that is told and nothing depends on, but the choice between artifacts (names below)."""

    name: str
    value: float
    unit: str = ""


# Names of `Measured` that others read.
SPEED_RATIO = "speed against torch float32"  # how many times as fast as the source model on torch, same machine
BYTES_RATIO = "weight bytes against float32"


class BuiltOn(msgspec.Struct, frozen=True):
    """The machine and the versions that an artifact came from. features: what the processor can, as torch names it."""

    hardware: str  # label: "cuda", "rocm", "cpu"
    device_name: str
    features: tuple[str, ...]
    versions: dict[str, str]  # package -> version, of all that wrote the files


class Requires(msgspec.Struct, frozen=True):
    """What a machine has to have to run it; "" for anything. A plain ONNX graph runs everywhere."""

    hardware: str = ""  # label
    compute_capability: str = ""  # of a CUDA device, such as "8.9"
    versions: dict[str, str] = {}  # package -> the exact version, where the files are bound to one
    onnx_opset: int = 0  # the newest ONNX operator set that the graphs use; 0 when they are no ONNX graphs


class File(msgspec.Struct, frozen=True):
    """A file of the artifact."""

    path: str  # relative, with forward slashes
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """An artifact. recipe: sha-256 of all that decides what comes out, so that two compiles of it are one."""

    format: int
    kind: Kind
    model: str  # the name it was compiled under
    source: str  # folder or hub id with revision
    source_digest: str  # sha-256 over the checkpoint's files
    recipe: str
    target: Target
    precision: ArtifactPrecision
    graphs: tuple[Graph, ...]
    # The checkpoint's files but its weights (configuration, tokenizers, image processor): engines need no other folder.
    model_folder: str
    files: tuple[File, ...]
    built_on: BuiltOn
    requires: Requires
    checks: tuple[Check, ...]
    measured: tuple[Measured, ...]
    created_at: str  # RFC 3339, UTC
    # What the exporter wants its engine to know, such as the number of decoder layers.
    details: dict[str, Any] = {}

    @property
    def runtime(self) -> RuntimeName:
        return RUNTIME_OF[self.target]

    @property
    def weight_bytes(self) -> int:
        return sum(graph.weight_bytes for graph in self.graphs)

    def graph(self, component: str) -> Graph | None:
        return next((graph for graph in self.graphs if graph.component == component), None)

    def figure(self, name: str) -> float | None:
        """The value of a `Measured`; None when it was not measured."""
        return next((measured.value for measured in self.measured if measured.name == name), None)


def encode(manifest: Manifest) -> bytes:
    """The content of manifest.json."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def decode(content: bytes) -> Manifest:
    """Reads what `encode` wrote. Raises msgspec.DecodeError (a ValueError) for anything else."""
    return msgspec.json.decode(content, type=Manifest)


def artifact_id(content: bytes) -> str:
    """The id of the artifact with this manifest.json: 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
