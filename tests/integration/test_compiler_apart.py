"""Artifacts whose weights lie beside their graphs, as those of large models do: whole, downloaded, plain, served."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from services.compiler import layers
from services.compiler.domain import CompileJob, CompileRequest
from services.compiler.work import compile_job
from services.runtimes.artifacts.manifest import Target
from services.runtimes.artifacts.store import Store, Stored, open_store
from services.runtimes.hardware import detect
from services.runtimes.sessions.interface import SessionOptions
from services.runtimes.sessions.opening import open_session
from tests.support import compiler_service
from tests.support.triton_server import TritonServer


@dataclass
class Apart:
    """Two compiles of a small model, with a threshold that its graphs are beyond."""

    root: Path
    source: str
    store: Store
    onnx: Stored
    triton: Stored


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    root = tmp_path_factory.mktemp("apart")
    source = compiler_service.tiny_model(root / "tiny")
    store = open_store(str(root / "artifacts"))

    def compiled(target: Target) -> Stored:
        folder = root / target
        folder.mkdir()
        job = CompileJob(CompileRequest("tiny", source, target, "float32"), store.location, str(store.staging()))
        return store.get(compile_job(job, folder, lambda told: None).artifact_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "INLINE_BYTES_MOST", 1000)
        return Apart(root, source, store, compiled("onnx"), compiled("triton"))


def test_the_files_are_listed_with_their_digests_and_damage_is_found(apart: Apart) -> None:
    for stored in (apart.onnx, apart.triton):
        sizes = {file.path: file.size_bytes for file in stored.manifest.files}
        for graph in stored.manifest.graphs:
            weights = Path(graph.file).with_name(f"{graph.component}.onnx.data").as_posix()
            assert sizes[weights] >= graph.weight_bytes / 2
        assert apart.store.verify(stored.id) == []
    damaged = apart.store.local_folder(apart.onnx.id) / "encoder.onnx.data"
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-1] + b"x")
        assert [line.partition(":")[0] for line in apart.store.verify(apart.onnx.id)] == ["encoder.onnx.data"]
    finally:
        damaged.write_bytes(content)


def test_the_operators_that_it_takes_are_told(apart: Apart) -> None:
    for stored in (apart.onnx, apart.triton):
        files = [apart.store.local_folder(stored.id) / graph.file for graph in stored.manifest.graphs]
        imported = [onnx.load(file, load_external_data=False).opset_import for file in files]
        versions = {opset.version for opsets in imported for opset in opsets if opset.domain == ""}
        assert stored.manifest.requires.onnx_opset == max(versions)


async def test_what_was_downloaded_runs_in_plain_onnxruntime(apart: Apart, tmp_path: Path) -> None:
    chosen = compiler_service.settings(apart.root, models={"tiny": apart.source})
    async with compiler_service.serving(chosen) as client:
        await client.download_artifact(apart.onnx.id, tmp_path)
    for file in apart.onnx.manifest.files:
        assert hashlib.sha256((tmp_path / file.path).read_bytes()).hexdigest() == file.sha256
    encoder = apart.onnx.manifest.graph("encoder")
    assert encoder is not None
    pixels = torch.randn(2, *[int(size) for size in encoder.inputs[0].shape[1:]])
    plain = onnxruntime.InferenceSession(str(tmp_path / encoder.file))
    (found,) = plain.run(["states"], {"pixel_values": pixels.numpy()})
    # Triton's copy of it, by a server that reads the repository as NVIDIA's does.
    folder = apart.store.local_folder(apart.triton.id)
    served = apart.triton.manifest.graph("encoder")
    assert served is not None
    with TritonServer(folder / "repository") as server:
        options = SessionOptions(detect(), triton_address=server.address)
        session = open_session(folder / served.file, "triton", options)
        try:
            assert torch.equal(session.run({"pixel_values": pixels})["states"], torch.from_numpy(found))
        finally:
            session.close()
