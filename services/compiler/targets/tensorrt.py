"""From an ONNX graph to a TensorRT engine: the plan, which needs no GPU, and the build, which needs the very GPU.

An engine is bound to the TensorRT version, the device's compute capability and the sizes in its optimization profile.
The graph carries the precision: TensorRT networks are strongly typed, so a float16 engine comes from a float16 graph.
"""

import hashlib
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import msgspec
from onnx import TensorProto

from services.compiler.targets import tensorrt_operators
from services.compiler.targets.axes import sizes
from services.compiler.targets.onnx_parts import onnx_parts
from services.compiler.targets.tensorrt_machine import (
    MINIMUM_CAPABILITY,
    PRECISIONS,
    Machine,
    no_such_precision,
    require_capability,
)
from services.kit.faults import failed_precondition
from services.runtimes.artifacts import user_folders
from services.runtimes.artifacts.manifest import ArtifactPrecision, Axis, Port

ENGINE_FILE = "model.plan"
# 0 to 5; this is TensorRT's own default.
OPTIMIZATION_LEVEL = 3
_MIB = 1024 * 1024
# Kept free of workspace for CUDA's own context and the services that may share the device.
_RESERVE_BYTES = 1024 * _MIB
_LEAST_WORKSPACE_BYTES = 256 * _MIB
# Devices that have no arithmetic for a type refuse graphs that hold it.
_TYPE_CAPABILITY: dict[int, tuple[int, int]] = {
    TensorProto.BFLOAT16: (8, 0),
    TensorProto.INT4: (8, 0),
    TensorProto.FLOAT8E4M3FN: (8, 9),
    TensorProto.FLOAT4E2M1: (10, 0),
}


class InputSizes(msgspec.Struct, frozen=True):
    """An input's shapes in the optimization profile: the smallest, the one that kernels are tuned for, the largest."""

    low: tuple[int, ...]
    optimal: tuple[int, ...]
    high: tuple[int, ...]


class Plan(msgspec.Struct, frozen=True):
    """All that decides what engine comes out."""

    component: str
    onnx_file: str
    onnx_digest: str  # sha-256 over the graph and its external weights
    precision: ArtifactPrecision
    profile: dict[str, InputSizes]  # of the inputs that have a dynamic dimension
    cleared_flags: tuple[str, ...]  # names of tensorrt.BuilderFlag that are on by default
    network_flags: tuple[str, ...]  # names of tensorrt.NetworkDefinitionCreationFlag
    workspace_bytes: int
    optimization_level: int
    tensorrt: str
    device: str
    compute_capability: str
    driver: str

    @property
    def timing_cache_key(self) -> str:
        """Name of the file that remembers how fast kernels were: on this device, with this driver and TensorRT."""
        device = hashlib.sha256(self.device.encode()).hexdigest()[:8]
        driver = self.driver.replace(" ", "-")
        return f"timing-{self.tensorrt}-sm{self.compute_capability.replace('.', '')}-{driver}-{device}.cache"

    @property
    def engine_key(self) -> str:
        """sha-256 of all that decides the engine: two plans of one key need one build."""
        # Where the graph lies does not matter, what it holds does.
        content = msgspec.structs.replace(self, onnx_file="")
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


class EngineNote(msgspec.Struct, frozen=True):
    """What stands beside an engine as `model.plan.json`, so that a session can refuse it before it loads it."""

    tensorrt: str
    compute_capability: str
    device: str
    engine_key: str


def plan(
    component: str,
    file: Path,
    inputs: Collection[Port],
    axes: Collection[Axis],
    precision: ArtifactPrecision,
    machine: Machine,
) -> Plan:
    """How the engine of one graph will be built. file: the ONNX graph in its final precision.

    axes: from the smallest to the largest size that the engine has to take, as the request bounded the export. Raises
    Fault (FAILED_PRECONDITION) if the device cannot compute the precision, or if TensorRT does not take the graph's
    operators: the message names nodes and operators.
    """
    if precision not in PRECISIONS:
        raise no_such_precision(precision)
    require_capability(precision, MINIMUM_CAPABILITY[precision], machine)
    operators = tensorrt_operators.check(file)
    for kind in sorted(operators.types & _TYPE_CAPABILITY.keys()):
        require_capability(f"{component}: {TensorProto.DataType.Name(kind)}", _TYPE_CAPABILITY[kind], machine)
    if operators.refusals:
        raise failed_precondition(
            "OPERATORS_NOT_SUPPORTED",
            f"{component}: TensorRT does not take {len(operators.refusals)} nodes: "
            + "; ".join(map(str, operators.refusals[:5])),
            component=component,
        )
    bounds = {axis.name: sizes(axis) for axis in axes}
    digest, weight_bytes = _digest(file)
    return Plan(
        component=component,
        onnx_file=str(file),
        onnx_digest=digest,
        precision=precision,
        profile={
            port.name: _input_sizes(port, bounds) for port in inputs if any(isinstance(d, str) for d in port.shape)
        },
        # TF32 keeps 10 bits of a product's factors: such an engine would not be the float32 that was asked for.
        cleared_flags=("TF32",) if precision == "float32" else (),
        network_flags=("STRONGLY_TYPED",) if machine.version < (11, 0) else (),
        workspace_bytes=workspace_bytes(machine.device.memory_bytes, weight_bytes),
        optimization_level=OPTIMIZATION_LEVEL,
        tensorrt=machine.tensorrt,
        device=machine.device.name,
        compute_capability=machine.device.compute_capability,
        driver=machine.device.driver,
    )


def workspace_bytes(memory_bytes: int, weight_bytes: int) -> int:
    """The most that one kernel may use for itself: half of what weights, held twice while building, leave free."""
    free = memory_bytes - 2 * weight_bytes - _RESERVE_BYTES
    return max(_LEAST_WORKSPACE_BYTES, free // 2 // _MIB * _MIB)


def command(plan: Plan, engine: Path) -> str:
    """What builds the same engine with NVIDIA's own tool, for engineers who look for a fault in TensorRT itself."""
    words = ["trtexec", f"--onnx={plan.onnx_file}", f"--saveEngine={engine}"]
    for option, shapes in (
        ("minShapes", {name: entry.low for name, entry in plan.profile.items()}),
        ("optShapes", {name: entry.optimal for name, entry in plan.profile.items()}),
        ("maxShapes", {name: entry.high for name, entry in plan.profile.items()}),
    ):
        if shapes:
            words.append(
                f"--{option}=" + ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shapes.items())
            )
    words.append(f"--memPoolSize=workspace:{plan.workspace_bytes // _MIB}")
    words.append(f"--builderOptimizationLevel={plan.optimization_level}")
    words.append(f"--timingCacheFile={plan.timing_cache_key}")
    if "TF32" in plan.cleared_flags:
        words.append("--noTF32")
    if "STRONGLY_TYPED" in plan.network_flags:
        words.append("--stronglyTyped")
    return shlex.join(words)


def report(plan: Plan, engine: Path) -> str:
    """The plan and what TensorRT may make of the graph, for people."""
    operators = tensorrt_operators.check(Path(plan.onnx_file))
    lines = [
        f"{plan.component}: {plan.precision} for {plan.device} (compute capability {plan.compute_capability}),"
        f" TensorRT {plan.tensorrt}",
        f"operators: {sum(operators.counts.values())} nodes of {len(operators.counts)} kinds, opset {operators.opset},"
        f" against the table of {tensorrt_operators.TABLE_VERSION} ({tensorrt_operators.TABLE_DATE})",
        *(f"  {'refused' if problem.certain else 'doubtful'}: {problem}" for problem in operators.problems),
        "optimization profile (smallest, tuned for, largest):",
        *(f"  {name}: {list(e.low)} {list(e.optimal)} {list(e.high)}" for name, e in plan.profile.items()),
        f"workspace: {plan.workspace_bytes // _MIB} MiB",
        f"timing cache: {plan.timing_cache_key}",
        f"engine key: {plan.engine_key}",
        f"the same by hand: {command(plan, engine)}",
    ]
    return "\n".join(lines)


def build(plan: Plan, engine: Path, *, cache_folder: Path | None = None, say: Callable[[str], None]) -> None:
    """Build the engine into a file, and its note beside it. Takes minutes; needs the machine that the plan is for.

    cache_folder: where timing caches, and engines by their key, are kept between builds; None for the user's own.
    Anything in it may be deleted at any time. Raises Fault (FAILED_PRECONDITION) naming what is missing before anything
    else is done, or the node and operator that TensorRT refuses.
    """
    from services.compiler.targets.tensorrt_build import build_engine

    build_engine(plan, engine, cache_folder or user_folders.cache_folder() / "tensorrt", say)


def _input_sizes(port: Port, bounds: Mapping[str, tuple[int, int, int]]) -> InputSizes:
    def shape(which: int) -> tuple[int, ...]:
        return tuple(bounds[d][which] if isinstance(d, str) else d for d in port.shape)

    return InputSizes(shape(0), shape(1), shape(2))


def _digest(file: Path) -> tuple[str, int]:
    """sha-256 over an ONNX file and its external weights, and the bytes of all of it."""
    total = hashlib.sha256()
    size = 0
    for part in onnx_parts(file):
        with part.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
        size += part.stat().st_size
    return total.hexdigest(), size
