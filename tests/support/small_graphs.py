"""Small ONNX graphs with the traits of the compiler's own: a batch axis, a cache, scalars, two different row axes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from services.compiler.targets.triton import BuiltGraph
from services.runtimes.artifacts.manifest import Axis, Graph, Port

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
SIZE = 4


def built(
    folder: Path,
    component: str,
    nodes: list[onnx.NodeProto],
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    axes: tuple[Axis, ...],
    *,
    initializers: tuple[TensorProto, ...] = (),
    opset: int = 18,
) -> BuiltGraph:
    """Write a graph into `folder`, checked by onnx."""
    graph = helper.make_graph(
        nodes,
        component,
        [helper.make_tensor_value_info(port.name, _TYPES[port.dtype], list(port.shape)) for port in inputs],
        [helper.make_tensor_value_info(port.name, _TYPES[port.dtype], list(port.shape)) for port in outputs],
        initializer=list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    file = folder / f"{component}.onnx"
    onnx.save(model, str(file))
    return BuiltGraph(Graph(component, file.name, inputs, outputs, axes, 0), file, _example(inputs))


def encoder(folder: Path) -> BuiltGraph:
    """states = relu(pixels) and their number of channels-last sums: all of it on one batch axis."""
    return built(
        folder,
        "encoder",
        [
            helper.make_node("Relu", ["pixels"], ["states"], name="relu"),
            helper.make_node("Mul", ["states", "weight"], ["scaled"], name="scale"),
        ],
        (Port("pixels", "float32", ("images", SIZE, "width")), Port("weight", "float32", ("images", 1, 1))),
        (Port("states", "float32", ("images", SIZE, "width")), Port("scaled", "float32", ("images", SIZE, "width"))),
        (Axis("images", 1, 8), Axis("width", 1, 64)),
    )


def decoder(folder: Path) -> BuiltGraph:
    """A step with rows and images of different number, a cache that may be empty, and what is new in it."""
    return built(
        folder,
        "decoder",
        [
            helper.make_node("Cast", ["tokens"], ["floats"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["floats", "last"], ["column"], name="column"),
            helper.make_node("ReduceSum", ["past", "last"], ["sums"], name="sum", keepdims=1),
            helper.make_node("Gather", ["cross", "places"], ["seen"], name="seen", axis=0),
            helper.make_node("Add", ["column", "sums"], ["partial"], name="partial"),
            helper.make_node("Add", ["partial", "seen"], ["new"], name="new"),
        ],
        (
            Port("tokens", "int64", ("rows",)),
            Port("past", "float32", ("rows", "past")),
            Port("cross", "float32", ("images", SIZE)),
            Port("places", "int64", ("rows",)),
        ),
        (Port("new", "float32", ("rows", SIZE)),),
        (Axis("rows", 1, 16), Axis("past", 0, 32), Axis("images", 1, 16)),
        initializers=(helper.make_tensor("last", TensorProto.INT64, [1], [1]),),
    )


def denoiser(folder: Path) -> BuiltGraph:
    """sample * timestep: one input without dimensions."""
    return built(
        folder,
        "unet",
        [helper.make_node("Mul", ["sample", "timestep"], ["noise"], name="scale")],
        (Port("sample", "float32", ("batch", SIZE)), Port("timestep", "float32", ())),
        (Port("noise", "float32", ("batch", SIZE)),),
        (Axis("batch", 1, 4),),
    )


def identity(folder: Path, dtype: str) -> BuiltGraph:
    """out = in, in any type, on one batch axis with nothing else: tensors of one dimension."""
    return built(
        folder,
        f"identity-{dtype}",
        [helper.make_node("Identity", ["in"], ["out"], name="identity")],
        (Port("in", dtype, ("rows",)),),
        (Port("out", dtype, ("rows",)),),
        (Axis("rows", 1, 8),),
    )


def _example(inputs: tuple[Port, ...]) -> Callable[[Mapping[str, int]], dict[str, Tensor]]:
    def example(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        tensors = {}
        for port in inputs:
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)
            dtype = getattr(torch, port.dtype)
            # Zeros are token numbers, places and floats alike.
            tensors[port.name] = torch.zeros(shape, dtype=dtype)
        return tensors

    return example
