"""Compiles as durable operations, each in a child process."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import psutil
import structlog

from inkwell.compiler.v1 import compiler_pb2
from services.compiler import converters
from services.compiler.domain import CompileJob, CompileProgress, CompileRequest, CompileResult
from services.compiler.settings import Settings
from services.compiler.store_faults import store_fault
from services.compiler.targets import present, tensorrt_machine
from services.kit.admission import Priority
from services.kit.child import Limits, run_child
from services.kit.identity import current_caller
from services.kit.metrics import Metrics
from services.kit.operations import Kind, Operation, Operations, Progress, Running, Say, Started
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.manifest import RUNTIME_OF, ArtifactPrecision, Target, decode
from services.runtimes.artifacts.store import Store, Stored

log = structlog.get_logger(__name__)

_REMEDY = "raise INKWELL_COMPILER_MEMORY_LIMIT_BYTES or INKWELL_COMPILER_TIME_LIMIT_S, or compile on a larger machine"
# The rest is for the service itself and everything else on the machine.
_MEMORY_SHARE = 0.9
_OPERATIONS_LOOKED_AT = 1000  # unfinished ones; more cannot wait

_ALL: tuple[ArtifactPrecision, ...] = (
    "float32",
    "bfloat16",
    "float16",
    "int8_dynamic",
    "int8_weight_only",
    "int8_static",
    "int4_weight_only",
)


@dataclass
class Compiler:
    """Takes compiles in and runs them."""

    settings: Settings
    store: Store
    metrics: Metrics
    operations: Operations = field(init=False)
    _submitting: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def __post_init__(self) -> None:
        kind = Kind(
            name="compile",
            request=CompileRequest,
            response=CompileResult,
            work=self._work,
            metadata_message=converters.to_metadata,
            response_message=_to_artifact,
        )
        self.operations = Operations("compiler", self.settings, [kind], metrics=self.metrics)

    async def submit(self, request: CompileRequest, *, request_id: str, priority: Priority) -> Operation:
        """The operation that compiles it: the one that does so already, else a new one. Raises Fault."""
        # Known at once, so said at once.
        await asyncio.to_thread(present.require, request.target)
        if request.target == "tensorrt":
            await asyncio.to_thread(tensorrt_machine.require, request.precision)
        # One after the other, so that of two equal requests at the same moment the second finds the first.
        async with self._submitting:
            if not request_id and (same := await self._under_way(request)) is not None:
                return same
            return await self.operations.submit(
                "compile", request, request_id=request_id, priority=priority, owner=current_caller.get()
            )

    async def _under_way(self, request: CompileRequest) -> Operation | None:
        unfinished, _ = await self.operations.page(owner=current_caller.get(), done=False, limit=_OPERATIONS_LOOKED_AT)
        return next((operation for operation in unfinished if operation.request == request), None)

    def targets(self) -> Mapping[Target, tuple[tuple[ArtifactPrecision, ...], str]]:
        """Each target's precisions, and what this machine lacks to build for it."""
        return {
            target: (tensorrt_machine.PRECISIONS if target == "tensorrt" else _ALL, present.missing(target))
            for target in get_args(Target)
        }

    async def _work(self, request: CompileRequest, say: Say, running: Running) -> CompileResult:
        await say(Started(hardware=request.hardware, runtime=RUNTIME_OF[request.target], model=request.model))
        try:
            staging = await asyncio.to_thread(self.store.staging)
        except StoreError as error:
            raise store_fault(error) from error

        async def on_progress(told: CompileProgress) -> None:
            await say(Progress(step=told.step, step_count=told.step_count, stage=told.stage, note=told.note))

        job = CompileJob(
            request,
            self.store.location,
            str(staging),
            allow_pickled_weights=self.settings.allow_pickled_weights,
        )
        try:
            return await run_child(
                "services.compiler.work",
                job,
                progress=CompileProgress,
                response=CompileResult,
                on_progress=on_progress,
                limits=self._limits(),
                partial=[staging],
            )
        finally:
            self.store.discard(staging)

    def _limits(self) -> Limits:
        memory = self.settings.memory_limit_bytes or int(
            _MEMORY_SHARE * psutil.virtual_memory().total / self.settings.operations_concurrency
        )
        return Limits(memory, self.settings.time_limit_s, _REMEDY)

    async def collect(self) -> None:
        """Remove, again and again, what nobody needs any more from the store."""
        settings = self.settings
        while settings.collect_every_s:
            await asyncio.sleep(settings.collect_every_s)
            try:
                collected = await asyncio.to_thread(
                    self.store.collect,
                    keep_newest=settings.collect_keep_newest,
                    older_than_s=settings.collect_older_than_s,
                )
            except StoreError as error:
                log.warning("the artifact store cannot be collected", error=str(error))
            else:
                if collected.freed_bytes:
                    log.info(
                        "collected artifacts",
                        deleted=[stored.id for stored in collected.deleted],
                        freed_bytes=collected.freed_bytes,
                    )


def _to_artifact(result: CompileResult) -> compiler_pb2.Artifact:
    content = result.manifest_json.encode()
    # When it was published is not told, so it does not matter here.
    return converters.to_artifact(Stored(result.artifact_id, decode(content), content, 0.0), in_use=False)
