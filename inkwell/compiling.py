"""Compiling models, in the blocking client."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import grpc

from inkwell import types
from inkwell.calls import Calls
from inkwell.channel import traced
from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from inkwell.converters import artifacts as converters
from inkwell.download import Download, files_of
from inkwell.errors import error_from_rpc
from inkwell.operation import Operation


class Compiling(Calls):
    """The calls of the compiler."""

    def compile(
        self, model: str, target: str, *, timeout_s: float | None = None, **options: Unpack[types.CompileOptions]
    ) -> Operation[types.Artifact]:
        """Begin to compile a model: `client.compile("handwriting-tiny", "openvino").result()` waits for the artifact.

        target: see `Target`. options: see `CompileOptions`. The operation goes on without this program.
        """
        request = converters.compile_request(model, target, options)
        answer, _ = self._unary(self._compiler.Compile, request, timeout_s)
        return Operation(self, answer)

    def targets(self, *, timeout_s: float | None = None) -> types.Targets:
        """What the compiler can compile, and to what."""
        answer, _ = self._unary(self._compiler.ListTargets, compiler_pb2.ListTargetsRequest(), timeout_s)
        return converters.targets(answer)

    def artifacts(
        self, *, model: str = "", target: str = "", precision: str = "", timeout_s: float | None = None
    ) -> list[types.Artifact]:
        """The stored artifacts, newest first; empty strings for all."""
        found: list[types.Artifact] = []
        page_token = ""
        while True:
            request = converters.list_request(model, target, precision, page_token)
            answer, _ = self._unary(self._compiler.ListArtifacts, request, timeout_s)
            found += map(converters.artifact, answer.artifacts)
            page_token = answer.next_page_token
            if not page_token:
                return found

    def artifact(self, id: str, *, timeout_s: float | None = None) -> types.Artifact:  # noqa: A002 - the protocol's name
        """One artifact by its id, or the first 8 or more digits of it; raises NotFound."""
        answer, _ = self._unary(self._compiler.GetArtifact, compiler_pb2.GetArtifactRequest(id=id), timeout_s)
        return converters.artifact(answer)

    def download_artifact(
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
        artifact = self.artifact(id, timeout_s=timeout_s)
        for file in files_of(artifact):
            download = Download(Path(folder), file)
            if not download.done:
                self._fetch(artifact.id, download, timeout_s, on_progress)
        return artifact

    def use_artifact(self, model: str, artifact: str, *, timeout_s: float | None = None) -> types.Artifact | None:
        """Choose what a model is run from, from its next load on; `load_model` makes a service do so now.

        artifact: an id or its first digits; "torch" for the checkpoint itself; "auto" for what the services choose.
        """
        answer, _ = self._unary(self._compiler.UseArtifact, converters.use_request(model, artifact), timeout_s)
        return converters.artifact(answer.artifact) if answer.HasField("artifact") else None

    def delete_artifact(self, id: str, *, timeout_s: float | None = None) -> int:  # noqa: A002
        """Remove an artifact that nobody uses; answers with the bytes that are free now."""
        answer, _ = self._unary(self._compiler.DeleteArtifact, compiler_pb2.DeleteArtifactRequest(id=id), timeout_s)
        return int(answer.freed_bytes)

    @property
    def _compiler(self) -> compiler_pb2_grpc.CompilerServiceStub:
        return compiler_pb2_grpc.CompilerServiceStub(self._channel)

    def _fetch(
        self,
        artifact_id: str,
        download: Download,
        timeout_s: float | None,
        on_progress: Callable[[types.DownloadProgress], object] | None,
    ) -> None:
        timeout = self._prepare(timeout_s)
        request = compiler_pb2.DownloadArtifactRequest(
            id=artifact_id, path=download.file.path, offset_bytes=download.offset_bytes
        )
        call = self._compiler.DownloadArtifact(request, timeout=timeout, metadata=traced(self._metadata))
        try:
            with download.open() as stream:
                for chunk in call:
                    stream.write(chunk.content)
                    if on_progress is not None:
                        on_progress((download.file.path, stream.tell(), chunk.total_bytes))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error
        finally:
            call.cancel()
        download.finish()
