"""One compile, in a process of its own: export, build, verify, measure, publish.

The service starts it through services.kit.child, which gives it the job on standard input and limits its memory and
time. By hand, such as in a Job on a node with the hardware: `python -m services.compiler.work --help`.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import msgspec

from services.compiler import checkpoint
from services.compiler.domain import CompileJob, CompileProgress, CompileRequest, CompileResult, Stage
from services.compiler.recipe import recipe_of
from services.compiler.store_faults import store_fault
from services.compiler.targets import present, tensorrt_machine
from services.kit import child_side, faults
from services.kit.faults import Fault, FaultData
from services.runtimes.artifacts.built_on import Machine, installed, machine
from services.runtimes.artifacts.digests import digest_of, digest_of_all
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.manifest import FORMAT, ArtifactPrecision, Kind, Manifest, Requires, Target
from services.runtimes.artifacts.store import Store, Stored, open_store
from services.runtimes.hardware import detect

_STAGES: tuple[Stage, ...] = get_args(Stage)
# Within the artifact: the checkpoint's files but its weights.
_MODEL_FOLDER = "model"

Say = Callable[[Stage, str], None]


def compile_job(job: CompileJob, folder: Path, tell: Callable[[msgspec.Struct], None]) -> CompileResult:
    """Do the job; what `child_side.serve` wants. folder: for temporary files. Raises Fault."""
    stages = len(_STAGES)

    def say(stage: Stage, note: str) -> None:
        tell(CompileProgress(stage, _STAGES.index(stage) + 1, stages, note))

    try:
        store = open_store(job.store)
        stored = _compile(job, store, folder, say)
        return CompileResult(stored.id, stored.manifest_json.decode())
    except StoreError as error:
        raise store_fault(error) from error


def _compile(job: CompileJob, store: Store, folder: Path, say: Say) -> Stored:
    request = job.request
    # Looked for first: exporting takes minutes.
    present.require(request.target)
    if request.target == "tensorrt":
        tensorrt_machine.require(request.precision)
    checkpoint.refuse(request)
    say("fetching", request.source)
    source, kind = _source(request, allow_pickled_weights=job.allow_pickled_weights)
    checkpoint.refuse(request, source)
    source_digest = _digest(source, request.model)
    versions = _versions(request.target)
    recipe = recipe_of(request, source_digest, _calibration_digest(request), versions)
    existing = store.find_recipe(recipe)
    if existing is not None:
        say("publishing", f"it is there already: {existing.id[:12]}")
        return existing
    manifest = _make(job, source, kind, folder, say)
    say("publishing", store.location)
    manifest = msgspec.structs.replace(manifest, source_digest=source_digest, recipe=recipe)
    return store.publish(Path(job.staging), manifest)


def _make(job: CompileJob, source: Path, kind: Kind, folder: Path, say: Say) -> Manifest:
    """Write the artifact's files into the job's staging folder; the manifest lacks its digests."""
    # Late: they import torch, transformers and diffusers, which take seconds and which a repeated compile needs not.
    from services.compiler.making import make_graphs

    request, staging = job.request, Path(job.staging)
    made = make_graphs(job, source, kind, folder, say)
    for file in made.helper_files:
        place = staging / _MODEL_FOLDER / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, place)
    here = machine(detect())
    return Manifest(
        format=FORMAT,
        kind=kind,
        model=request.model,
        source=request.source,
        source_digest="",
        recipe="",
        target=request.target,
        precision=request.precision,
        graphs=made.graphs,
        model_folder=_MODEL_FOLDER,
        files=(),
        built_on=here.built_on(),
        requires=_requires(request.target, here, [staging / graph.file for graph in made.graphs]),
        checks=made.checks,
        measured=made.measured,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        details=made.details,
    )


def _requires(target: Target, here: Machine, graphs: Sequence[Path]) -> Requires:
    from services.compiler.targets.onnx_parts import opset_of

    if target == "tensorrt":
        return Requires("cuda", here.compute_capability, {"tensorrt": here.versions["tensorrt"]})
    return Requires(onnx_opset=max((opset_of(file) for file in graphs if file.suffix == ".onnx"), default=0))


def _source(request: CompileRequest, *, allow_pickled_weights: bool) -> tuple[Path, Kind]:
    from services.runtimes import checkpoints
    from services.runtimes.checkpoints import CheckpointError, CheckpointMissingError

    try:
        folder = checkpoints.fetch(checkpoints.resolve(request.source), allow_pickled_weights=allow_pickled_weights)
    except CheckpointMissingError as error:
        raise Fault(
            FaultData(
                faults.Kind.NOT_FOUND,
                "MODEL_FILES_NOT_FOUND",
                f"model {request.model}: {error}",
                resource=faults.Resource("model", request.model),
            )
        ) from error
    except CheckpointError as error:
        raise faults.failed_precondition("MODEL_UNUSABLE", f"model {request.model}: {error}") from error
    kind = checkpoint.kind_of(folder)
    if kind is None:
        raise faults.failed_precondition(
            "MODEL_UNUSABLE",
            f"model {request.model}: {folder} is no TrOCR, diffusers or ControlNet folder; one of these has a"
            " config.json with model_type vision-encoder-decoder, a model_index.json, or a config.json with _class_name"
            " ControlNetModel",
        )
    return folder, kind


def _digest(folder: Path, model: str) -> str:
    try:
        return digest_of(folder)
    except (OSError, ValueError) as error:
        raise faults.failed_precondition("MODEL_UNUSABLE", f"model {model}: {error}") from error


def _calibration_digest(request: CompileRequest) -> str:
    """Of the lines or prompts that it is calibrated on; "" for those that ship."""
    if not request.calibration_folder:
        return ""
    try:
        return digest_of_all(Path(request.calibration_folder).expanduser())
    except (OSError, ValueError) as error:
        raise faults.failed_precondition(
            "CALIBRATION_UNUSABLE", f"calibration_folder: {error}", model=request.model
        ) from error


def _versions(target: Target) -> Mapping[str, str]:
    """Of what writes the artifact, and of the device where it is bound to one."""
    if target != "tensorrt":
        return installed()
    here = machine(detect())
    return {**here.versions, "device": here.processor, "compute_capability": here.compute_capability}


def _by_hand(arguments: Sequence[str]) -> None:
    """Compile without a service, into a store."""
    parser = argparse.ArgumentParser(prog="python -m services.compiler.work", description=_by_hand.__doc__)
    parser.add_argument("model", help="the name it is stored under")
    parser.add_argument("source", help="a folder, or a hub id as owner/name@revision")
    parser.add_argument("--to", choices=get_args(Target), required=True)
    parser.add_argument("--precision", choices=get_args(ArtifactPrecision), default="float32")
    parser.add_argument("--store", default="", help="a folder or s3://bucket/prefix; default: as the services")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    job = CompileJob(
        CompileRequest(options.model, options.source, options.to, options.precision),
        store.location,
        str(store.staging()),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="inkwell-compile-") as folder:
            result = compile_job(job, Path(folder), lambda told: print(_line(told), file=sys.stderr, flush=True))
    except Fault as fault:
        raise SystemExit(f"{fault}") from None
    finally:
        store.discard(Path(job.staging))
    print(result.artifact_id)


def _line(told: msgspec.Struct) -> str:
    assert isinstance(told, CompileProgress)
    return f"{told.step}/{told.step_count} {told.stage}: {told.note}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _by_hand(sys.argv[1:])
    else:
        child_side.serve(CompileJob, compile_job)
