"""The gRPC surface of the compiler: validate, hand over, stream back."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeVar

import grpc
from google.longrunning import operations_pb2

from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from services.compiler import catalog, checkpoint, converters
from services.compiler.compiling import Compiler
from services.compiler.settings import Settings
from services.compiler.store_faults import store_fault
from services.kit import faults
from services.kit.call import priority_of
from services.kit.operations.servicer import to_message
from services.runtimes.artifacts.errors import StoreError
from services.runtimes.artifacts.store import PAGE_SIZE_MOST, TORCH, Store, Stored

DEFAULT_PAGE_SIZE = 50
_AUTOMATIC = "auto"

T = TypeVar("T")


class CompilerServicer(compiler_pb2_grpc.CompilerServiceServicer):
    """Answers from the store; compiling is the operations'."""

    def __init__(self, compiler: Compiler, store: Store, settings: Settings) -> None:
        self._compiler = compiler
        self._store = store
        self._settings = settings

    async def Compile(  # noqa: N802 - the names are the protocol's
        self, request: compiler_pb2.CompileRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.Operation:
        sources = await asyncio.to_thread(catalog.sources, self._settings)
        wanted = converters.to_request(request, sources)
        await asyncio.to_thread(checkpoint.refuse, wanted)
        operation = await self._compiler.submit(wanted, request_id=request.request_id, priority=priority_of(context))
        return to_message(self._compiler.operations, operation)

    async def ListTargets(  # noqa: N802
        self, request: compiler_pb2.ListTargetsRequest, context: grpc.aio.ServicerContext
    ) -> compiler_pb2.ListTargetsResponse:
        sources = await asyncio.to_thread(catalog.sources, self._settings)
        kinds = await asyncio.to_thread(catalog.kinds, sources)
        targets = await asyncio.to_thread(self._compiler.targets)
        return compiler_pb2.ListTargetsResponse(
            models=[compiler_pb2.CompilableModel(name=name, kind=kind or "") for name, kind in sorted(kinds.items())],
            targets=[
                compiler_pb2.TargetSupport(
                    target=converters.target_number(target),
                    precisions=[converters.precision_number(precision) for precision in precisions],
                    missing=missing,
                )
                for target, (precisions, missing) in targets.items()
            ],
        )

    async def ListArtifacts(  # noqa: N802
        self, request: compiler_pb2.ListArtifactsRequest, context: grpc.aio.ServicerContext
    ) -> compiler_pb2.ListArtifactsResponse:
        if not 0 <= request.page_size <= PAGE_SIZE_MOST:
            raise faults.invalid_field(
                "page_size", f"{request.page_size}; accepted: 1 to {PAGE_SIZE_MOST}, or 0 for {DEFAULT_PAGE_SIZE}"
            )
        target = converters.to_target(request.target, "target")
        precision = converters.to_precision(request.precision, "precision")

        def look() -> compiler_pb2.ListArtifactsResponse:
            page = self._store.page(
                page_size=request.page_size or DEFAULT_PAGE_SIZE,
                page_token=request.page_token,
                model=request.model,
                target=target,
                precision=precision,
            )
            used = self._store.users()
            return compiler_pb2.ListArtifactsResponse(
                artifacts=[converters.to_artifact(stored, in_use=stored.id in used) for stored in page.artifacts],
                next_page_token=page.next_page_token,
            )

        return await _asked(look)

    async def GetArtifact(  # noqa: N802
        self, request: compiler_pb2.GetArtifactRequest, context: grpc.aio.ServicerContext
    ) -> compiler_pb2.Artifact:
        _require_id(request.id)

        def look() -> compiler_pb2.Artifact:
            stored = self._store.get(request.id)
            return converters.to_artifact(stored, in_use=stored.id in self._store.users())

        return await _asked(look)

    async def DownloadArtifact(  # noqa: N802
        self, request: compiler_pb2.DownloadArtifactRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[compiler_pb2.DownloadArtifactResponse]:
        _require_id(request.id)
        stored = await _asked(lambda: self._store.get(request.id))
        total = _size(stored, request.path)
        if not 0 <= request.offset_bytes <= total:
            raise faults.invalid_field(
                "offset_bytes", f"{request.offset_bytes}; accepted: 0 to {total}, the size of {request.path}"
            )
        offset = request.offset_bytes
        async with contextlib.AsyncExitStack() as stack:
            # Held, so that no collection takes it from under the reader.
            holding = self._store.hold(stored.id, "a download")
            await _asked(holding.__enter__)
            stack.push_async_callback(asyncio.to_thread, holding.__exit__, None, None, None)
            pieces = await _asked(lambda: self._store.read(stored.id, request.path, offset))
            if offset == total:
                yield compiler_pb2.DownloadArtifactResponse(offset_bytes=offset, total_bytes=total)
            while (piece := await _asked(lambda: next(pieces, None))) is not None:
                for part in _parts(piece, self._settings.download_chunk_bytes):
                    yield compiler_pb2.DownloadArtifactResponse(content=part, offset_bytes=offset, total_bytes=total)
                    offset += len(part)

    async def UseArtifact(  # noqa: N802
        self, request: compiler_pb2.UseArtifactRequest, context: grpc.aio.ServicerContext
    ) -> compiler_pb2.UseArtifactResponse:
        sources = await asyncio.to_thread(catalog.sources, self._settings)
        if request.model not in sources:
            raise faults.not_found("model", request.model, sources, field="model")
        if not request.artifact:
            raise faults.invalid_field("artifact", "it is empty; accepted: an artifact's id, torch, or auto")

        def choose() -> compiler_pb2.UseArtifactResponse:
            if request.artifact == _AUTOMATIC:
                self._store.unuse(request.model)
                return compiler_pb2.UseArtifactResponse()
            if request.artifact == TORCH:
                self._store.use(request.model, TORCH)
                return compiler_pb2.UseArtifactResponse()
            stored = self._store.get(request.artifact)
            if stored.manifest.model != request.model:
                raise faults.failed_precondition(
                    "ARTIFACT_OF_ANOTHER_MODEL",
                    f"artifact {stored.id[:12]} was compiled from model {stored.manifest.model}, not {request.model}",
                )
            self._store.use(request.model, stored.id)
            return compiler_pb2.UseArtifactResponse(artifact=converters.to_artifact(stored, in_use=True))

        return await _asked(choose)

    async def DeleteArtifact(  # noqa: N802
        self, request: compiler_pb2.DeleteArtifactRequest, context: grpc.aio.ServicerContext
    ) -> compiler_pb2.DeleteArtifactResponse:
        _require_id(request.id)
        freed = await _asked(lambda: self._store.delete(request.id))
        return compiler_pb2.DeleteArtifactResponse(freed_bytes=freed)


async def _asked(look: Callable[[], T]) -> T:
    """Ask the store, which may be far away, on a thread."""
    try:
        return await asyncio.to_thread(look)
    except StoreError as error:
        raise store_fault(error) from error


def _require_id(artifact_id: str) -> None:
    if not artifact_id:
        raise faults.invalid_field("id", "it is empty; give the id that ListArtifacts shows, or its first 8 digits")


def _size(stored: Stored, path: str) -> int:
    for file in stored.manifest.files:
        if file.path == path:
            return file.size_bytes
    if path == "manifest.json":
        return len(stored.manifest_json)
    known = [file.path for file in stored.manifest.files]
    raise faults.not_found("file", path, [*known, "manifest.json"], field="path")


def _parts(piece: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(piece), size):
        yield piece[start : start + size]
