"""What of one ONNX graph its targets have to know, and the one change that a target makes to it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx import GraphProto, ValueInfoProto, external_data_helper, helper


def onnx_parts(file: Path) -> tuple[Path, ...]:
    """The graph's file, and the files of its external weights by name."""
    model = onnx.load(str(file), load_external_data=False)
    beside = {
        external_data_helper.ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if external_data_helper.uses_external_data(tensor)
    }
    return (file, *(file.parent / location for location in sorted(beside)))


def opset_of(file: Path) -> int:
    """The version of the standard's operators that the graph is written in."""
    model = onnx.load(str(file), load_external_data=False)
    return max(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))


def has_scalars(file: Path) -> bool:
    """Whether an input or output of the graph has no dimensions."""
    graph = onnx.load(str(file), load_external_data=False).graph
    return bool(_scalars(graph.input) or _scalars(graph.output))


def widen_scalars(source: Path, target: Path) -> None:
    """Write the graph anew with shape [1] for every input and output that has none, under the same names.

    Triton refuses tensors without dimensions (triton-inference-server 2.51: "scalar tensors are not supported").
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    names = {value.name: f"{value.name}/scalar" for value in (*_scalars(graph.input), *_scalars(graph.output))}
    for node in graph.node:
        # Bodies of If and Loop see the names of the graph around them too.
        _rename(node, names)
    before = [
        helper.make_node("Squeeze", [value.name], [names[value.name]], name=names[value.name])
        for value in _scalars(graph.input)
    ]
    axes = "widen_scalars/axes"
    after = [
        helper.make_node("Unsqueeze", [names[value.name], axes], [value.name], name=names[value.name])
        for value in _scalars(graph.output)
    ]
    nodes = [*before, *graph.node, *after]
    if after:
        graph.initializer.append(helper.make_tensor(axes, onnx.TensorProto.INT64, [1], [0]))
    for value in (*_scalars(graph.input), *_scalars(graph.output)):
        value.type.tensor_type.shape.dim.add(dim_value=1)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(target))


def _scalars(values: Iterable[ValueInfoProto]) -> list[ValueInfoProto]:
    return [value for value in values if not value.type.tensor_type.shape.dim]


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for tensors in (node.input, node.output):
        for place, name in enumerate(tensors):
            tensors[place] = names.get(name, name)
    for attribute in node.attribute:
        bodies: list[GraphProto] = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        for body in bodies:
            for inner in body.node:
                _rename(inner, names)
