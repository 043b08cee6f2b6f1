"""Which nodes of an ONNX graph TensorRT's parser takes, told before a GPU is there to ask it.

The table is the parser's public one, https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, of the version
below. TensorRT 11 documents the same operators and opset 25 as its newest (NVIDIA's ONNX Opset Guide for TensorRT 11).
What the parser itself says while an engine is built is the last word; this says most of it minutes or days earlier.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

TABLE_VERSION = "TensorRT 10.15"
TABLE_DATE = "2026-02-02"  # of that parser's release
OPSETS = (9, 25)

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_INTS = frozenset({TensorProto.INT32, TensorProto.INT64})
_BOOL = frozenset({TensorProto.BOOL})
_HALF = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
_QUANTIZED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1})
_ANY = _FLOATS | _INTS | _BOOL

# Operators by the element types that they take.
_TABLE: tuple[tuple[frozenset[int], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose"
        " Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool"
        " GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM"
        " LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization"
        " PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform"
        " RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Selu Sigmoid Sin Sinh Softmax Softplus"
        " Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _HALF,
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign STFT",
    ),
    (
        _FLOATS | _INTS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min"
        " Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin"
        " ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum"
        " TensorScatter TopK",
    ),
    (
        _ANY,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence"
        " Scan Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (_ANY | _QUANTIZED, "Constant ConstantOfShape"),
    (_ANY | {TensorProto.UINT8}, "Cast CastLike"),
    (_BOOL, "And Not Or Xor"),
    (_QUANTIZED, "DequantizeLinear"),
)
SUPPORTED: dict[str, frozenset[int]] = {name: types for types, names in _TABLE for name in names.split()}
_NAMED_UNSUPPORTED = (
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im"
    " Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger"
    " MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional"
    " OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt"
    " SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap"
    " SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer"
    " Unique"
)
UNSUPPORTED = frozenset(_NAMED_UNSUPPORTED.split())
# Operators of its own that the parser knows in any domain (docs/TRT_custom_ops.md beside the table).
OWN_OPERATORS = frozenset(
    ["TRT_Attention", "TRT_FP8DequantizeLinear", "TRT_FP8QuantizeLinear", "TRT_KVCacheUpdate", "TRT_QuantizedAttention"]
)
# The input or output whose element type the table speaks of, where it is not the first input.
_TYPED_BY_OUTPUT = frozenset(["Cast", "CastLike", "Constant", "ConstantOfShape", "RandomNormal", "RandomUniform"])
_TYPED_BY_INPUT = {"Where": 1, "OneHot": 2}
_WHAT_HELPS = {
    "DynamicQuantizeLinear": "compile to int8_static: its ranges stand in the graph",
    "MatMulInteger": "compile to int8_static: its ranges stand in the graph",
    "ConvInteger": "compile to int8_static: its ranges stand in the graph",
    "QLinearMatMul": "quantize with QuantizeLinear and DequantizeLinear around float operators instead",
    "QLinearConv": "quantize with QuantizeLinear and DequantizeLinear around float operators instead",
}


@dataclass(frozen=True)
class Problem:
    """A node that TensorRT may not take. certain: the table says no; else the parser may still find a way."""

    node: str
    operator: str  # with its domain if it has one: "com.microsoft::FusedGemm"
    why: str
    certain: bool

    def __str__(self) -> str:
        return f"{self.operator} at node {self.node}: {self.why}"


@dataclass(frozen=True)
class Report:
    """What a graph is made of and what of it TensorRT does not take."""

    opset: int
    counts: dict[str, int]  # operator -> nodes of it
    problems: tuple[Problem, ...]
    types: frozenset[int]  # TensorProto element types of weights and values

    @property
    def refusals(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.certain)


def check(file: Path, plugins: Collection[str] = ()) -> Report:
    """Reads an ONNX file without its external weights. plugins: names of TensorRT plugins that are there."""
    model = onnx.load(str(file), load_external_data=False)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    problems: list[Problem] = []
    low, high = OPSETS
    if not low <= opset <= high:
        why = f"the graph is written for opset {opset}; TensorRT 11 reads {low} to {high}: export it for opset {high}"
        problems.append(Problem("(graph)", "opset", why, certain=True))
    # Without it fewer types are known, and nothing else changes.
    with contextlib.suppress(onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError):
        model = onnx.shape_inference.infer_shapes(model)
    local = {(function.domain, function.name) for function in model.functions}
    scope = _Scope(file.parent, local, frozenset(plugins))
    scope.walk(model.graph)
    for function in model.functions:
        scope.walk_nodes(function.node)
    return Report(opset, dict(sorted(scope.counts.items())), (*problems, *scope.problems), frozenset(scope.types))


@dataclass
class _Scope:
    """Names that are known where a node stands."""

    folder: Path
    local_functions: set[tuple[str, str]]
    plugins: frozenset[str]
    element_types: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    types: set[int] = field(default_factory=set)

    def walk(self, graph: GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                self.element_types[value.name] = tensor.elem_type
                if tensor.HasField("shape"):
                    self.ranks[value.name] = len(tensor.shape.dim)
        for weight in graph.initializer:
            self.element_types[weight.name] = weight.data_type
            self.ranks[weight.name] = len(weight.dims)
            self.constants[weight.name] = weight
        self.types.update(self.element_types.values())
        self.walk_nodes(graph.node)

    def walk_nodes(self, nodes: Collection[NodeProto]) -> None:
        for node in nodes:
            if node.op_type == "Constant" and (value := _attribute(node, "value")) is not None:
                self.constants[node.output[0]] = value.t
        for node in nodes:
            self.counts[_name(node)] += 1
            self.problems.extend(
                Problem(node.name or f"(output {node.output[0]})", _name(node), *problem)
                for problem in self.judge(node)
            )
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    self.walk(attribute.g)
                for graph in attribute.graphs:
                    self.walk(graph)

    def judge(self, node: NodeProto) -> Iterator[tuple[str, bool]]:
        """Why a node may not be taken, and whether that is certain."""
        if (node.domain, node.op_type) in self.local_functions or node.op_type in self.plugins | OWN_OPERATORS:
            return
        if node.domain not in ("", "ai.onnx"):
            yield f"not an ONNX operator; it takes a TensorRT plugin of the name {node.op_type}", True
            return
        if node.op_type not in SUPPORTED:
            listed = "is listed as not supported" if node.op_type in UNSUPPORTED else "is not listed"
            helps = _WHAT_HELPS.get(node.op_type, f"a TensorRT plugin of the name {node.op_type} would be taken")
            yield f"{listed} ({TABLE_VERSION}, {TABLE_DATE}); {helps}", True
            return
        element_type = self.type_of(node)
        if element_type is not None and element_type not in SUPPORTED[node.op_type]:
            yield f"not listed for {TensorProto.DataType.Name(element_type)} ({TABLE_VERSION})", False
        if (restriction := _RESTRICTIONS.get(node.op_type)) is not None:
            yield from restriction(self, node)

    def type_of(self, node: NodeProto) -> int | None:
        place = _TYPED_BY_INPUT.get(node.op_type, 0)
        if node.op_type in _TYPED_BY_OUTPUT:
            return self.element_types.get(node.output[0])
        return self.element_types.get(node.input[place]) if len(node.input) > place else None

    def is_constant(self, node: NodeProto, place: int) -> bool:
        """Whether an input is left out or known when the engine is built, as far as the file says."""
        return len(node.input) <= place or not node.input[place] or node.input[place] in self.constants

    def values(self, node: NodeProto, place: int) -> np.ndarray | None:
        if len(node.input) <= place or (tensor := self.constants.get(node.input[place])) is None:
            return None
        try:
            return numpy_helper.to_array(tensor, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError):
            return None  # weights that are not beside the graph


_Restriction = Callable[[_Scope, NodeProto], Iterator[tuple[str, bool]]]


def _only_first_output(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    if any(node.output[1:]):
        yield f"only its first output is supported, and {', '.join(filter(None, node.output[1:]))} is used too", True


def _constant_input(place: int, name: str) -> _Restriction:
    def restriction(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
        if not scope.is_constant(node, place):
            yield f"{name} must be known when the engine is built; here {node.input[place]} is computed", False

    return restriction


def _zero_point(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    values = scope.values(node, 2)
    if values is not None and np.any(values.astype(np.float32) != 0):
        yield "its zero point must be 0: quantize symmetrically", True


def _attention(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    for name, place in (("Q", 0), ("K", 1), ("V", 2), ("attn_mask", 3)):
        rank = scope.ranks.get(node.input[place]) if len(node.input) > place else None
        if rank not in (None, 4):
            yield f"{name} must have 4 dimensions and has {rank}", True
    if any(node.input[4:]):
        yield "past_key, past_value and nonpad_kv_seqlen are not supported", True
    if any(node.output[1:]):
        yield "present_key, present_value and qk_matmul_output are not supported", True
    if (softcap := _attribute(node, "softcap")) is not None and softcap.f:
        yield "softcap is not supported", True


def _resize(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    allowed = {
        "mode": ("nearest", "linear"),
        "coordinate_transformation_mode": (
            "half_pixel",
            "pytorch_half_pixel",
            "tf_half_pixel_for_nn",
            "asymmetric",
            "align_corners",
        ),
        "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        "keep_aspect_ratio_policy": ("stretch",),
    }
    for name, values in allowed.items():
        attribute = _attribute(node, name)
        if attribute is not None and attribute.s.decode() not in values:
            yield f"{name} must be one of {', '.join(values)} and is {attribute.s.decode()}", True
    if (antialias := _attribute(node, "antialias")) is not None and antialias.i:
        yield "antialiasing is not supported", True


def _top_k(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    if (ordered := _attribute(node, "sorted")) is not None and not ordered.i:
        yield "sorted must be 1", True
    k = scope.values(node, 1)
    if k is not None and k.size and int(k.reshape(-1)[0]) >= 3840:
        yield f"K must be less than 3840 and is {int(k.reshape(-1)[0])}", True


def _scatter_nd(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    if (reduction := _attribute(node, "reduction")) is not None and reduction.s != b"none":
        yield f"reduction must be none and is {reduction.s.decode()}", True


def _dilations(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    if (dilations := _attribute(node, "dilations")) is not None and any(size != 1 for size in dilations.ints):
        yield "dilations must be 1", True
    if node.op_type == "MaxPool":
        yield from _only_first_output(scope, node)


def _rank_4(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    if (rank := scope.ranks.get(node.input[0])) not in (None, 4):
        yield f"its input must have 4 dimensions and has {rank}", True


def _tensor_scatter(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    yield from _rank_4(scope, node)
    if (axis := _attribute(node, "axis")) is not None and axis.i != -2:
        yield f"axis must be -2 and is {axis.i}", True


def _strings(scope: _Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    for name in ("sparse_value", "value_string", "value_strings"):
        if _attribute(node, name) is not None:
            yield f"{name} is not supported", True


_RESTRICTIONS: dict[str, _Restriction] = {
    "Attention": _attention,
    "AveragePool": _dilations,
    "Constant": _strings,
    "CumSum": _constant_input(1, "axis"),
    "DequantizeLinear": _zero_point,
    "GridSample": _rank_4,
    "LayerNormalization": _only_first_output,
    "LpPool": _dilations,
    "MaxPool": _dilations,
    "OneHot": _constant_input(1, "depth"),
    "QuantizeLinear": _zero_point,
    "Resize": _resize,
    "ScatterND": _scatter_nd,
    "Squeeze": _constant_input(1, "axes"),
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    "Unsqueeze": _constant_input(1, "axes"),
    **{name: _constant_input(1, "axes") for name in SUPPORTED if name.startswith("Reduce")},
}


def _attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _name(node: NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
