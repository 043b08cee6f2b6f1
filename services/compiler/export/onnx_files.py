"""From a torch module to a checked ONNX file whose parts are named after the module's.

What the exporter of torch leaves is brought into the form that quantizers and runtimes expect: a linear layer is a
MatMul by an initializer [in, out] and an Add, with the layer's name; a weight that is shared is in the file once.
"""

import ast
import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from services.compiler.export.exported import ExportError
from services.compiler.layers import save
from services.runtimes.artifacts.manifest import Port

# Old enough for every runtime's quantizers and parsers, and the first with all operators that torch's exporter emits.
OPSET = 18
# Constants of at most so many numbers are shapes, axes and factors.
_SHAPE_SIZE_MOST = 8


def export_module(
    module: nn.Module,
    example: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Any],
    file: Path,
    *,
    output_names: Sequence[str],
    input_names: Sequence[str] = (),
    opset: int = OPSET,
) -> None:
    """Write the module, in evaluation mode, as ONNX to `file` and check it; `layers.save` says where weights lie.

    example: arguments of forward by name, with more than 1 along every dynamic axis. dynamic_shapes: of the same
    structure, as torch.export takes it. input_names: of the flattened arguments in the order of the parameters, when
    forward takes lists. Raises ExportError naming the operator or layer, OSError.
    """
    program = _exported_program(module, example, dynamic_shapes)
    model = _converted(module, program, list(input_names) or list(example), output_names, opset)
    _name_axes(model, dynamic_shapes)
    # Before the simplification, which would fold small weights into nameless ones.
    _name_nodes(model)
    _merge_shared(model)
    _plain_linears(model)
    _simplify(model)
    save(model, file)
    check(file)


def ports(file: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of an ONNX file."""
    graph = onnx.load(file, load_external_data=False).graph
    return tuple(map(_port, graph.input)), tuple(map(_port, graph.output))


def check(file: Path) -> None:
    """onnx.checker with shape inference; raises ExportError."""
    try:
        # By path, as models beyond 2 GB can be checked in no other way.
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{file.name} is no valid ONNX: {_first_line(error)}") from error


def untie(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed in place, with a MatMul by an initializer of its own where a weight is shared.

    An output layer that shares the embedding is written as Gemm with a transposed weight, so that the file holds it
    once. Quantizers want one weight for each layer.
    """
    graph = model.graph
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    nodes = []
    for node in graph.node:
        weight = initializers.get(node.input[1]) if node.op_type == "Gemm" else None
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if weight is None or {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | attributes != _LINEAR:
            nodes.append(node)
            continue
        name = f"{node.name}.weight"
        if name in initializers:
            name = f"{node.name}.weight_transposed"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight).T), name))
        biased = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], name], [product], node.name))
        if biased:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], list(node.output), f"{node.name}/bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


# The attributes of Gemm that make it nn.Linear.
_LINEAR = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    dtype = "bfloat16" if kind.elem_type == onnx.TensorProto.BFLOAT16 else None
    return Port(value.name, dtype or onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)


# --- torch's exporter, and what it says when it fails ---


def _exported_program(
    module: nn.Module, example: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, (), dict(example), dynamic_shapes=dict(dynamic_shapes), strict=False)
    except MemoryError:
        raise
    except Exception as error:  # tracing runs the module's own code, and torch raises whatever it met
        where = _layer_of_traceback(module, error)
        raise ExportError(f"{where} cannot be traced: {_first_line(error)}") from error


def _converted(
    module: nn.Module,
    program: torch.export.ExportedProgram,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> ir.Model:
    try:
        with torch.no_grad(), _quiet():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ExportError(_conversion_failure(module, program, error)) from error
    assert onnx_program is not None
    inlined = common.InlinePass()(onnx_program.model)
    return inlined.model


def _conversion_failure(module: nn.Module, program: torch.export.ExportedProgram, error: BaseException) -> str:
    reasons = list(_chain(error))
    text = "\n".join(str(reason) for reason in reasons)
    found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>", text)
    target = f"{found[1].replace('::', '.')}.{found[2]}" if found else ""
    if not target:
        found = re.search(r"call_function\[target=torch\.ops\.([\w.]+)\]", text)
        target = found[1] if found else ""
    if not target:
        return f"{type(module).__name__} cannot be converted: {_first_line(reasons[-1])}"
    layers = [
        _module_path(node)
        for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith(target.removesuffix(".default"))
    ]
    where = f" in layer {layers[0]}" if layers and layers[0] else ""
    return f"operator {target}{where} has no form in ONNX: {_first_line(reasons[-1])}"


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _layer_of_traceback(module: nn.Module, error: BaseException) -> str:
    """The innermost of the module's layers whose forward was running."""
    names = {id(layer): name for name, layer in module.named_modules()}
    deepest: FrameType | None = None
    for reason in _chain(error):
        for frame, _ in traceback.walk_tb(reason.__traceback__):
            if names.get(id(frame.f_locals.get("self"))):
                deepest = frame
    if deepest is None:
        return type(module).__name__
    layer = deepest.f_locals["self"]
    return f"layer {names[id(layer)]} ({type(layer).__name__})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    reason: BaseException | None = error
    while reason is not None:
        yield reason
        reason = reason.__cause__ or reason.__context__


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:400]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log lines of the exporters below an error: they are meant for who wrote the module."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- the graph's form ---


def _tensor_of(value: ir.Value | None) -> Tensor | None:
    """The torch tensor of an initializer; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    raw = getattr(value.const_value, "raw", None)
    return raw if isinstance(raw, Tensor) else None


def _name_axes(model: ir.Model, dynamic_shapes: Mapping[str, Any]) -> None:
    """Call every dynamic dimension what its Dim is called: torch numbers them."""
    flat, _ = tree_flatten(dict(dynamic_shapes), is_leaf=lambda leaf: isinstance(leaf, dict) and _is_shape(leaf))
    names: dict[str, str] = {}
    for value, shape in zip(model.graph.inputs, flat, strict=True):
        assert value.shape is not None
        for place, dim in (shape or {}).items():
            size = value.shape[place]
            if isinstance(size, ir.SymbolicDim) and size.value:
                names[size.value] = dim.__name__
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                pattern.sub(lambda found: names[found[0]], dim.value)
                if isinstance(dim, ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            )


def _is_shape(leaf: Mapping[Any, Any]) -> bool:
    return all(isinstance(place, int) for place in leaf)


def _merge_shared(model: ir.Model) -> None:
    """One initializer for what is one parameter."""
    kept: dict[tuple[int, tuple[int, ...], torch.dtype], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        tensor = _tensor_of(value)
        if tensor is None or not tensor.numel():
            continue
        first = kept.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.dtype), value)
        if first is not value:
            value.replace_all_uses_with(first)


def _plain_linears(model: ir.Model) -> None:
    """Linear layers as MatMul by an initializer [in, out], and Add."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Gemm":
            _gemm_to_matmul(graph, node)
        elif node.op_type == "Transpose":
            _fold_transpose(node)


def _gemm_to_matmul(graph: ir.Graph, node: ir.Node) -> None:
    weight = node.inputs[1]
    tensor = _tensor_of(weight)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | attributes == _LINEAR
    if weight is None or tensor is None or not plain or len(weight.uses()) > 1:
        return
    _set_tensor(weight, tensor.t().contiguous())
    output = node.outputs[0]
    product = ir.node("MatMul", [node.inputs[0], weight], name=node.name)
    last, added = product, [product]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        last = ir.node("Add", [product.outputs[0], node.inputs[2]])
        last.name = f"{node.name}/bias"
        added.append(last)
        product.outputs[0].type, product.outputs[0].shape = output.type, output.shape
        product.outputs[0].name = f"{output.name}_product"
    _take_over(graph, node, added, last)


def _fold_transpose(node: ir.Node) -> None:
    """A transposed initializer, used by MatMul alone, as an initializer."""
    weight, permutation = node.inputs[0], node.attributes.get("perm")
    tensor = _tensor_of(weight)
    users = node.outputs[0].uses()
    if weight is None or tensor is None or tensor.dim() != 2 or len(weight.uses()) > 1:
        return
    if permutation is None or list(permutation.as_ints()) != [1, 0] or not users:
        return
    if any(user.op_type != "MatMul" or place != 1 for user, place in users):
        return
    _set_tensor(weight, tensor.t().contiguous())
    for user, _ in users:
        user.name = node.name
    node.outputs[0].replace_all_uses_with(weight)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _set_tensor(value: ir.Value, tensor: Tensor) -> None:
    value.const_value = ir.tensor(tensor.detach().numpy(), name=value.name)
    value.shape = ir.Shape(tuple(tensor.shape))


def _take_over(graph: ir.Graph, node: ir.Node, added: Sequence[ir.Node], last: ir.Node) -> None:
    """Put `added` in the node's place, the last one's output in place of its output."""
    output = node.outputs[0]
    new = last.outputs[0]
    new.type, new.shape, new.name = output.type, output.shape, output.name
    graph.insert_before(node, added)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _name_nodes(model: ir.Model) -> None:
    """Name the node that holds a layer's weight after the layer; the others keep torch's names."""
    taken: set[str] = set()
    for node in model.graph:
        for value in node.inputs:
            name = value.name if value is not None and value.is_initializer() and value.name else ""
            layer, dot, parameter = name.rpartition(".")
            if dot and parameter == "weight":
                # Where a weight is shared, the node's own layer differs from the one that gave the weight its name.
                layer = _calling_layer(node) or layer
                node.name = layer if layer not in taken else f"{layer}/{node.name}"
                taken.add(layer)


def _calling_layer(node: ir.Node) -> str:
    """The path of the module whose forward the node comes from; "" for the outermost one's own."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _simplify(model: ir.Model) -> None:
    """Compute what does not depend on the inputs, such as shapes, and drop what nothing needs."""
    for _ in range(2):
        # With shape inference, one round's shapes are constants to the next.
        fold_constants(model, onnx_shape_inference=True)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    # Shapes, not biases: those keep their names.
    common.DeduplicateInitializersPass(size_limit=_SHAPE_SIZE_MOST)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    _drop_unused(model)
    # Pages of torch's own account of every node, which would make up half of a small model's file.
    common.ClearMetadataAndDocStringPass()(model)


def _drop_unused(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
