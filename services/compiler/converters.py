"""protobuf <-> the compiler's own types; what a request may hold is checked here."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from inkwell.compiler.v1 import compiler_pb2
from services.compiler.domain import Budget, CompileRequest
from services.kit import faults
from services.runtimes.artifacts.manifest import ArtifactPrecision, Target
from services.runtimes.artifacts.store import Stored

MAX_BATCH_SIZE_MOST = 256
DEFAULT_BATCH_SIZE = 64
MAX_SIDE_MOST = 4096
EXCLUDED_LAYERS_MOST = 256
PATTERN_LENGTH_MOST = 256
PSNR_MOST = 100.0
HARDWARE = ("", "cuda", "rocm", "cpu")

TARGETS: dict[compiler_pb2.Target.ValueType, Target] = {
    compiler_pb2.TARGET_ONNX: "onnx",
    compiler_pb2.TARGET_OPENVINO: "openvino",
    compiler_pb2.TARGET_TENSORRT: "tensorrt",
    compiler_pb2.TARGET_TRITON: "triton",
}
PRECISIONS: dict[compiler_pb2.Precision.ValueType, ArtifactPrecision] = {
    compiler_pb2.PRECISION_FLOAT32: "float32",
    compiler_pb2.PRECISION_BFLOAT16: "bfloat16",
    compiler_pb2.PRECISION_FLOAT16: "float16",
    compiler_pb2.PRECISION_INT8_DYNAMIC: "int8_dynamic",
    compiler_pb2.PRECISION_INT8_WEIGHT_ONLY: "int8_weight_only",
    compiler_pb2.PRECISION_INT8_STATIC: "int8_static",
    compiler_pb2.PRECISION_INT4_WEIGHT_ONLY: "int4_weight_only",
}
_TARGET_NUMBERS = {name: number for number, name in TARGETS.items()}
_PRECISION_NUMBERS = {name: number for number, name in PRECISIONS.items()}
_TARGET_NAMES = ", ".join(compiler_pb2.Target.Name(number) for number in TARGETS)
_PRECISION_NAMES = ", ".join(compiler_pb2.Precision.Name(number) for number in PRECISIONS)


def to_request(request: compiler_pb2.CompileRequest, sources: Mapping[str, str]) -> CompileRequest:
    """What is to be compiled. sources: of the known models. Raises Fault."""
    if not request.model:
        raise faults.invalid_field("model", f"it is empty; accepted: {', '.join(sorted(sources))}")
    if request.model not in sources:
        raise faults.not_found("model", request.model, sources, field="model")
    if request.target not in TARGETS:
        raise faults.invalid_field("target", f"{request.target} is none; accepted: {_TARGET_NAMES}")
    if request.hardware not in HARDWARE:
        raise faults.invalid_field(
            "hardware", f"{request.hardware[:40]!r} is not a hardware label; accepted: cuda, rocm, cpu, or empty"
        )
    batch, side = request.max_batch_size, request.max_side_px
    if not 0 <= batch <= MAX_BATCH_SIZE_MOST:
        raise faults.invalid_field("max_batch_size", f"{batch}; accepted: 1 to {MAX_BATCH_SIZE_MOST}, or 0 for 64")
    if not 0 <= side <= MAX_SIDE_MOST or side % 8:
        raise faults.invalid_field(
            "max_side_px", f"{side}; accepted: multiples of 8 up to {MAX_SIDE_MOST}, or 0 for the model's own size"
        )
    return CompileRequest(
        model=request.model,
        source=sources[request.model],
        target=TARGETS[request.target],
        precision=to_precision(request.precision, "precision") or "float32",
        hardware=request.hardware,
        component_precisions={
            name: to_precision(request.component_precisions[name], f"component_precisions[{name!r}]") or "float32"
            for name in sorted(request.component_precisions)
        },
        excluded_layers=_patterns(request.excluded_layers),
        budget=_budget(request.budget),
        max_batch_size=batch or DEFAULT_BATCH_SIZE,
        max_side_px=side,
    )


def to_precision(number: compiler_pb2.Precision.ValueType, field: str) -> ArtifactPrecision | None:
    """None for unspecified; raises Fault for a number that is none."""
    if number == compiler_pb2.PRECISION_UNSPECIFIED:
        return None
    if number not in PRECISIONS:
        raise faults.invalid_field(field, f"{number} is none; accepted: {_PRECISION_NAMES}")
    return PRECISIONS[number]


def to_target(number: compiler_pb2.Target.ValueType, field: str) -> Target | None:
    """None for unspecified; raises Fault for a number that is none."""
    if number == compiler_pb2.TARGET_UNSPECIFIED:
        return None
    if number not in TARGETS:
        raise faults.invalid_field(field, f"{number} is none; accepted: {_TARGET_NAMES}")
    return TARGETS[number]


def _patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    found = tuple(patterns)
    if len(found) > EXCLUDED_LAYERS_MOST:
        raise faults.invalid_field(
            "excluded_layers", f"{len(found)} patterns; at most {EXCLUDED_LAYERS_MOST} are accepted"
        )
    for index, pattern in enumerate(found):
        if not pattern or len(pattern) > PATTERN_LENGTH_MOST or "/" not in pattern:
            raise faults.invalid_field(
                f"excluded_layers[{index}]",
                f"{pattern[:80]!r} is no pattern over component/layer; accepted: 1 to {PATTERN_LENGTH_MOST} characters"
                " with a slash, such as 'decoder/*fc2*'",
            )
    return found


def _budget(budget: compiler_pb2.QualityBudget) -> Budget:
    default = Budget()
    rate = budget.character_error_rate if budget.HasField("character_error_rate") else default.character_error_rate
    psnr = budget.psnr_db if budget.HasField("psnr_db") else default.psnr_db
    if not 0 <= rate <= 1:
        raise faults.invalid_field("budget.character_error_rate", f"{rate}; accepted: 0 to 1")
    if not 0 <= psnr <= PSNR_MOST:
        raise faults.invalid_field("budget.psnr_db", f"{psnr}; accepted: 0 to {PSNR_MOST:g}")
    return Budget(rate, psnr)


def to_metadata(request: CompileRequest) -> compiler_pb2.CompileMetadata:
    """What an operation says of itself."""
    return compiler_pb2.CompileMetadata(
        model=request.model,
        target=target_number(request.target),
        precision=precision_number(request.precision),
    )


def target_number(target: Target) -> compiler_pb2.Target.ValueType:
    """The enum's value."""
    return _TARGET_NUMBERS[target]


def precision_number(precision: ArtifactPrecision) -> compiler_pb2.Precision.ValueType:
    """The enum's value."""
    return _PRECISION_NUMBERS[precision]


def to_artifact(stored: Stored, *, in_use: bool) -> compiler_pb2.Artifact:
    """An artifact as callers see it."""
    manifest = stored.manifest
    return compiler_pb2.Artifact(
        id=stored.id,
        model=manifest.model,
        kind=manifest.kind,
        target=target_number(manifest.target),
        precision=precision_number(manifest.precision),
        source=manifest.source,
        source_digest=manifest.source_digest,
        files=[
            compiler_pb2.ArtifactFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in manifest.files
        ],
        size_bytes=stored.size_bytes,
        hardware=manifest.built_on.hardware,
        versions=manifest.built_on.versions,
        checks=[
            compiler_pb2.Check(
                name=check.name, value=check.value, limit=check.limit, at_least=check.at_least, unit=check.unit
            )
            for check in manifest.checks
        ],
        figures=[
            compiler_pb2.Figure(name=figure.name, value=figure.value, unit=figure.unit) for figure in manifest.measured
        ],
        created_at=_rfc3339(manifest.created_at),
        manifest_json=stored.manifest_json.decode(),
        in_use=in_use,
    )


def _rfc3339(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
