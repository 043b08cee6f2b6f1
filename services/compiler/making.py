"""From a checkpoint to the graphs of an artifact: exported, built for the target, verified. Imports torch."""

from collections.abc import Callable
from dataclasses import dataclass
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
from services.compiler.verify import VerificationError
from services.kit import faults
from services.runtimes.artifacts.manifest import ArtifactPrecision, Check, Graph, Kind, Measured
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.hardware import detect
from services.runtimes.sessions.interface import SessionError

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
                graphs = tuple(_engine(graph, request.precision, folder, staging, say) for graph in built.graphs)
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
    options = triton.RepositoryOptions(
        prefix=f"{request.model}-", precision=request.precision, max_batch_size=request.max_batch_size
    )
    built = [triton.BuiltGraph(graph, folder / graph.file, exported.graph(graph.component).example) for graph in graphs]
    return triton.write_repository(built, staging, request.hardware or detect().label, options)


def _engine(graph: Graph, precision: ArtifactPrecision, folder: Path, staging: Path, say: Say) -> Graph:
    machine = tensorrt_machine.require()
    plan = tensorrt.plan(graph.component, folder / graph.file, graph.inputs, graph.axes, precision, machine)
    engine = staging / f"{graph.component}.engine"

    def note(text: str) -> None:
        say("building", f"{graph.component}: {text}")

    note(tensorrt.report(plan, engine))
    tensorrt.build(plan, engine, say=note)
    return msgspec.structs.replace(graph, file=engine.name)
