"""From a checkpoint to the graphs of an artifact: exported, built for the target, verified. Imports torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from services.compiler import build as building
from services.compiler.domain import CompileJob, CompileRequest, Stage
from services.compiler.export import diffusion, trocr
from services.compiler.export.exported import Exported, ExportError
from services.compiler.layers import BuildError
from services.compiler.quality.lines import LinesError
from services.compiler.quality.prompts import PromptsError
from services.compiler.search import BudgetError
from services.compiler.targets import tensorrt, tensorrt_machine, triton
from services.compiler.targets.tensorrt_int8 import to_signed
from services.compiler.verify import VerificationError, verify_graph
from services.kit import faults
from services.runtimes.artifacts.manifest import ArtifactPrecision, Check, Graph, Kind, Measured
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.hardware import detect
from services.runtimes.sessions.interface import SessionError, SessionOptions
from services.runtimes.sessions.opening import open_session

Say = Callable[[Stage, str], None]

# What becomes of an error that is not a defect: the reason its callers are told.
_REASONS: dict[type[Exception], str] = {
    CheckpointError: "MODEL_UNUSABLE",
    ModelError: "MODEL_UNUSABLE",
    ExportError: "MODEL_NOT_EXPORTABLE",
    BuildError: "PRECISION_NOT_SUPPORTED",
    BudgetError: "BUDGET_NOT_HELD",
    VerificationError: "VERIFICATION_FAILED",
    LinesError: "CALIBRATION_UNUSABLE",
    PromptsError: "CALIBRATION_UNUSABLE",
    SessionError: "RUNTIME_FAILED",
}


@dataclass(frozen=True)
class Made:
    """What the manifest says of the graphs, and the checkpoint's files that go with them."""

    graphs: tuple[Graph, ...]
    checks: tuple[Check, ...]
    measured: tuple[Measured, ...]
    helper_files: tuple[Path, ...]
    details: dict[str, Any]


def make_graphs(job: CompileJob, source: Path, kind: Kind, folder: Path, say: Say) -> Made:
    """Write the graphs into the job's staging folder. folder: for files on the way there. Raises Fault."""
    request = job.request
    try:
        building.refuse_precision(request)
        exported = _export(job, source, kind, folder, say)
        staging = Path(job.staging)
        match request.target:
            case "onnx" | "openvino":
                built = building.build(exported, request, source, staging, say)
                graphs = built.graphs
            case "triton":
                # Triton's onnxruntime backend is in all of NVIDIA's images, and runs on every hardware.
                built = building.build(exported, msgspec.structs.replace(request, target="onnx"), source, folder, say)
                graphs = _repository(exported, built.graphs, request, folder, staging)
            case "tensorrt":
                built = building.build(exported, msgspec.structs.replace(request, target="onnx"), source, folder, say)
                graphs, more = _engines(exported, built.graphs, request, folder, staging, say)
                built = replace(built, checks=(*built.checks, *more))
    except tuple(_REASONS) as error:
        reason = next(reason for kind_, reason in _REASONS.items() if isinstance(error, kind_))
        raise faults.failed_precondition(
            reason, f"model {request.model}: nothing was stored, because {error}", model=request.model
        ) from error
    return Made(graphs, built.checks, built.measured, exported.helper_files, exported.details)


def _export(job: CompileJob, source: Path, kind: Kind, folder: Path, say: Say) -> Exported:
    request = job.request

    def note(text: str) -> None:
        say("exporting", text)

    if kind == "trocr":
        return trocr.export(
            source,
            folder,
            note,
            max_batch_size=request.max_batch_size,
            allow_pickled_weights=job.allow_pickled_weights,
        )
    return diffusion.export(
        source, folder, note, max_side_px=request.max_side_px, max_batch_size=request.max_batch_size
    )


def _repository(
    exported: Exported, graphs: tuple[Graph, ...], request: CompileRequest, folder: Path, staging: Path
) -> tuple[Graph, ...]:
    served: list[Graph] = []
    for graph in graphs:
        options = triton.RepositoryOptions(
            prefix=f"{request.model}-", precision=_precision(request, graph), max_batch_size=request.max_batch_size
        )
        built = triton.BuiltGraph(graph, folder / graph.file, exported.graph(graph.component).example)
        served += triton.write_repository([built], staging, request.hardware or detect().label, options)
    return tuple(served)


def _engines(
    exported: Exported, graphs: tuple[Graph, ...], request: CompileRequest, folder: Path, staging: Path, say: Say
) -> tuple[tuple[Graph, ...], list[Check]]:
    """Engines of the ONNX graphs, and what they answer on this very device against torch."""
    engines: list[Graph] = []
    checks: list[Check] = []
    for graph in graphs:
        precision = _precision(request, graph)
        machine = tensorrt_machine.require(precision)
        source = folder / graph.file
        if precision == "int8_static":
            source = source.with_suffix(".signed.onnx")
            to_signed(folder / graph.file, source)
        plan = tensorrt.plan(graph.component, source, graph.inputs, graph.axes, precision, machine)
        engine = staging / f"{graph.component}.plan"
        engine.with_suffix(".report.txt").write_text(tensorrt.report(plan, engine) + "\n")
        tensorrt.build(plan, engine, say=lambda text: say("building", text))
        hardware = detect()
        session = open_session(engine, "tensorrt", SessionOptions(hardware))
        try:
            of_engine, axes = verify_graph(
                exported.graph(graph.component),
                session,
                precision,
                lambda text: say("verifying", text),
                device=hardware.device,
            )
        finally:
            session.close()
        checks += [msgspec.structs.replace(check, name=f"engine of {check.name}") for check in of_engine]
        engines.append(msgspec.structs.replace(graph, file=engine.name, axes=axes))
    return tuple(engines), checks


def _precision(request: CompileRequest, graph: Graph) -> ArtifactPrecision:
    return request.component_precisions.get(graph.component, request.precision)
