"""Compiling models, on an event loop."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import grpc

from inkwell import types
from inkwell.aio_calls import AsyncCalls
from inkwell.aio_operation import AsyncOperation
from inkwell.channel import traced
from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from inkwell.converters import artifacts as converters
from inkwell.download import Download, files_of
from inkwell.errors import error_from_rpc


class AsyncCompiling(AsyncCalls):
    """The calls of the compiler."""

    async def compile(
        self, model: str, target: str, *, timeout_s: float | None = None, **options: Unpack[types.CompileOptions]
    ) -> AsyncOperation[types.Artifact]:
        """Begin to compile a model; see `Client.compile`."""
        request = converters.compile_request(model, target, options)
        answer, _ = await self._unary(self._compiler().Compile, request, timeout_s)
        return AsyncOperation(self, answer)

    async def targets(self, *, timeout_s: float | None = None) -> types.Targets:
        """What the compiler can compile, and to what."""
        answer, _ = await self._unary(self._compiler().ListTargets, compiler_pb2.ListTargetsRequest(), timeout_s)
        return converters.targets(answer)

    async def artifacts(
        self, *, model: str = "", target: str = "", precision: str = "", timeout_s: float | None = None
    ) -> list[types.Artifact]:
        """The stored artifacts, newest first; empty strings for all."""
        found: list[types.Artifact] = []
        page_token = ""
        while True:
            request = converters.list_request(model, target, precision, page_token)
            answer, _ = await self._unary(self._compiler().ListArtifacts, request, timeout_s)
            found += map(converters.artifact, answer.artifacts)
            page_token = answer.next_page_token
            if not page_token:
                return found

    async def artifact(self, id: str, *, timeout_s: float | None = None) -> types.Artifact:  # noqa: A002 - the protocol's name
        """One artifact by its id, or the first 8 or more digits of it; raises NotFound."""
        answer, _ = await self._unary(self._compiler().GetArtifact, compiler_pb2.GetArtifactRequest(id=id), timeout_s)
        return converters.artifact(answer)

    async def download_artifact(
        self,
        id: str,  # noqa: A002
        folder: str | Path,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[types.DownloadProgress], object] | None = None,
    ) -> types.Artifact:
        """Write an artifact's files into a folder, each checked; what an earlier try left there is taken up.

        timeout_s: for one file. Raises OSError when the folder cannot be written.
        """
        artifact = await self.artifact(id, timeout_s=timeout_s)
        for file in files_of(artifact):
            download = await asyncio.to_thread(Download, Path(folder), file)
            if not await asyncio.to_thread(_is_done, download):
                await self._fetch(artifact.id, download, timeout_s, on_progress)
        return artifact

    async def use_artifact(self, model: str, artifact: str, *, timeout_s: float | None = None) -> types.Artifact | None:
        """Choose what a model is run from, from its next load on; `load_model` makes a service do so now.

        artifact: an id or its first digits; "torch" for the checkpoint itself; "auto" for what the services choose.
        """
        answer, _ = await self._unary(self._compiler().UseArtifact, converters.use_request(model, artifact), timeout_s)
        return converters.artifact(answer.artifact) if answer.HasField("artifact") else None

    async def delete_artifact(self, id: str, *, timeout_s: float | None = None) -> int:  # noqa: A002
        """Remove an artifact that nobody uses; answers with the bytes that are free now."""
        answer, _ = await self._unary(
            self._compiler().DeleteArtifact, compiler_pb2.DeleteArtifactRequest(id=id), timeout_s
        )
        return int(answer.freed_bytes)

    def _compiler(self) -> compiler_pb2_grpc.CompilerServiceStub:
        return compiler_pb2_grpc.CompilerServiceStub(self._channel())

    async def _fetch(
        self,
        artifact_id: str,
        download: Download,
        timeout_s: float | None,
        on_progress: Callable[[types.DownloadProgress], object] | None,
    ) -> None:
        timeout = await self._prepare(timeout_s)
        request = compiler_pb2.DownloadArtifactRequest(
            id=artifact_id, path=download.file.path, offset_bytes=download.offset_bytes
        )
        call = self._compiler().DownloadArtifact(request, timeout=timeout, metadata=traced(self._metadata))
        try:
            with download.open() as stream:
                async for chunk in call:
                    stream.write(chunk.content)
                    if on_progress is not None:
                        on_progress((download.file.path, stream.tell(), chunk.total_bytes))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()
        await asyncio.to_thread(download.finish)


def _is_done(download: Download) -> bool:
    return download.done
