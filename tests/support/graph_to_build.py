"""A small network with every kind of layer that the compiler quantizes, exported as the compiler exports."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from services.compiler.export.exported import ExportedGraph
from services.compiler.export.onnx_files import export_module, ports
from services.runtimes.artifacts.manifest import Axis

TOKENS = 40
_folder = tempfile.TemporaryDirectory(prefix="graph-to-build-")


class Network(nn.Module):
    """A normalized convolution, linear layers, an embedding, and an output layer that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.embedding = nn.Embedding(TOKENS, 96)
        self.first = nn.Linear(96, 192)
        self.second = nn.Linear(192, 96)
        self.last_norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image [batch, 3, 8, 8], tokens [batch, length] to features [batch, 24, 8, 8], scores [batch, TOKENS]."""
        features = self.up(torch.relu(self.norm(self.conv(image))))
        hidden = self.embedding(tokens).mean(1)
        hidden = self.last_norm(hidden + self.second(torch.nn.functional.gelu(self.first(hidden))))
        return features, self.head(hidden)


@cache
def exported() -> ExportedGraph:
    """The network with random weights, the same every time; exported once a test run, and not to be changed."""
    torch.manual_seed(0)
    network = Network()
    mean, variance = network.norm.running_mean, network.norm.running_var
    assert mean is not None
    assert variance is not None
    mean.normal_()
    variance.uniform_(0.5, 2.0)
    network.eval().requires_grad_(False)

    def example(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sizes["batch"] * 100 + sizes["length"])
        return {
            "image": torch.randn(sizes["batch"], 3, 8, 8, generator=generator),
            "tokens": torch.randint(TOKENS, (sizes["batch"], sizes["length"]), generator=generator),
        }

    def reference(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            features, scores = network(inputs["image"], inputs["tokens"])
        return {"features": features, "scores": scores}

    file = Path(_folder.name) / "small.onnx"
    batch, length = Dim("batch", min=1, max=8), Dim("length", min=1, max=32)
    export_module(
        network,
        example({"batch": 2, "length": 5}),
        {"image": {0: batch}, "tokens": {0: batch, 1: length}},
        file,
        output_names=["features", "scores"],
    )
    inputs, outputs = ports(file)
    return ExportedGraph(
        "small", file, inputs, outputs, (Axis("batch", 1, 8), Axis("length", 1, 32)), reference, example
    )
