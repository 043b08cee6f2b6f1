"""Compiled models."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from inkwell.types.inventory import Precision


class Target(enum.StrEnum):
    """What a model is compiled to."""

    ONNX = "onnx"
    """ONNX Runtime."""
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    """Engines bound to the device they were built on."""
    TRITON = "triton"
    """A model repository for NVIDIA Triton."""


class CompileOptions(TypedDict, total=False):
    """What `Client.compile` takes beside the model and the target; left out, each is as it says."""

    precision: str
    """See `Precision`; "float32"."""
    hardware: str
    """Label that the artifact is for: "cuda", "rocm" or "cpu"; the node that compiles."""
    component_precisions: Mapping[str, str]
    """Precision of single components, such as {"vae_decoder": "float32"}, in place of `precision`."""
    excluded_layers: Sequence[str]
    """Layers that stay in float: shell patterns over component/layer, such as "decoder/*fc2*"."""
    character_error_rate: float
    """How many more character errors a character a quantized model may make; 0.01."""
    psnr_db: float
    """How like its pictures have to be to the float32 model's, decibels at least; 30."""
    max_batch_size: int
    """Rows or images of one call at most, 1 to 256; 64."""
    max_side_px: int
    """Longest side of a picture, pixels; the model's own size."""
    request_id: str
    """A UUID: the same request under the same id is the same operation; the server chooses one."""


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file of an artifact."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Check:
    """Something that had to hold before the artifact was stored: `value` against `limit`."""

    name: str
    value: float
    limit: float
    at_least: bool
    unit: str


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that was measured of it."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified, stored model."""

    id: str
    """sha-256 of its manifest."""
    model: str
    kind: str
    """"trocr" or "diffusion"."""
    target: Target | None
    precision: Precision | None
    source: str
    source_digest: str
    files: tuple[ArtifactFile, ...]
    size_bytes: int
    hardware: str
    versions: Mapping[str, str]
    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]
    created_at: str
    """RFC 3339, UTC."""
    manifest_json: str
    in_use: bool

    def figure(self, name: str) -> float | None:
        """The value of a figure; None where it was not measured."""
        return next((figure.value for figure in self.figures if figure.name == name), None)


@dataclass(frozen=True, slots=True)
class CompileMetadata:
    """What a compile is about."""

    model: str
    target: Target | None
    precision: Precision | None


@dataclass(frozen=True, slots=True)
class CompilableModel:
    """A model that the compiler knows. kind: "trocr", "diffusion", or empty where it is not looked at yet."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class TargetSupport:
    """What the compiler can make. missing: what its machine lacks for it, empty for nothing."""

    target: Target | None
    precisions: tuple[Precision, ...]
    missing: str


@dataclass(frozen=True, slots=True)
class Targets:
    """What can be compiled, and to what."""

    models: tuple[CompilableModel, ...]
    targets: tuple[TargetSupport, ...]


DownloadProgress: TypeAlias = tuple[str, int, int]
"""Path of the file under way, bytes that are there, bytes of the whole file."""
