"""What exporting a checkpoint answers: its graphs in float32, and the torch modules that they must equal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.runtimes.artifacts.manifest import Axis, Kind, Port


class ExportError(Exception):
    """A checkpoint that cannot be exported; the message names the operator or layer and why."""


@dataclass(frozen=True)
class ExportedGraph:
    """One network, written as ONNX in float32 and checked by onnx.checker.

    Nodes that hold a layer's weight are named after the layer ("decoder.model.decoder.layers.0.fc1"), initializers
    after the parameter.
    """

    component: str  # as in manifest.Graph
    file: Path  # *.onnx; the weights of large graphs lie in a file beside it
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: tuple[Axis, ...]  # every name that stands in a port's shape
    # The torch module itself: inputs by name to outputs by name.
    reference: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    # Realistic inputs for these sizes of the axes, by axis name; the same every time.
    example: Callable[[Mapping[str, int]], dict[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """A whole checkpoint."""

    kind: Kind
    graphs: tuple[ExportedGraph, ...]
    helper_files: tuple[Path, ...]  # all an engine needs but the weights, relative to the checkpoint
    details: dict[str, Any] = field(default_factory=dict)  # for Manifest.details

    def graph(self, component: str) -> ExportedGraph:
        """The graph of that component; raises KeyError."""
        for graph in self.graphs:
            if graph.component == component:
                return graph
        raise KeyError(component)


def repeated(tensor: Tensor, count: int) -> Tensor:
    """The first `count` of the tensor's rows, said again from the first when it has fewer."""
    return tensor[torch.arange(count) % tensor.shape[0]].contiguous()
