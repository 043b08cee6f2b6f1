"""What becomes of compiles that cannot be: refused, cancelled, killed, without space. Nothing half-written shows."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import grpc
import psutil
import pytest
import pytest_asyncio

import inkwell
from inkwell.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from services.runtimes.artifacts.store import open_store
from tests.integration.test_gateway import outcome
from tests.support import artifacts, compiler_service, s3
from tests.support.compiler_service import CompilerProcess

KILLS = int(os.environ.get("INKWELL_KILLS", "2"))
SEED = int(os.environ.get("INKWELL_SEED", "1"))
TINY: dict[str, Any] = {"model": "tiny", "target": compiler_pb2.TARGET_ONNX}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiler_service.tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[inkwell.AsyncClient]:
    """A service that nobody compiles on."""
    root = tmp_path_factory.mktemp("refusing")
    async with compiler_service.serving(compiler_service.settings(root, models={"tiny": tiny})) as client:
        yield client


def files_in(folder: Path) -> list[Path]:
    """Everything in a folder."""
    return list(folder.iterdir())


def left_behind(root: Path) -> list[Path]:
    """What a compile may leave nowhere: staging folders of the store, and folders of child processes."""
    store = root / "artifacts"
    staged = list((store / "staging").iterdir()) if (store / "staging").exists() else []
    temporary = root / "temporary"
    return staged + (list(temporary.iterdir()) if temporary.exists() else [])


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model": ""}, "INVALID_ARGUMENT", ["model: it is empty", "tiny"]),
        ({"model": "tinny"}, "NOT_FOUND", ["tinny", "tiny"]),
        ({"target": compiler_pb2.TARGET_UNSPECIFIED}, "INVALID_ARGUMENT", ["target", "TARGET_OPENVINO"]),
        ({"target": 99}, "INVALID_ARGUMENT", ["target: 99", "TARGET_ONNX"]),
        ({"precision": 99}, "INVALID_ARGUMENT", ["precision: 99", "PRECISION_INT8_DYNAMIC"]),
        ({"component_precisions": {"decoder": 99}}, "INVALID_ARGUMENT", ["component_precisions['decoder']: 99"]),
        (
            {"component_precisions": {"dekoder": compiler_pb2.PRECISION_FLOAT16}},
            "INVALID_ARGUMENT",
            ["component_precisions['dekoder']", "accepted: encoder, decoder"],
        ),
        ({"hardware": "gpu"}, "INVALID_ARGUMENT", ["hardware: 'gpu'", "cuda, rocm, cpu"]),
        ({"max_batch_size": 257}, "INVALID_ARGUMENT", ["max_batch_size: 257", "1 to 256"]),
        ({"max_batch_size": -1}, "INVALID_ARGUMENT", ["max_batch_size: -1"]),
        ({"max_side_px": 100}, "INVALID_ARGUMENT", ["max_side_px: 100", "multiples of 8"]),
        ({"excluded_layers": ["decoder/*", "fc2"]}, "INVALID_ARGUMENT", ["excluded_layers[1]: 'fc2'", "decoder/*fc2*"]),
        ({"excluded_layers": ["a/b"] * 257}, "INVALID_ARGUMENT", ["excluded_layers: 257", "256"]),
        ({"budget": {"character_error_rate": 1.5}}, "INVALID_ARGUMENT", ["budget.character_error_rate: 1.5", "0 to 1"]),
        ({"budget": {"psnr_db": -1}}, "INVALID_ARGUMENT", ["budget.psnr_db: -1", "0 to 100"]),
        ({"budget": {"psnr_db": float("nan")}}, "INVALID_ARGUMENT", ["budget.psnr_db: nan"]),
        ({"request_id": "mine"}, "INVALID_ARGUMENT", ["request_id", "mine", "UUID"]),
        ({"target": compiler_pb2.TARGET_TENSORRT}, "FAILED_PRECONDITION", ["TensorRT"]),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_what_cannot_be_compiled_is_refused_at_once(
    service: inkwell.AsyncClient, fields: dict[str, Any], code: str, said: list[str]
) -> None:
    async with grpc.aio.insecure_channel(service._target) as channel:
        request = compiler_pb2.CompileRequest(**{**TINY, **fields})
        error = await outcome(compiler_pb2_grpc.CompilerServiceStub(channel).Compile(request))
    assert error.code().name == code
    for words in said:
        assert words in (error.details() or "")


@pytest.mark.parametrize(
    ("method", "fields", "code", "said"),
    [
        ("ListArtifacts", {"page_size": 201}, "INVALID_ARGUMENT", ["page_size: 201", "1 to 200"]),
        ("ListArtifacts", {"page_size": -1}, "INVALID_ARGUMENT", ["page_size: -1"]),
        ("ListArtifacts", {"page_token": "?"}, "INVALID_ARGUMENT", ["page_token"]),
        ("ListArtifacts", {"target": 99}, "INVALID_ARGUMENT", ["target: 99"]),
        ("GetArtifact", {}, "INVALID_ARGUMENT", ["id: it is empty"]),
        ("GetArtifact", {"id": "0123"}, "INVALID_ARGUMENT", ["0123", "8"]),
        ("GetArtifact", {"id": "../../etc/passwd"}, "INVALID_ARGUMENT", ["etc"]),
        ("GetArtifact", {"id": "0" * 64}, "NOT_FOUND", ["0" * 12]),
        ("DeleteArtifact", {}, "INVALID_ARGUMENT", ["id: it is empty"]),
        ("DeleteArtifact", {"id": "0" * 64}, "NOT_FOUND", ["0" * 12]),
        ("DownloadArtifact", {"id": "0" * 64, "path": "encoder.onnx"}, "NOT_FOUND", ["0" * 12]),
        ("UseArtifact", {"model": "tinny", "artifact": "torch"}, "NOT_FOUND", ["tinny", "tiny"]),
        ("UseArtifact", {"model": "tiny"}, "INVALID_ARGUMENT", ["artifact: it is empty", "torch"]),
        ("UseArtifact", {"model": "tiny", "artifact": "0" * 64}, "NOT_FOUND", ["0" * 12]),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_bad_requests_about_artifacts_are_refused(
    service: inkwell.AsyncClient, method: str, fields: dict[str, Any], code: str, said: list[str]
) -> None:
    async with grpc.aio.insecure_channel(service._target) as channel:
        request = getattr(compiler_pb2, f"{method}Request")(**fields)
        error = await outcome(getattr(compiler_pb2_grpc.CompilerServiceStub(channel), method)(request))
    assert error.code().name == code, error.details()
    for words in said:
        assert words in (error.details() or "")


def noting(stages: list[str]) -> Callable[[inkwell.OperationEvent], None]:
    """Puts the stage of every progress into the list."""

    def note(event: inkwell.OperationEvent) -> None:
        if isinstance(event, inkwell.OperationProgress):
            stages.append(event.stage)

    return note


def broken_models(root: Path, tiny: str) -> dict[str, str]:
    """Models that the service takes and whose compile fails."""
    (root / "neither").mkdir()
    (root / "neither" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    weightless = root / "weightless"
    weightless.mkdir()
    shutil.copy(Path(tiny) / "config.json", weightless)
    return {"tiny": tiny, **{name: str(root / name) for name in ("gone", "neither", "weightless")}}


async def test_a_compile_that_fails_says_why_and_leaves_nothing(tiny: str, tmp_path: Path) -> None:
    chosen = compiler_service.settings(tmp_path, models=broken_models(tmp_path, tiny), operations_concurrency=2)
    async with compiler_service.serving(chosen) as client:

        async def failure(model: str, target: str = "onnx", **options: Any) -> inkwell.InkwellError:
            with pytest.raises(inkwell.InkwellError) as raised:
                await (await client.compile(model, target, **options)).result()
            return raised.value

        gone, neither, weightless, half = await asyncio.gather(
            failure("gone"), failure("neither"), failure("weightless"), failure("tiny", precision="bfloat16")
        )
        assert isinstance(gone, inkwell.NotFound)
        assert str(tmp_path / "gone") in gone.message
        assert isinstance(neither, inkwell.FailedPrecondition)
        assert "no TrOCR, diffusers or ControlNet folder" in neither.message
        assert weightless.reason in ("MODEL_UNUSABLE", "MODEL_FILES_NOT_FOUND")
        assert half.reason == "PRECISION_NOT_SUPPORTED"
        assert "bfloat16 for openvino" in half.message
        assert await client.artifacts() == []
    assert left_behind(tmp_path) == []


async def test_too_little_memory_is_said(tiny: str, tmp_path: Path) -> None:
    chosen = compiler_service.settings(tmp_path, models={"tiny": tiny}, memory_limit_bytes=100 << 20)
    async with compiler_service.serving(chosen) as client:
        with pytest.raises(inkwell.InkwellError) as raised:
            await (await client.compile("tiny", "onnx")).result()
        assert raised.value.reason == "MEMORY_LIMIT"
        assert "INKWELL_COMPILER_MEMORY_LIMIT_BYTES" in raised.value.message
    assert left_behind(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which a compiled model has no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_no_disk_left_is_said_and_nothing_is_left(tiny: str, tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "artifacts").symlink_to(small_disk)
    chosen = compiler_service.settings(tmp_path, models={"tiny": tiny})
    async with compiler_service.serving(chosen) as client:
        with pytest.raises(inkwell.FailedPrecondition) as raised:
            await (await client.compile("tiny", "onnx")).result()
        assert raised.value.reason in ("DISK_FULL", "STORE_FULL")
        assert await client.artifacts() == []
    assert left_behind(tmp_path) == []


async def test_no_disk_left_for_the_export_is_said_and_nothing_is_left(
    tiny: str, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the folders of child processes are made.
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    async with compiler_service.serving(compiler_service.settings(tmp_path, models={"tiny": tiny})) as client:
        stages: list[str] = []
        with pytest.raises(inkwell.FailedPrecondition) as raised:
            await (await client.compile("tiny", "onnx")).result(on_event=noting(stages))
        assert raised.value.reason == "DISK_FULL"
        assert str(small_disk) in raised.value.message
        assert stages[-1] == "exporting"
        assert await client.artifacts() == []
    assert files_in(small_disk) == left_behind(tmp_path) == []


async def test_an_s3_that_goes_away_at_the_first_upload_is_said_and_harms_nothing(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3.running(monkeypatch) as server:
        boto3.client("s3").create_bucket(Bucket="inkwell")
        location = "s3://inkwell/some/where"
        store = open_store(location)
        earlier = artifacts.publish(store)
        gone = False

        def leave(_: int, request: dict[str, Any]) -> s3.Answer | None:
            nonlocal gone
            gone = gone or (request["REQUEST_METHOD"] in ("PUT", "POST") and "/artifacts/" in request["PATH_INFO"])
            return ("", b"") if gone else None

        chosen = compiler_service.settings(tmp_path, models={"tiny": tiny}, artifact_store=location)
        async with compiler_service.serving(chosen) as client:
            server.watch(leave)
            stages: list[str] = []
            with pytest.raises(inkwell.Unavailable) as raised:
                await (await client.compile("tiny", "onnx")).result(on_event=noting(stages))
            assert gone
            assert stages[-1] == "publishing"
            assert raised.value.reason == "STORE_UNAVAILABLE"
            assert server.url in raised.value.message
            assert "nothing that was stored before is harmed" in raised.value.message
            with pytest.raises(inkwell.Unavailable):
                await client.artifacts()
            server.watch()
            assert [each.id for each in await client.artifacts()] == [earlier.id]
        assert store.verify(earlier.id) == []
        assert files_in(store._place.staging.root) == []


async def test_a_cancelled_compile_ends_its_processes_and_leaves_nothing(tiny: str, tmp_path: Path) -> None:
    async with compiler_service.serving(compiler_service.settings(tmp_path, models={"tiny": tiny})) as client:
        # Not this compile's: processes that earlier tests share.
        others = set(psutil.Process().children(recursive=True))
        operation = await client.compile("tiny", "onnx")
        children: set[psutil.Process] = set()
        async for event in operation.events():
            # Once: a second event may have been on its way when the first cancel ended them.
            if isinstance(event, inkwell.OperationProgress) and event.stage == "exporting" and not children:
                children = set(psutil.Process().children(recursive=True)) - others
                await operation.cancel()
        assert children
        with pytest.raises(inkwell.Cancelled):
            await operation.result()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 60)
        assert not alive
        assert await client.artifacts() == []
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(120 + 60 * KILLS)
async def test_killed_at_random_moments_the_compile_ends_once_and_earlier_artifacts_stay(
    tiny: str, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    service = CompilerProcess(tmp_path, json.dumps({"tiny": tiny}))
    store = open_store(str(tmp_path / "artifacts"))
    request_id = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    name = f"operations/compiler/{request_id}"
    await service.start()
    for number in range(KILLS):
        told = 0
        wanted = chance.randrange(1, 12)
        async with inkwell.AsyncClient(service.address) as client:
            if number == 0:
                await client.compile("tiny", "onnx", request_id=request_id)
            operation: inkwell.AsyncOperation[inkwell.Artifact] = await client.operation(name)
            # Of those that were told already, none: this run's own.
            seen = operation.events()
            async for event in seen:
                told += isinstance(event, inkwell.OperationProgress)
                if told >= wanted or isinstance(event, inkwell.OperationDone):
                    break
            await seen.aclose()
            await service.end()
        assert [store.verify(stored.id) for stored in store.find()] in ([], [[]])
        await service.start()
    async with inkwell.AsyncClient(service.address) as client:
        operation = await client.operation(name)
        sequences: list[int] = []
        artifact = await operation.result(on_event=lambda event: sequences.append(event.sequence))
        assert sequences == list(range(1, len(sequences) + 1))
        assert [stored.id for stored in store.find()] == [artifact.id]
        await client.download_artifact(artifact.id, tmp_path / "copy")
    assert await service.end(signal.SIGTERM) == 0
    store.collect(keep_newest=9)
    assert left_behind(tmp_path) == []
