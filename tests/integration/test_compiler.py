"""The compiler as its callers see it: a real server, a real compile in its child process, the SDK's clients."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

import inkwell
from inkwell.cli import main
from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from inkwell.download import MANIFEST
from services.ocr import __main__ as ocr
from services.ocr.settings import Settings as OcrSettings
from tests.integration.test_ocr import png
from tests.support import compiler_service

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Compiled:
    """A service after one compile, the same for all tests of this module."""

    client: inkwell.AsyncClient
    root: Path
    source: str
    events: list[inkwell.OperationEvent]
    artifact: inkwell.Artifact
    operation: str

    @property
    def address(self) -> str:
        return self.client._target


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def compiled(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Compiled]:
    root = tmp_path_factory.mktemp("compiler")
    source = compiler_service.tiny_model(root / "tiny")
    async with compiler_service.serving(compiler_service.settings(root, models={"tiny": source})) as client:
        operation = await client.compile("tiny", "onnx")
        events: list[inkwell.OperationEvent] = []
        artifact = await operation.result(on_event=events.append)
        yield Compiled(client, root, source, events, artifact, operation.name)


async def test_a_compile_tells_its_stages_in_order(compiled: Compiled) -> None:
    assert compiled.operation.startswith("operations/compiler/")
    told = [event for event in compiled.events if isinstance(event, inkwell.OperationProgress)]
    stages = list(dict.fromkeys(event.stage for event in told))
    assert stages == ["fetching", "exporting", "checking", "building", "verifying", "measuring", "publishing"]
    assert [event.step for event in told] == sorted(event.step for event in told)
    assert {event.step_count for event in told} == {8}
    assert any("decoder" in event.note for event in told)
    started = next(event for event in compiled.events if isinstance(event, inkwell.Started))
    assert (started.model, started.runtime) == ("tiny", "onnxruntime")
    last = compiled.events[-1]
    assert isinstance(last, inkwell.OperationDone)
    assert last.result == compiled.artifact


async def test_the_artifact_says_what_it_is_and_what_was_checked(compiled: Compiled) -> None:
    artifact = compiled.artifact
    assert (artifact.model, artifact.kind, artifact.target, artifact.precision) == (
        "tiny",
        "trocr",
        inkwell.Target.ONNX,
        inkwell.Precision.FLOAT32,
    )
    assert artifact.source == compiled.source
    assert hashlib.sha256(artifact.manifest_json.encode()).hexdigest() == artifact.id
    assert artifact.checks
    for check in artifact.checks:
        assert check.value >= check.limit if check.at_least else check.value <= check.limit, check
    assert artifact.figure("texts equal to float32") == 1.0
    assert {"torch", "onnx", "onnxruntime"} <= artifact.versions.keys()
    assert artifact.size_bytes == len(artifact.manifest_json) + sum(file.size_bytes for file in artifact.files)


async def test_the_same_compile_again_is_answered_with_the_stored_artifact(compiled: Compiled) -> None:
    again = await compiled.client.compile("tiny", "onnx", precision="float32")
    assert again.name != compiled.operation
    notes: list[str] = []
    artifact = await again.result(
        on_event=lambda event: notes.append(event.stage) if isinstance(event, inkwell.OperationProgress) else None
    )
    assert artifact.id == compiled.artifact.id
    assert notes == ["fetching", "publishing"]
    assert [one.id for one in await compiled.client.artifacts()] == [artifact.id]


async def test_a_request_id_names_one_compile(compiled: Compiled) -> None:
    request_id = str(uuid.uuid4())
    first = await compiled.client.compile("tiny", "onnx", request_id=request_id)
    same = await compiled.client.compile("tiny", "onnx", request_id=request_id)
    assert first.name == same.name == f"operations/compiler/{request_id}"
    with pytest.raises(inkwell.InkwellError) as refused:
        await compiled.client.compile("tiny", "openvino", request_id=request_id)
    assert request_id in refused.value.message
    await first.result()


async def test_artifacts_are_listed_by_model_target_and_precision(compiled: Compiled) -> None:
    client = compiled.client
    assert [a.id for a in await client.artifacts(model="tiny", target="onnx", precision="float32")] == [
        compiled.artifact.id
    ]
    assert await client.artifacts(model="other") == []
    assert await client.artifacts(target="openvino") == []
    assert await client.artifacts(precision="int8_dynamic") == []
    assert (await client.artifact(compiled.artifact.id[:8])).id == compiled.artifact.id


async def test_what_can_be_compiled_is_listed(compiled: Compiled) -> None:
    targets = await compiled.client.targets()
    assert [(model.name, model.kind) for model in targets.models] == [("tiny", "trocr")]
    missing = {support.target: support.missing for support in targets.targets}
    assert missing[inkwell.Target.ONNX] == missing[inkwell.Target.OPENVINO] == ""
    assert set(missing) == set(inkwell.Target)


async def test_a_download_is_whole_and_goes_on_where_it_broke_off(compiled: Compiled, tmp_path: Path) -> None:
    artifact = compiled.artifact
    largest = max(artifact.files, key=lambda file: file.size_bytes)
    half = largest.size_bytes // 2
    read: dict[str, int] = {}

    def note(progress: inkwell.DownloadProgress) -> None:
        path, done, total = progress
        read.setdefault(path, done)
        assert done <= total

    await compiled.client.download_artifact(artifact.id, tmp_path / "whole")
    # As an interrupted download leaves it: the manifest and half of a file are missing.
    broken = tmp_path / "broken"
    await asyncio.to_thread(
        lambda: inkwell.Client(compiled.address).download_artifact(artifact.id, broken, timeout_s=60)
    )
    (broken / MANIFEST).unlink()
    content = (broken / largest.path).read_bytes()
    (broken / largest.path).unlink()
    (broken / f"{largest.path}.partial").write_bytes(content[:half])
    await compiled.client.download_artifact(artifact.id, broken, on_progress=note)
    assert read.keys() == {largest.path, MANIFEST}, "files that were there already were fetched again"
    assert read[largest.path] > half
    for folder in (tmp_path / "whole", broken):
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert there == {MANIFEST, *(file.path for file in artifact.files)}
        assert (folder / MANIFEST).read_text() == artifact.manifest_json
        for file in artifact.files:
            assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256


async def test_a_damaged_rest_of_a_download_is_found_out(compiled: Compiled, tmp_path: Path) -> None:
    file = max(compiled.artifact.files, key=lambda each: each.size_bytes)
    partial = tmp_path / f"{file.path}.partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(b"x" * 100)
    with pytest.raises(inkwell.InternalError, match="download it again"):
        await compiled.client.download_artifact(compiled.artifact.id, tmp_path)
    assert not partial.exists()
    await compiled.client.download_artifact(compiled.artifact.id, tmp_path)
    assert (tmp_path / MANIFEST).exists()


async def test_any_part_of_a_file_can_be_had(compiled: Compiled) -> None:
    file = max(compiled.artifact.files, key=lambda each: each.size_bytes)
    async with grpc.aio.insecure_channel(compiled.address) as channel:
        stub = compiler_pb2_grpc.CompilerServiceStub(channel)

        async def parts(offset: int) -> list[compiler_pb2.DownloadArtifactResponse]:
            request = compiler_pb2.DownloadArtifactRequest(id=compiled.artifact.id, path=file.path, offset_bytes=offset)
            return [part async for part in stub.DownloadArtifact(request)]

        whole = b"".join(part.content for part in await parts(0))
        assert hashlib.sha256(whole).hexdigest() == file.sha256
        later = await parts(7)
        assert b"".join(part.content for part in later) == whole[7:]
        assert later[0].offset_bytes == 7
        assert {part.total_bytes for part in later} == {file.size_bytes}
        nothing = await parts(file.size_bytes)
        assert b"".join(part.content for part in nothing) == b""
        assert nothing[0].total_bytes == file.size_bytes


async def test_a_model_is_read_from_what_use_chose(compiled: Compiled) -> None:
    client, artifact = compiled.client, compiled.artifact
    server = ocr.build(
        OcrSettings(
            port=0,
            models={"tiny": compiled.source},
            artifact_store=str(compiled.root / "artifacts"),
            threads=1,
        )
    )
    await client.use_artifact("tiny", "torch")
    await server.start()
    try:
        await server.wait_ready()
        async with inkwell.AsyncClient(f"127.0.0.1:{server.port}") as reader:
            line = png(seed=3)
            on_torch = await reader.read(line)
            assert (await reader.models())[0].runtime == "torch"
            await client.use_artifact("tiny", artifact.id[:12])
            loaded = await reader.load_model("tiny", artifact=artifact.id)
            assert loaded.runtime == "onnxruntime"
            assert (await reader.read(line)).text == on_torch.text
            assert (await client.artifact(artifact.id)).in_use
            with pytest.raises(inkwell.FailedPrecondition) as kept:
                await client.delete_artifact(artifact.id)
            assert kept.value.reason == "STORE_IN_USE"
            await client.use_artifact("tiny", "auto")
            await reader.unload_model("tiny")
            assert not (await client.artifact(artifact.id)).in_use
    finally:
        await server.stop(0)


async def test_the_command_line_compiles_lists_shows_and_downloads(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def inkwell_(*words: str) -> str:
        # It runs an event loop of its own.
        assert await asyncio.to_thread(main, [*words, "--address", compiled.address]) == 0
        return capsys.readouterr().out

    artifact = compiled.artifact
    # Stored already, so it is answered with that. The service's own log lines stand before.
    assert (await inkwell_("compile", "tiny", "--to", "onnx", "--no-use", "--quiet")).splitlines()[-1] == artifact.id
    assert "\noperations/compiler/" in "\n" + await inkwell_("compile", "tiny", "--to", "onnx", "--detach")
    assert artifact.id[:12] in await inkwell_("artifacts", "--model", "tiny", "--to", "onnx", "--precision", "fp32")
    assert artifact.id[:12] not in await inkwell_("artifacts", "--precision", "int4")
    assert artifact.checks[0].name in await inkwell_("artifacts", "show", artifact.id[:8])
    await inkwell_("artifacts", "download", artifact.id[:8], str(tmp_path / "copy"))
    assert (tmp_path / "copy" / MANIFEST).read_text() == artifact.manifest_json


async def test_a_compile_for_missing_hardware_is_refused_at_once(compiled: Compiled) -> None:
    with pytest.raises(inkwell.FailedPrecondition) as refused:
        await compiled.client.compile("tiny", "tensorrt")
    assert "TensorRT" in refused.value.message


async def test_an_artifact_is_deleted_and_gone(compiled: Compiled, tmp_path: Path) -> None:
    # The last test: the others need it.
    freed = await compiled.client.delete_artifact(compiled.artifact.id[:8])
    assert freed == compiled.artifact.size_bytes
    assert await compiled.client.artifacts() == []
    with pytest.raises(inkwell.NotFound):
        await compiled.client.artifact(compiled.artifact.id)
    with pytest.raises(inkwell.NotFound):
        await compiled.client.download_artifact(compiled.artifact.id, tmp_path)
    assert not list((compiled.root / "artifacts").rglob("*.onnx"))
    assert json.loads(compiled.artifact.manifest_json)["model"] == "tiny"
