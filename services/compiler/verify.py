"""Proves a built graph right: against the torch module, at the corners of every dynamic axis.

An error is told relative to the size of what is right, so that one limit fits every output of every model.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import onnx
import torch
from torch import Tensor

from services.compiler.export.exported import ExportedGraph
from services.runtimes.artifacts.manifest import ArtifactPrecision, Axis, Check
from services.runtimes.hardware import free_memory
from services.runtimes.sessions.interface import Session, SessionError

Measure = Literal["largest", "root mean square"]


class VerificationError(Exception):
    """A graph or model that is not what it was made from; the message names the check, the value and the limit."""


class Tolerance(msgspec.Struct, frozen=True):
    """How far outputs may be from torch's float32. largest: of the largest error over the largest number that is
    right; else of the root mean squares, which single outliers of rounding do not decide."""

    measure: Measure
    limit: float


TOLERANCES: dict[ArtifactPrecision, Tolerance] = {
    # Other orders of summation: 1e-6 was seen on the embedded models; deep models add up some hundred layers of it.
    "float32": Tolerance("largest", 1e-3),
    # 11 bits of mantissa round by 2.4e-4 to 4.9e-4; 8e-4 was seen after 20 layers, where only weights are rounded too.
    "float16": Tolerance("largest", 2e-2),
    # 8 bits of mantissa: eight times as coarse.
    "bfloat16": Tolerance("largest", 1e-1),
    # Rounding to 8 bits is an error of some 0.7 % a layer, seen as 1 to 6 % of an output. A graph that is wrong (scales
    # of another channel, a lost bias) is off by its own size. Whether the model still does its work is the quality's
    # to say.
    "int8_weight_only": Tolerance("root mean square", 0.2),
    "int8_dynamic": Tolerance("root mean square", 0.25),
    "int8_static": Tolerance("root mean square", 0.35),
    # Sixteen times as coarse as 8 bits: 8 to 12 % was seen of an output.
    "int4_weight_only": Tolerance("root mean square", 0.5),
}
# Of free memory that the tensors of one corner may take: torch and the graph each hold their own.
_MEMORY_SHARE = 0.35
# A corner that torch would compute for longer is left out, and said so.
_CORNER_SECONDS_MOST = 30.0


def error_of(right: Tensor, found: Tensor, measure: Measure) -> float:
    """How far `found` is from `right`; infinite for another shape, or where only one of them is finite."""
    if right.shape != found.shape:
        return math.inf
    if not right.numel():
        return 0.0
    if not right.is_floating_point():
        return 0.0 if torch.equal(right, found.to(right.dtype)) else math.inf
    right, found = right.double(), found.double()
    finite = right.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(right[~finite], found[~finite]):
        return math.inf
    difference, right = found[finite] - right[finite], right[finite]
    if not right.numel():
        return 0.0
    if measure == "largest":
        size, error = float(right.abs().max()), float(difference.abs().max())
    else:
        size, error = float(right.square().mean().sqrt()), float(difference.square().mean().sqrt())
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def verify_graph(
    graph: ExportedGraph,
    session: Session,
    precision: ArtifactPrecision,
    say: Callable[[str], None],
    *,
    sizes: "Sizes | None" = None,
    device: str = "cpu",
) -> tuple[list[Check], tuple[Axis, ...]]:
    """Run a built graph at the corners of its axes against the torch module.

    session: of the built graph. sizes: of the exported one; None to look at its file. The axes that come back are those
    that were verified: a largest size that does not fit into memory is lowered, and `say` told. Raises
    VerificationError.
    """
    tolerance = TOLERANCES[precision]
    measured = sizes or Sizes(graph)
    most = int(free_memory(device) * _MEMORY_SHARE)
    axes = tuple(measured.lowered(axis, most, say) for axis in graph.axes)
    corners, left_out = list(_corners(axes)), 0
    worst, tried = 0.0, 0
    seconds = 0.0  # of torch, a byte of what it computes
    for corner in corners:
        bytes_ = measured.bytes(corner)
        if bytes_ > most or (tried and seconds * bytes_ > _CORNER_SECONDS_MOST):
            left_out += 1
            continue
        feeds = graph.example(corner)
        began = time.perf_counter()
        right = graph.reference(feeds)
        seconds = max(seconds, (time.perf_counter() - began) / bytes_) if tried else 0.0
        try:
            found = session.run(feeds)
        except SessionError as error:
            raise VerificationError(f"{graph.component} does not run at {_told(corner)}: {error}") from error
        tried += 1
        for name, tensor in right.items():
            if name not in found:
                raise VerificationError(f"{graph.component} has no output {name}")
            off = error_of(tensor, found[name], tolerance.measure)
            if not off <= tolerance.limit:
                raise VerificationError(
                    f"{graph.component}: {tolerance.measure} error of {name} at {_told(corner)} is {off:.3g} of its"
                    f" size; at most {tolerance.limit:g} is allowed for {precision}{_shapes(tensor, found[name])}"
                )
            worst = max(worst, off)
    if left_out:
        say(f"{graph.component}: {left_out} of {len(corners)} corners left out: too large for memory or time here")
    return [
        Check(f"{graph.component}: {tolerance.measure} error of its outputs", worst, tolerance.limit, False),
        Check(f"{graph.component}: corners of its axes", tried, min(tried, len(corners)), True, f"of {len(corners)}"),
    ], axes


def check_onnx(component: str, file: Path) -> Check:
    """onnx.checker on a file; raises VerificationError."""
    try:
        onnx.checker.check_model(str(file), full_check=False)
    except Exception as error:  # the checker, protobuf and the file system each have their own
        raise VerificationError(f"{component}: onnx.checker refuses {file.name}: {_first_line(error)}") from error
    return Check(f"{component}: problems that onnx.checker finds", 0, 0, False)


def require(checks: Sequence[Check]) -> None:
    """Raises VerificationError naming the first check that failed."""
    for check in checks:
        if not check.passed:
            unit = f" {check.unit}" if check.unit else ""
            raise VerificationError(
                f"{check.name} is {check.value:.4g}{unit}; at {'least' if check.at_least else 'most'}"
                f" {check.limit:.4g}{unit} is asked for"
            )


class Sizes:
    """What the tensors of a graph take at given sizes of its axes."""

    def __init__(self, graph: ExportedGraph) -> None:
        self._graph = graph
        self._model = onnx.load(graph.file, load_external_data=False)
        # They are there once, whatever the sizes.
        self._weights = {tensor.name for tensor in self._model.graph.initializer}
        _drop_large(self._model)
        self._known: dict[tuple[tuple[str, int], ...], int] = {}

    def lowered(self, axis: Axis, most: int, say: Callable[[str], None]) -> Axis:
        """The axis with a largest size that fits into so many bytes, the others at their smallest."""
        others = {other.name: other.low for other in self._graph.axes}
        high = axis.high
        while high > axis.low and self.bytes({**others, axis.name: high}) > most:
            high = max(axis.low, high // 2)
        if high < axis.high:
            say(
                f"{self._graph.component}: {axis.name} is verified up to {high} of {axis.high}: more does not fit into"
                f" {most / 1e9:.1f} GB of memory"
            )
        return msgspec.structs.replace(axis, high=high)

    def bytes(self, corner: Mapping[str, int]) -> int:
        """An estimate of the memory of a run: inputs, outputs, and three times the largest node's own tensors."""
        key = tuple(sorted(corner.items()))
        if key not in self._known:
            self._known[key] = self._estimate(corner)
        return self._known[key]

    def _estimate(self, corner: Mapping[str, int]) -> int:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.value_info[:]
        for value in [*model.graph.input, *model.graph.output]:
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in corner:
                    dimension.dim_value = corner[dimension.dim_param]
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        sizes = {value.name: _value_bytes(value) for value in [*inferred.input, *inferred.value_info, *inferred.output]}
        for name in self._weights:
            sizes[name] = 0
        ends = sum(sizes[value.name] for value in [*model.graph.input, *model.graph.output])
        largest = max(
            (sum(sizes.get(name, 0) for name in {*node.input, *node.output}) for node in model.graph.node), default=0
        )
        return ends + 3 * largest


def _value_bytes(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    count = math.prod(dimension.dim_value or 1 for dimension in kind.shape.dim)
    return count * (8 if kind.elem_type == onnx.TensorProto.INT64 else 4)


def _drop_large(model: onnx.ModelProto) -> None:
    """Weights become inputs without values: shapes do not depend on them."""
    kept = []
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= 1024 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
        else:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _corners(axes: Sequence[Axis]) -> Iterator[dict[str, int]]:
    """Every combination of the smallest and largest sizes, the smallest first."""
    chosen = [axis for axis in axes if not axis.follows]
    ends = [(axis.low,) if axis.low == axis.high else (axis.low, axis.high) for axis in chosen]
    for sizes in itertools.product(*ends):
        yield dict(zip((axis.name for axis in chosen), sizes, strict=True))


def _told(corner: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in corner.items()) or "its only shape"


def _shapes(right: Tensor, found: Tensor) -> str:
    if right.shape == found.shape:
        return ""
    return f"; its shape is {list(found.shape)} and not {list(right.shape)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]
