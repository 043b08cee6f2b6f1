"""From exported float32 graphs to the graphs of an artifact: built, searched, verified, measured.

`build` is what the child process of a compile calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto
from torch import Tensor

from services.compiler import half, harm, layers, measure, quantize_onnx, quantize_openvino, verify
from services.compiler.domain import CompileRequest, Stage
from services.compiler.export.exported import Exported, ExportedGraph
from services.compiler.layers import BuildError, Layer
from services.compiler.quality.judge import Judge, judge_of
from services.compiler.search import search
from services.compiler.sessions import RecordingSession
from services.compiler.verify import VerificationError
from services.runtimes.artifacts.manifest import (
    BYTES_RATIO,
    SPEED_RATIO,
    ArtifactPrecision,
    Axis,
    Check,
    Graph,
    Measured,
    RuntimeName,
    Target,
)
from services.runtimes.hardware import Hardware, detect
from services.runtimes.sessions.interface import Session, SessionError, SessionOptions
from services.runtimes.sessions.opening import open_session

Say = Callable[[Stage, str], None]
_FLOATS: dict[ArtifactPrecision, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Built:
    """What the manifest says of the graphs, which lie in the staging folder. All checks have passed."""

    graphs: tuple[Graph, ...]
    checks: tuple[Check, ...]
    measured: tuple[Measured, ...]


def build(exported: Exported, request: CompileRequest, checkpoint: Path, staging: Path, say: Say) -> Built:
    """Bring the graphs to the request's target, "onnx" or "openvino", and precision, in the folder `staging`.

    checkpoint: the folder that was exported. Raises BuildError for what cannot be built, BudgetError when no choice of
    layers holds the budget, VerificationError for a graph that is wrong, LinesError and PromptsError for a calibration
    folder that is no good, SessionError, OSError; what was written stays for the caller to take away.
    """
    refuse_precision(request)
    hardware = detect()
    judge = judge_of(exported, checkpoint, request)
    works = [_Work(graph, request) for graph in exported.graphs]
    say("checking", "running the model in float32")
    calibration = _run_in_float(works, judge, hardware, say)
    for work in works:
        work.calibration = calibration.get(work.component, ())
    kept, judged = _kept_in_float(works, judge, request, staging, hardware, say)
    graphs, checks, measured = [], [], []
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for work in works:
            say("building", f"{work.component}: {work.precision} for {request.target}")
            file = work.write(kept.get(work.component, frozenset()), staging)
            sessions[work.component] = stack.enter_context(_opened(file, work, request.target, hardware))
        for work in works:
            say("verifying", f"{work.component}: outputs against torch at the corners of its axes")
            file = work.file(staging)
            if request.target != "openvino":
                checks.append(verify.check_onnx(work.component, file))
            found, axes = verify.verify_graph(
                work.graph,
                sessions[work.component],
                work.precision,
                lambda note: say("verifying", note),
                sizes=work.sizes,
            )
            checks += found
            graphs.append(work.graph_of(file, axes, kept.get(work.component, frozenset())))
        say("verifying", judge.limit.name)
        if not judged:
            judge.value(sessions, thorough=True)
        found, figures = judge.checks()
        checks += found
        measured += figures
        verify.require(checks)
        say("measuring", "speed against torch")
        measured += [measure.component(work.graph, sessions[work.component]) for work in works]
        measured.append(Measured(SPEED_RATIO, measure.whole(*judge.speed_pair(sessions))))
    whole = sum(work.float_bytes for work in works)
    measured.append(Measured(BYTES_RATIO, sum(graph.weight_bytes for graph in graphs) / whole))
    return Built(tuple(graphs), tuple(checks), tuple(measured))


def refuse_precision(request: CompileRequest) -> None:
    """Raises BuildError for a precision that the target's runtime has no kernels for on the hardware."""
    precisions = {request.precision, *request.component_precisions.values()}
    label = request.hardware or detect().label
    if "bfloat16" in precisions and request.target == "onnx" and label == "cpu":
        raise BuildError(
            "bfloat16 for onnx: ONNX Runtime has no bfloat16 kernels on processors; accepted there are float32,"
            " float16, int8_dynamic, int8_weight_only, int8_static and int4_weight_only, and bfloat16 for openvino"
        )


@dataclass
class _Work:
    """One graph under way."""

    graph: ExportedGraph
    request: CompileRequest
    calibration: Sequence[Mapping[str, Tensor]] = ()
    model: onnx.ModelProto = field(init=False)
    layers: list[Layer] = field(init=False)  # those that the precision is for
    excluded: frozenset[str] = field(init=False)
    float_bytes: int = field(init=False)
    sizes: verify.Sizes = field(init=False)
    _written: dict[Path, frozenset[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # All that the exported file is for, as the built one may take its place.
        self.float_bytes = layers.weight_bytes(self.graph.file)
        self.sizes = verify.Sizes(self.graph)
        self.model = layers.prepare(layers.load(self.graph.file))
        found = layers.find_layers(self.model)
        self.excluded = frozenset(layers.excluded_by(self.request.excluded_layers, self.component, found))
        self.layers = [layer for layer in found if layer.name not in self.excluded]

    @property
    def component(self) -> str:
        return self.graph.component

    @property
    def precision(self) -> ArtifactPrecision:
        return self.request.component_precisions.get(self.component, self.request.precision)

    @property
    def is_integer(self) -> bool:
        return self.precision.startswith("int")

    def file(self, folder: Path) -> Path:
        return folder / f"{self.component}{'.xml' if self.request.target == 'openvino' else '.onnx'}"

    def write(self, kept: frozenset[str], folder: Path) -> Path:
        """The built graph with these layers in float; once for each choice of them."""
        file = self.file(folder)
        if self._written.get(file) == kept:
            return file
        self._written.pop(file, None)
        chosen = [layer for layer in self.layers if layer.name not in kept]
        try:
            write_graph(
                self.model, self.precision, self.request.target, chosen, self.excluded | kept, file, self.calibration
            )
        except BuildError as error:
            raise BuildError(f"{self.component}: {error}") from error
        self._written[file] = kept
        return file

    def graph_of(self, file: Path, axes: tuple[Axis, ...], kept: frozenset[str]) -> Graph:
        size = file.with_suffix(".bin").stat().st_size if file.suffix == ".xml" else layers.weight_bytes(file)
        float_layers = sorted(self.excluded | kept) if self.precision != "float32" else []
        return Graph(self.component, file.name, self.graph.inputs, self.graph.outputs, axes, size, tuple(float_layers))


def write_graph(
    model: onnx.ModelProto,
    precision: ArtifactPrecision,
    target: Target,
    chosen: Sequence[Layer],
    excluded: frozenset[str],
    file: Path,
    calibration: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write a prepared float32 model at a precision.

    chosen: layers that integers are for. excluded: layers that stay in float32, which 16-bit ONNX graphs heed too.
    Raises BuildError, OSError.
    """
    if target == "openvino":
        quantize_openvino.write(model, precision, chosen, file, calibration)
        return
    if precision == "float32":
        built = model
    elif precision in _FLOATS:
        built = half.to_16_bits(model, _FLOATS[precision], excluded)
    else:
        built = quantize_onnx.quantize(model, precision, chosen, calibration)
    layers.save(built, file)


def _run_in_float(
    works: Sequence[_Work], judge: Judge, hardware: Hardware, say: Say
) -> dict[str, Sequence[Mapping[str, Tensor]]]:
    """Have the judge note what the model does in float32; answers the inputs of each graph on the way."""
    with ExitStack() as stack:
        options = SessionOptions(hardware)
        sessions: dict[str, Session] = {}
        for work in works:
            sessions[work.component] = open_session(work.graph.file, "onnxruntime", options)
            stack.callback(sessions[work.component].close)
        calibration: dict[str, Sequence[Mapping[str, Tensor]]] = {}
        if any(work.is_integer for work in works):
            recording = {component: RecordingSession(session) for component, session in sessions.items()}
            judge.watch(recording)
            calibration = {component: session.feeds for component, session in recording.items()}
        judge.reference(sessions, lambda note: say("checking", note))
    return calibration


def _kept_in_float(
    works: Sequence[_Work], judge: Judge, request: CompileRequest, staging: Path, hardware: Hardware, say: Say
) -> tuple[dict[str, frozenset[str]], bool]:
    """Which layers of each component have to stay in float for the budget to hold, and whether they were what was last
    judged thoroughly; raises BudgetError."""
    integer = [work for work in works if work.is_integer]
    if not integer:
        return {}, False

    def by_component(kept: frozenset[str]) -> dict[str, frozenset[str]]:
        return {
            work.component: frozenset(layer.name for layer in work.layers if _id(work, layer) in kept) for work in works
        }

    def evaluate(kept: frozenset[str], *, thorough: bool = False) -> float:
        with ExitStack() as stack:
            sessions = {}
            for work in works:
                file = work.write(by_component(kept).get(work.component, frozenset()), staging)
                sessions[work.component] = stack.enter_context(_opened(file, work, request.target, hardware))
            return judge.value(sessions, thorough=thorough)

    def ranking() -> list[str]:
        say("quantizing", "finding out which layers suffer most")
        harms = {_id(work, layer): harmed for work in integer for layer, harmed in _harms(work)}
        # Among equals the graph's order, so that two compiles are one.
        return sorted(harms, key=lambda one: -harms[one])

    def tell(note: str) -> None:
        say("quantizing", note)

    found = search(ranking, evaluate, judge.limit, tell)
    judged = judge.limit.holds(evaluate(found.kept, thorough=True))
    if not judged:
        tell("not enough on all inputs; searching once more with them")
        found = search(ranking, lambda kept: evaluate(kept, thorough=True), judge.limit, tell)
    return by_component(found.kept), judged


def _id(work: _Work, layer: Layer) -> str:
    return f"{work.component}/{layer.name}"


def _harms(work: _Work) -> list[tuple[Layer, float]]:
    found = harm.rank(work.model, work.layers, work.precision, work.calibration)
    return [(layer, found[layer.name]) for layer in work.layers]


@contextmanager
def _opened(file: Path, work: _Work, target: Target, hardware: Hardware) -> Iterator[Session]:
    runtime: RuntimeName = "openvino" if target == "openvino" else "onnxruntime"
    options = SessionOptions(hardware, allow_16_bit=work.precision in _FLOATS)
    try:
        session = open_session(file, runtime, options)
    except SessionError as error:
        raise VerificationError(f"{work.component}: {runtime} does not open the built graph: {error}") from error
    try:
        yield session
    finally:
        session.close()
