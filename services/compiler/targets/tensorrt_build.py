"""Runs TensorRT's builder by a plan. Everything here needs the tensorrt package and a CUDA device."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from services.compiler.targets.tensorrt import EngineNote, Plan
from services.compiler.targets.tensorrt_machine import load, require
from services.kit.faults import Fault, failed_precondition


def build_engine(plan: Plan, engine: Path, cache_folder: Path, say: Callable[[str], None]) -> None:
    """See `tensorrt.build`."""
    machine = require()
    if (machine.tensorrt, machine.device.compute_capability) != (plan.tensorrt, plan.compute_capability):
        raise failed_precondition(
            "OTHER_MACHINE",
            f"{plan.component} was planned for TensorRT {plan.tensorrt} and compute capability"
            f" {plan.compute_capability}; here are {machine.tensorrt} and {machine.device.compute_capability}:"
            " compile it anew on this node",
        )
    known = cache_folder / f"{plan.engine_key}.plan"
    if known.exists():
        say(f"{plan.component}: engine {plan.engine_key[:12]} was built before")
        shutil.copyfile(known, engine)
    else:
        content = _build(load(), plan, cache_folder, say)
        _write(engine, content)
        _write(known, content)
    note = EngineNote(plan.tensorrt, plan.compute_capability, plan.device, plan.engine_key)
    _write(engine.with_name(engine.name + ".json"), msgspec.json.encode(note))


def _build(trt: ModuleType, plan: Plan, cache_folder: Path, say: Callable[[str], None]) -> memoryview:
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(
        sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, name)) for name in plan.network_flags)
    )
    parser = trt.OnnxParser(network, logger)
    say(f"{plan.component}: reading the graph")
    # By path, so that the parser finds external weights beside the graph.
    if not parser.parse_from_file(plan.onnx_file):
        raise _parser_refusal(plan, parser)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    config.builder_optimization_level = plan.optimization_level
    for name in plan.cleared_flags:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if plan.profile:
        profile = builder.create_optimization_profile()
        for name, entry in plan.profile.items():
            profile.set_shape(name, entry.low, entry.optimal, entry.high)
        if config.add_optimization_profile(profile) < 0:
            raise _failed(plan, "TensorRT refuses the optimization profile", logger)
    timing_file = cache_folder / plan.timing_cache_key
    stored = timing_file.read_bytes() if timing_file.exists() else b""
    timing = config.create_timing_cache(stored)
    if not config.set_timing_cache(timing, ignore_mismatch=False):
        # Another device or version wrote it, or it was cut off: its times would mislead, an empty one only costs time.
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, ignore_mismatch=False)
    monitor = _monitor(trt, plan, say)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _failed(plan, "the build failed", logger)
    _write(timing_file, memoryview(config.get_timing_cache().serialize()))
    return memoryview(serialized)


def _parser_refusal(plan: Plan, parser: Any) -> Fault:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = "; ".join(f"{e.node_operator()} at node {e.node_name()}: {e.desc()}" for e in errors[:5])
    return failed_precondition(
        "OPERATORS_NOT_SUPPORTED",
        f"{plan.component}: TensorRT {plan.tensorrt} does not take the graph: {told}",
        component=plan.component,
    )


def _failed(plan: Plan, what: str, logger: Any) -> Fault:
    told = "; ".join(logger.errors[-3:]) or "it gave no reason"
    return failed_precondition(
        "ENGINE_NOT_BUILT",
        f"{plan.component}: {what}: {told}. If memory was short, free the device of other processes, or ask for a"
        " smaller max_batch_size or max_side_px",
        component=plan.component,
    )


def _logger(trt: ModuleType) -> Any:
    """Keeps what TensorRT calls errors, for the message of the fault."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _monitor(trt: ModuleType, plan: Plan, say: Callable[[str], None]) -> Any:
    """Tells the outermost phases of a build, which TensorRT names itself."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None or num_steps > 10:
                say(f"{plan.component}: {phase_name}, {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True  # a build that is cancelled ends with its process

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _write(file: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; two builds may write the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
